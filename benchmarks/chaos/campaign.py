"""One class of faults: a system under load, its faults by the schedule, and all that is left to be judged."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos.clients import Clients
from benchmarks.chaos.clock import Clock
from benchmarks.chaos.cluster import CLUSTER, clustered
from benchmarks.chaos.collect import archived, long_task, performances, settled, views
from benchmarks.chaos.evidence import Evidence
from benchmarks.chaos.faults import Happened, Target, schedule, unleash
from benchmarks.chaos.history import History
from benchmarks.chaos.workload import PROGRAM
from tests.e2e.running import Running

from dspex.bus.server import free_port

__all__ = ["Options", "Run", "Unavailable", "campaign", "counting", "environment"]

HERE = Path(__file__).parent
APP = f"{HERE / 'program.py'}:Chaos"
LIMITS = {PROGRAM: {"usd": "1000"}}
"""A budget that is never spent: what is lent and settled of it has to add up."""
CALM = 4.0
"""Seconds of load before the first fault, in which the full rate is measured."""


class Unavailable(Exception):
    """This machine does not have what a class of faults takes."""


@dataclass(frozen=True)
class Options:
    """What a campaign is run with: at least so many tasks and faults of each class, and at `most` so
    many faults; `every` is from how many to how
    many seconds lie between two faults."""

    tasks: int = 1000
    seed: int = 1
    log: str = "jetstream"
    rate: float = 100.0
    every: tuple[float, float] = (5.0, 40.0)
    agents: int = 3
    clients: int = 12
    faults: int = 3
    most: int = 1000
    patience: float = 90.0
    durability: str = "process"


@dataclass(frozen=True)
class Run:
    """What one class left: the evidence, the faults that were, and from when to when there was load."""

    name: str
    evidence: Evidence
    happened: Sequence[Happened]
    began: float
    ended: float


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Variables for processes that are started in here."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def counting(folder: Path) -> Iterator[Path]:
    """A counter of effects; its socket is in the environment of what is started in here. Gives its book."""
    socket, book = folder / "counter", folder / "book"
    book.touch()
    command = [sys.executable, str(HERE / "counter.py"), str(socket), str(book)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as counter:
        assert counter.stdout
        counter.stdout.readline()
        try:
            with environment(DSPEX_CHAOS_COUNTER=str(socket)):
                yield book
        finally:
            counter.terminate()


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of so many bytes."""
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        raise Unavailable("a disk that fills takes a small one, and to mount that takes root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@contextmanager
def _target(folder: Path, names: Sequence[str], options: Options) -> Iterator[Target]:
    """The system that the faults are for, with what they take."""
    if any(name in CLUSTER for name in names):
        if not all(name in CLUSTER for name in names):
            raise Unavailable("faults of a cluster and of one machine are classes of their own")
        with clustered(
            folder, (APP, options.agents), words=folder / "words", log=options.log, durability=options.durability
        ) as (system, cluster):
            try:
                system.start()
                yield Target(system, system.url, cluster=cluster)
            finally:
                system.end()
        return
    clock: Clock | None = None
    if any(name.startswith("clock-") for name in names):
        try:
            clock = Clock(folder)
        except FileNotFoundError as error:
            raise Unavailable(str(error)) from None
    fills = "full-disk" in names
    with (small_disk(folder, 256 << 20) if fills else _nothing(folder)) as place:
        system = Running(
            place / "data", (APP, options.agents), words=folder / "words", log=options.log,
            durability=options.durability, port=free_port(), limits=LIMITS,
        )  # fmt: skip
        with environment(**(clock.environment if clock else {})):
            try:
                system.start()
                yield Target(system, system.url, clock, place if fills else None)
            finally:
                system.end()
                if clock:
                    clock.close()


@contextmanager
def _nothing(folder: Path) -> Iterator[Path]:
    yield folder


async def campaign(
    name: str, names: Sequence[str], options: Options, folder: Path, history: History,
    say: Callable[[str], None] = lambda line: None,
) -> Run:  # fmt: skip
    """Run one class of faults, called `name`; `names` are its faults. Raises Unavailable, and AssertionError when
    clients do not get done; `history` has then what they had heard."""
    happened = list[Happened]()
    with counting(folder) as book, _target(folder, names, options) as target:
        system = target.system
        clients = Clients(
            system.plain, history, seed=options.seed, tasks=options.tasks, rate=options.rate, count=options.clients,
            patience=options.patience, enough=lambda: len(happened) >= options.faults,
        )  # fmt: skip
        began = time.time()
        async with _progress(name, clients, happened, say), _faults(target, names, options, happened, clients.sent):
            await clients.run()
            ended = time.time()
        say(f"{name}: {clients.acknowledged} acknowledged, {len(happened)} faults; waiting for what is open")
        patience = 1.0 if clients.hanging else options.patience
        evidence = await _evidence(system, history, book, options, patience)
        evidence.hanging = clients.hanging
    return Run(name, evidence, happened, began, ended)


@asynccontextmanager
async def _faults(
    target: Target, names: Sequence[str], options: Options, happened: list[Happened], sent: asyncio.Event
) -> AsyncIterator[None]:
    """Faults as long as the clients send; the last of them has ended when this is left."""

    async def run() -> None:
        await asyncio.sleep(CALM)
        await unleash(target, schedule(names, options.seed, options.every, options.most), happened)

    async def until_sent() -> None:
        await sent.wait()
        running.cancel()

    running, stopping = asyncio.create_task(run()), asyncio.create_task(until_sent())
    try:
        yield
    finally:
        stopping.cancel()
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


@asynccontextmanager
async def _progress(
    name: str, clients: Clients, happened: Sequence[Happened], say: Callable[[str], None]
) -> AsyncIterator[None]:
    async def talk() -> None:
        while True:
            await asyncio.sleep(5)
            last = f", last {happened[-1].name}" if happened else ""
            say(
                f"{name}: {clients.acknowledged} of {clients.tasks} acknowledged, {clients.settled} done, "
                f"{len(happened)} faults{last}"
            )

    talking = asyncio.create_task(talk())
    try:
        yield
    finally:
        talking.cancel()


async def _evidence(
    system: Running, history: History, book: Path, options: Options, patience: float
) -> Evidence:
    async with await system.plain() as plain:
        await long_task(plain)
        told = await settled(plain, patience)
    last = told.rows[-1].position
    return Evidence(
        history=history, told=told, performances=performances(book),
        archived=await archived(system, options.log, last), views=await views(system.data, last),
    )  # fmt: skip


