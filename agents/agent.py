"""An agent's life: connect, make the program known, serve it, drain, end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import random
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
import uvloop

from dspex.agents import logtime
from dspex.agents.code import code_of
from dspex.agents.doors import Doors
from dspex.agents.journal import record
from dspex.agents.link import Link
from dspex.agents.patience import Patience
from dspex.agents.process import GRACE, live
from dspex.agents.registered import Registered
from dspex.agents.resources import confine
from dspex.agents.supervisor import EXIT_RECYCLE, EXIT_REFUSED, Life
from dspex.agents.vault import master_from
from dspex.agents.watch import Watch
from dspex.agents.worker import Worker
from dspex.bus.client import Client
from dspex.bus.identity import subjects_of
from dspex.bus.service import Service
from dspex.core import headers as h
from dspex.core.effects import branching
from dspex.core.errors import DspexError, LimitExceeded, LogError
from dspex.core.events import AgentStarted, AgentStopped, ProgramRegistered
from dspex.core.ports import Log
from dspex.core.program import Program
from dspex.core.subjects import aggregate
from dspex.core.upkeep import Upkeep

__all__ = ["AgentSpec", "agent_main", "registration"]

logger = logging.getLogger("dspex.agents")

AGAIN = 1.0
SPREAD = 1.2
"""Agents are replaced after up to so many times the tasks that were asked for."""
VERSION = "0.1.0"


@dataclass(frozen=True)
class AgentSpec:
    """What an agent is to be. `values` are variables to set; `replace` lets a changed schema take over; `code` is the
    program's code version as it was when the file was loaded, which may have changed since; `master` refers to the
    master key of private values; `max_queue` stands for the program's own."""

    name: str
    program: type[Program]
    url: str
    prefix: str = "dspex"
    app: str = ""
    credentials: str | None = None
    replace: bool = False
    values: dict[str, Any] = field(default_factory=dict)
    code: str = ""
    master: str = ""
    max_queue: int | None = None
    upkeep: Upkeep = field(default_factory=Upkeep)
    number: int = 0


def registration(program: type[Program], app: str) -> ProgramRegistered:
    """What makes a program known."""
    about = program.describe()
    return ProgramRegistered(
        program=about.name, fingerprint=about.fingerprint, doc=about.doc, input_schema=about.input_schema,
        output_schema=about.output_schema, variables=about.variables, app=app,
    )  # fmt: skip


def agent_main(link: Link, life: Life, spec: AgentSpec) -> int:
    """Be an agent until told to stop. Returns the exit status."""
    gc.set_threshold(20_000, 20, 50)
    confine(spec.upkeep, spec.number)
    # Not `run`: that waits for every task that is left, and a program may have left one that cannot be stopped.
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    return loop.run_until_complete(_Agent(link, life, spec).live())


class _Agent:
    def __init__(self, link: Link, life: Life, spec: AgentSpec) -> None:
        self.link, self.life, self.spec = link, life, spec
        self.subjects = subjects_of(spec.prefix, spec.credentials)
        self.state = "starting"
        self.stopping = asyncio.Event()
        self.status, self.why, self.patience = 0, "", Patience(GRACE)
        self.aggregate = aggregate("agent", spec.program.name, spec.name)
        self.worker: Worker | None = None
        self.client: Client | None = None
        self.registering: asyncio.Task[None] | None = None
        self.watch: Watch | None = None
        # Equal agents with equal shares of the tasks are not to be replaced all at once.
        self.enough = round(spec.upkeep.recycle_after * random.uniform(1.0, SPREAD))

    async def live(self) -> int:
        asyncio.get_running_loop().set_task_factory(branching)
        spec = self.spec
        return await live(
            self.link, spec.name, spec.url, spec.credentials, stopping=self.stopping, serve=self._serve,
            stop=lambda why, grace: self.stop(why, grace=self.own_grace if grace == GRACE else grace),
            hear=self._hear, load=self._load,
        )  # fmt: skip

    @property
    def own_grace(self) -> float:
        """Seconds for running tasks; the supervisor gives a little more before it kills."""
        shutdown = self.spec.upkeep.shutdown
        return max(shutdown - 2.0, shutdown / 2)

    def _recycle(self, why: str) -> None:
        self.stop(why, EXIT_RECYCLE, self.own_grace)

    def _done(self) -> None:
        """A task has ended here: that this agent serves is shown, and some day it has served enough."""
        assert self.worker
        done = self.worker.endings.done
        if done == 1:
            self.link.send({"served": True})
        if done == self.enough:
            self._recycle(f"has served {done:,} tasks")

    def stop(self, why: str, status: int = 0, grace: float = GRACE) -> None:
        if self.stopping.is_set():
            self.patience.cut(grace)
            return
        self.why, self.status, self.patience = why, status, Patience(grace)
        self.stopping.set()

    def _hear(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if "drain" in message:
                self.stop("told to drain", grace=message["drain"])

    def _load(self) -> dict[str, int]:
        """How much there is to do here, for whoever decides how many agents there should be."""
        worker = self.worker
        if worker is None:
            return {}
        return {"running": len(worker.running), "done": worker.endings.done, "slots": worker.program.slots()}

    async def _serve(self, client: Client) -> int:
        spec, subjects, self.client = self.spec, self.subjects, client
        logtime.begin()
        program = spec.program(**spec.values)
        preparing = asyncio.create_task(asyncio.to_thread(program.prepare))
        place = await self._register(client)
        if place is None:
            return self.status
        try:
            await preparing
        except Exception as error:
            return self._unprepared(error)
        log = place.log(client, subjects, program.name)
        worker = self.worker = Worker(
            program, agent=spec.name, code=spec.code or code_of(spec.program), client=client, log=log,
            subjects=subjects, on_worn=self._recycle, place=place,
            master=master_from(spec.master), max_queue=spec.max_queue,
        )  # fmt: skip
        # A life that brings a poisonous task nearer to its end is no failure of the agent.
        worker.endings.on_death = lambda: self.link.send({"served": True})
        service = Service(
            client, name=program.name, id=spec.name, version=VERSION, description=program.describe().doc,
            metadata={"dspex": spec.prefix, "agent": spec.name}, data=self._stats,
        )  # fmt: skip
        Doors(worker, client, subjects, service, worker.results, worker.assignments)
        worker.breakers.serve(service)
        service.announce()
        await self._make_known(worker)
        await worker.limits.begin()
        worker.endings.on_done = self._done
        loop = asyncio.get_running_loop()

        def full(why: str) -> None:
            loop.call_soon_threadsafe(self._recycle, why)

        self.watch = watch = Watch(worker, self.link, spec.upkeep, full)
        watch.start()
        # Before the first task: when this was stored says what time it is.
        started = AgentStarted(pid=os.getpid(), role="agent", program=program.name, restarts=self.life.restarts)
        await self._record(log, started)
        worker.start(self._missing)
        await client.flush()
        self._say("serving")
        await self.stopping.wait()
        service.stop()
        worker.leave()
        self._say("draining")  # from now on nothing is taken that was not on its way
        if worker.running:
            grace = self.patience.seconds
            self.link.send({"event": "draining", "agent": spec.name, "tasks": len(worker.running), "grace": grace})
        await worker.drain(self.patience)
        await worker.limits.finish()
        await service.finish(1.0)
        watch.stop()
        await self._record(log, AgentStopped(pid=os.getpid(), reason=self.why))
        return self.status

    def _unprepared(self, error: Exception) -> int:
        """`setup` failed: on the first start nobody has seen it work, so trying for ever would only hide it."""
        sentence = f"{self.spec.program.__name__}.setup raised {type(error).__name__}: {error}"
        first = not self.life.restarts  # then the root says it, once for all agents of the program
        logger.log(logging.DEBUG if first else logging.ERROR, sentence, exc_info=error)
        if not first:
            self.link.send({"why": sentence})
            return 1
        self.link.send({"refused": sentence})
        return EXIT_REFUSED

    async def _register(self, client: Client) -> Registered | None:
        """Make the program known; return where its tasks come from, or None when it was refused or we are to stop."""
        body = msgspec.json.encode(
            {"registration": registration(self.spec.program, self.spec.app), "replace": self.spec.replace}
        )
        said = time.monotonic()
        while not self.stopping.is_set():
            try:
                reply = await client.request(self.subjects.registry("register"), body, timeout=15)
            except (TimeoutError, DspexError):
                await asyncio.sleep(0.02)  # it may have failed at once, and a loop that never waits hears no signal
                continue
            if reply.status == 503:
                if time.monotonic() - said > 3:
                    said = time.monotonic()
                    logger.warning("%s waits for a registrar; `dspex up` runs one", self.spec.name)
                await asyncio.sleep(0.02)
                continue
            code = reply.headers.get(h.ERROR_CODE)
            if code == "409":
                self.link.send({"refused": reply.headers.get(h.ERROR, "")})
                self.status = EXIT_REFUSED
                return None
            if code is None:
                return msgspec.json.decode(reply.data, type=Registered)
            logger.warning("%s could not be registered: %s", self.spec.name, reply.headers.get(h.ERROR, ""))
            await asyncio.sleep(0.5)
        return None

    def _missing(self) -> None:
        """Nobody answers for our consumer: if it was deleted, registering brings it back."""
        if self.registering is None or self.registering.done():
            self.registering = asyncio.create_task(self._register_again())

    async def _register_again(self) -> None:
        assert self.client
        await asyncio.sleep(AGAIN)
        if not self.stopping.is_set() and await self._register(self.client) is None:
            self.stop("another program has this name now", self.status)

    async def _record(self, log: Log, event: AgentStarted | AgentStopped) -> None:
        if self.client is None or not self.client.connected:
            return
        try:
            async with asyncio.timeout(3):
                began = time.monotonic()
                head = await record(log, self.aggregate, [event], source=f"/agents/{self.spec.name}")
                ended = time.monotonic()
                if entry := await log.entry(head.position):
                    logtime.between(entry.time, began, ended)
        except (LogError, TimeoutError) as error:
            logger.warning("%s could not write %s: %s", self.spec.name, type(event).__name__, error)

    async def _make_known(self, worker: Worker) -> None:
        """Values that are not the default are in the log before a task runs on them, so that it can be run again."""
        try:
            async with asyncio.timeout(3):
                await worker.assignments.record(worker.program.assignment, who=self.spec.name, why="in force")
        except (LogError, LimitExceeded, TimeoutError) as error:
            logger.warning("%s could not write down the values it runs on: %s", self.spec.name, error)

    def _say(self, state: str) -> None:
        self.state = state
        self.link.send({"state": state})

    def _stats(self) -> dict[str, Any]:
        worker, watch = self.worker, self.watch
        return {
            "agent": self.spec.name, "program": self.spec.program.name, "pid": os.getpid(), "state": self.state,
            "code": worker.code if worker else "", "restarts": self.life.restarts,
            "tasks": worker.endings.done if worker else 0,
            "running": len(worker.running) if worker else 0, "failed": worker.endings.failed if worker else 0,
            "stalls": watch.stalls if watch else 0, "longest_stall": round(watch.longest, 3) if watch else 0.0,
            "stalled": watch.where if watch else "",
            "waiting": worker.backlog.waiting if worker else 0,
            "breakers": worker.breakers.stats() if worker else [],
        }  # fmt: skip
