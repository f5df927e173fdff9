"""The faults of one machine: who is killed, frozen, slowed down, restarted, starved of disk or lied to about the time.

A fault is a context: it begins, is held for a while, and ends. The schedule is made from the seed before the run. What
is hostile stands in `hostile`, what a shifted clock is made of in `clock`.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.chaos.clock import HOUR, Clock
from benchmarks.chaos.cluster import CLUSTER, ClusterFault, ProxiedCluster
from benchmarks.chaos.hostile import Fuzzer
from tests.e2e.running import Running, gone
from tests.store.disks import fill

__all__ = ["FAULTS", "MIXES", "Fault", "Happened", "Planned", "Target", "schedule", "unleash"]

PATIENCE = 120.0
"""Seconds that a fault waits for the process it is meant for, and for a system to come up again."""


@dataclass
class Target:
    """What faults are done to: the system, and what was made ready for those that need it."""

    system: Running
    url: str
    clock: Clock | None = None
    disk: Path | None = None
    cluster: ProxiedCluster | None = None
    starting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def find(self, who: Callable[[Running], int]) -> int:
        """The pid of a process, as soon as there is one."""
        async with asyncio.timeout(PATIENCE):
            while True:
                with suppress(StopIteration, IndexError, AssertionError):
                    return who(self.system)
                await asyncio.sleep(0.02)

    async def start_again(self) -> None:
        """Start the system that was killed; as long as a frozen process or a full disk is in the way, again."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                await asyncio.to_thread(self.system.start)
                return
            except AssertionError:
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.5)


@dataclass(frozen=True)
class Fault:
    """`hold` is how long it lasts, in seconds. One that `blocks` stops everything until it ends, so that recovery is
    counted from its end."""

    act: Callable[[Target, random.Random], AbstractAsyncContextManager[None]]
    hold: tuple[float, float] = (0.0, 0.0)
    blocks: bool = False


@dataclass(frozen=True)
class Planned:
    """A fault of the schedule: how long after the one before it begins, and how long it is held."""

    name: str
    after: float
    hold: float
    seed: str


@dataclass(frozen=True)
class Happened:
    """A fault that was: when it began and ended, in seconds since the epoch."""

    name: str
    began: float
    ended: float

    @property
    def since(self) -> float:
        """Since when a system can recover from it."""
        return self.ended if FAULTS[self.name].blocks else self.began


def _agent(chance: random.Random) -> Callable[[Running], int]:
    return lambda system: chance.choice(system.agent_pids())


def _always(who: Callable[[Running], int]) -> Callable[[random.Random], Callable[[Running], int]]:
    return lambda chance: who


WHO: dict[str, Callable[[random.Random], Callable[[Running], int]]] = {
    "agent": _agent, "registrar": _always(Running.registrar), "archivist": _always(Running.archivist),
    "supervisor": _always(Running.supervisor), "server": _always(Running.server),
}  # fmt: skip


def _killed(who: str, with_signal: signal.Signals = signal.SIGKILL) -> Fault:
    @asynccontextmanager
    async def act(target: Target, chance: random.Random) -> AsyncIterator[None]:
        pid = await target.find(WHO[who](chance))
        with suppress(ProcessLookupError):
            os.kill(pid, with_signal)
        yield

    return Fault(act)


def _frozen(who: str) -> Fault:
    @asynccontextmanager
    async def act(target: Target, chance: random.Random) -> AsyncIterator[None]:
        pid = target.system.root if who == "root" else await target.find(WHO[who](chance))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    return Fault(act, (0.5, 8.0), blocks=who == "server")


def _restarted(everybody: bool) -> Fault:
    """The root killed, or all processes at once; then the system is started again on the same folder."""

    @asynccontextmanager
    async def act(target: Target, chance: random.Random) -> AsyncIterator[None]:
        async with target.starting:
            below = target.system.descendants()
            if everybody:
                for pid in below:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            await asyncio.to_thread(target.system.kill)
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline and not all(gone(pid) for pid in below):
                await asyncio.sleep(0.05)
            await target.start_again()
            yield

    return Fault(act, blocks=False)


@asynccontextmanager
async def _full_disk(target: Target, chance: random.Random) -> AsyncIterator[None]:
    assert target.disk, "a full disk takes a small one"
    filler = await asyncio.to_thread(fill, target.disk)
    try:
        yield
    finally:
        filler.unlink(missing_ok=True)  # another that began later may have ended first


@asynccontextmanager
async def _slow_agent(target: Target, chance: random.Random) -> AsyncIterator[None]:
    """An agent that gets a tenth of its time, so that it reads its socket ten times slower."""
    pid = await target.find(_agent(chance))

    async def stutter() -> None:
        while True:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.27)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.03)

    async def until_it_dies() -> None:
        with suppress(ProcessLookupError):
            await stutter()

    stuttering = asyncio.create_task(until_it_dies())
    try:
        yield
    finally:
        stuttering.cancel()
        with suppress(asyncio.CancelledError):
            await stuttering
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@asynccontextmanager
async def _slow_client(target: Target, chance: random.Random) -> AsyncIterator[None]:
    """Clients that want everything and read nothing, and ask for much without taking the answers."""
    address = urlsplit(target.url)
    links = []
    for _ in range(4):
        link = socket.socket()
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with suppress(OSError):
            link.connect((address.hostname or "127.0.0.1", address.port or 4222))
            body = b'{"n": 1, "kind": "quick", "seconds": 0.0}'
            ask = b"PUB dspex.ask.chaos _INBOX.slow.x %d\r\n%b\r\n" % (len(body), body)
            link.sendall(b'CONNECT {"verbose":false,"headers":true}\r\nSUB > 1\r\nSUB dspex.> 2\r\n' + ask * 50)
        links.append(link)
    try:
        yield
    finally:
        for link in links:
            link.close()


async def _several(target: Target, who: Callable[[Running], list[int]]) -> list[int]:
    """Processes, as soon as there is one."""
    await target.find(lambda system: who(system)[0])
    return who(target.system)


def _clock(direction: int) -> Fault:
    @asynccontextmanager
    async def act(target: Target, chance: random.Random) -> AsyncIterator[None]:
        """The agents' clocks jump, each by hours of its own, and one of them dies, so that one begins in wrong time."""
        clock, system = target.clock, target.system
        assert clock, "a clock that jumps takes the shim"
        supervisor, pids = await target.find(Running.supervisor), await _several(target, Running.agent_pids)
        for pid in [await target.find(who) for who in (Running.registrar, Running.archivist)]:
            clock.keep(pid)
        for pid in pids:
            clock.shift(pid, direction * chance.randrange(60, 12 * HOUR))
        if system.log_file is None:  # a log process that is started meanwhile has the clock of the log
            clock.shift_children(supervisor, direction * chance.randrange(60, 12 * HOUR))
            with suppress(ProcessLookupError):
                os.kill(chance.choice(pids), signal.SIGKILL)
        try:
            yield
        finally:
            clock.shift_children(supervisor, 0)
            for pid in pids:
                clock.shift(pid, 0)

    return Fault(act, (1.0, 8.0))


@asynccontextmanager
async def _hostile(target: Target, chance: random.Random) -> AsyncIterator[None]:
    async with Fuzzer(target.url, chance):
        yield


def _of_cluster(fault: ClusterFault) -> Fault:
    """One at a time: two members that are gone are a majority, and nothing is promised without one."""

    @asynccontextmanager
    async def act(target: Target, chance: random.Random) -> AsyncIterator[None]:
        assert target.cluster, "such a fault takes a cluster"
        async with target.starting:
            end = await asyncio.to_thread(fault.begin, target.cluster, chance)
            try:
                yield
            finally:
                await asyncio.to_thread(end)

    return Fault(act, fault.hold)


FAULTS: dict[str, Fault] = {
    **{f"kill-{who}": _killed(who) for who in WHO},
    "kill-root": _restarted(everybody=False),
    "kill-all": _restarted(everybody=True),
    **{f"stop-{who}": _frozen(who) for who in (*WHO, "root")},
    "restart-server": _killed("server", signal.SIGTERM),
    "full-disk": Fault(_full_disk, (1.0, 6.0), blocks=True),
    "slow-agent": Fault(_slow_agent, (2.0, 8.0)),
    "slow-client": Fault(_slow_client, (2.0, 8.0)),
    "clock-ahead": _clock(1),
    "clock-behind": _clock(-1),
    "hostile": Fault(_hostile, (2.0, 8.0)),
    **{name: _of_cluster(fault) for name, fault in CLUSTER.items()},
}
MIXES = {
    **{kind: tuple(name for name in FAULTS if name.startswith(f"{kind}-") and name not in CLUSTER)
       for kind in ("kill", "stop", "slow", "clock")},
    "mixed": tuple(name for name in FAULTS if name not in CLUSTER),
    "cluster-mixed": tuple(CLUSTER),
}
"""All faults of a kind, each in turn; all of one machine, one beginning while others are held; and all of a cluster,
one after the other."""


def schedule(names: Sequence[str], seed: int, every: tuple[float, float], length: int = 1000) -> list[Planned]:
    """The faults of a run: of several names all come in turn, in an order that is drawn anew each time around."""
    chance, planned, left = random.Random(f"{seed}/faults/{'+'.join(names)}"), list[Planned](), list[str]()
    while len(planned) < length:
        left = left or chance.sample(list(names), len(names))
        name = left.pop()
        hold = chance.uniform(*FAULTS[name].hold)
        planned.append(Planned(name, chance.uniform(*every), hold, f"{seed}/fault/{len(planned)}"))
    return planned


async def unleash(target: Target, planned: Sequence[Planned], happened: list[Happened]) -> None:
    """Do one fault after the other, whether those before are over or not, until cancelled; then end those that hold."""
    running = set[asyncio.Task[None]]()

    async def one(plan: Planned) -> None:
        async with FAULTS[plan.name].act(target, random.Random(plan.seed)):
            began = time.time()
            try:
                await asyncio.sleep(plan.hold)
            finally:
                happened.append(Happened(plan.name, began, time.time()))

    try:
        for plan in planned:
            async with target.starting:  # the time counts from when the system that was killed is up again
                pass
            await asyncio.sleep(plan.after)
            task = asyncio.create_task(one(plan))
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(0)
    finally:
        for done in await asyncio.gather(*running, return_exceptions=True):
            if isinstance(done, BaseException):
                raise done
