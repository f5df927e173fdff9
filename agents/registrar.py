"""The registrar: the one process that opens doors for programs. It also reads the log for everyone and speaks on the
bus for its supervisor.

Changing a stream has no compare-and-set, so one process does it, under a fenced lease. What it writes is always the
fold of `ProgramRegistered`, so that a step lost in a crash is made good by the next registration or restart.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import uvloop

from dspex.agents import logtime
from dspex.agents.autoscale import Autoscale
from dspex.agents.control import Control
from dspex.agents.doorkeeper import Doorkeeper
from dspex.agents.grounds import Ground, GuestGround, JetStreamGround, OwnGround
from dspex.agents.guards import Told
from dspex.agents.journal import events_for, head_of, record
from dspex.agents.limiter import Limiter
from dspex.agents.link import Link
from dspex.agents.process import live, work_until
from dspex.agents.supervisor import EXIT_RECYCLE, EXIT_REFUSED, Life
from dspex.agents.vault import master_from
from dspex.bus import streams
from dspex.bus.client import Client
from dspex.bus.identity import subjects_of
from dspex.bus.lease import Lease
from dspex.bus.service import Endpoint, Request, Service
from dspex.core.codec import NOT_JSON, decode_commit
from dspex.core.doors import Marks
from dspex.core.errors import ConfigurationError, Conflict, InvalidInput, LogCorrupt, LogError, Unavailable
from dspex.core.events import PAYLOADS, AgentCrashed, AgentGaveUp, AgentStarted, Payload, ProgramRegistered
from dspex.core.ports import Appended
from dspex.core.subjects import aggregate, valid_token
from dspex.store.backends import JETSTREAM

__all__ = ["RegistrarSpec", "difference", "registrar_main"]

logger = logging.getLogger("dspex.agents")

VERSION = "0.1.0"
MAX_WAITING = 1000
MAX_REGISTRATION = 4 << 20
"""Bytes of a registration: the schemas of a program and its variables."""


@dataclass(frozen=True)
class RegistrarSpec:
    """What a registrar is to be. `replicas` is how many copies of the log are kept where the cluster allows, `known`
    the log that must be there. With any `log` but JetStream's this process owns the log, in the data folder `folder`.
    `alone`: nobody else has a log on this server. `master` refers to the master key of private values; `marks` say
    when the stored doors are closed. `limits` are those of the configuration, which counts since `limits_since`
    (seconds since the epoch)."""

    name: str
    url: str
    prefix: str = "dspex"
    credentials: str | None = None
    replicas: int = 3
    known: streams.Known | None = None
    log: str = JETSTREAM
    folder: Path = Path()
    durability: Literal["power", "process"] = "power"
    alone: bool = False
    master: str = ""
    limits: dict[str, dict[str, str]] = field(default_factory=dict)
    limits_since: float = 0.0
    marks: Marks = field(default_factory=Marks)

    @property
    def role(self) -> str:
        """What it is called among the processes."""
        return "registrar" if self.log == JETSTREAM else "log"


class _Registration(msgspec.Struct):
    registration: ProgramRegistered
    replace: bool = False


def registrar_main(link: Link, life: Life, spec: RegistrarSpec) -> int:
    """Be a registrar until told to stop. Returns the exit status."""
    return uvloop.run(_Registrar(link, life, spec).live())


class _Registrar:
    def __init__(self, link: Link, life: Life, spec: RegistrarSpec) -> None:
        self.link, self.life, self.spec = link, life, spec
        self.subjects = subjects_of(spec.prefix, spec.credentials)
        self.source = f"/registrar/{spec.name}"
        self.stopping = asyncio.Event()
        self.status = 0
        self.processes: list[dict[str, Any]] = []
        self.notices: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_WAITING)
        self.noticed = 0
        self.supervisor = ""
        self.fleet: dict[str, dict[str, Any]] = {}
        self.control: Control | None = None
        self.autoscale: Autoscale | None = None
        self.programs: dict[str, ProgramRegistered] = {}
        self.changing = asyncio.Lock()
        self.waiting: asyncio.Queue[tuple[_Registration, Request]] = asyncio.Queue(MAX_WAITING)

    async def live(self) -> int:
        spec = self.spec
        return await live(
            self.link, spec.name, spec.url, spec.credentials, stopping=self.stopping, serve=self._serve,
            stop=lambda why, grace: self.stopping.set(), hear=self._hear, speaks=True,
        )  # fmt: skip

    async def _serve(self, client: Client) -> int:
        try:
            return await self._serve_log(client)
        except (ConfigurationError, LogCorrupt) as error:  # it will not get better by itself
            self.link.send({"refused": str(error)})
            return EXIT_REFUSED

    async def _serve_log(self, client: Client) -> int:
        self.ground = await self._stand(client)
        self.log = self.ground.log
        service = Service(
            client, name=f"{self.spec.prefix}-registrar", id=self.spec.name, version=VERSION,
            description="opens doors for programs and reads the log", data=self._stats,
            metadata={"dspex": self.spec.prefix, "agent": self.spec.name},
        )  # fmt: skip
        self.ground.read(service)
        self.control = Control(service, self.subjects, self.link)
        self.autoscale = Autoscale(
            client, self.subjects, self.link.send, queued=self.ground.queued, held=self.ground.held
        )
        self._steer()
        service.announce()
        try:
            await work_until(self.stopping, self._lead(client, service), self._speak(), self.autoscale.work())
        finally:
            service.stop()
            await self.ground.close()
        return self.status

    async def _stand(self, client: Client) -> Ground:
        spec = self.spec
        if spec.log == JETSTREAM:
            if await streams.has_stream(client, self.subjects.queue_stream):
                return await GuestGround.stand(client, self.subjects)
            folder = spec.folder if spec.alone else None
            return await JetStreamGround.stand(client, self.subjects, spec.replicas, spec.known, folder)
        return await OwnGround.stand(
            client, self.subjects, name=spec.log, folder=spec.folder, durability=spec.durability,
            replicas=spec.replicas, anew=spec.alone, master=master_from(spec.master),
        )  # fmt: skip

    # -- the registry

    async def _lead(self, client: Client, service: Service) -> None:
        """Hold the lease, bring the doors to what is registered, then take registrations until the lease is lost."""
        lease = Lease(client, self.subjects, "registrar", self.spec.name)
        if self.ground.guest:
            self.link.send({"state": "serving"})
            await self.ground.work()
        self.link.send({"state": "serving"})  # waiting for the lease is a service too
        await lease.acquire()
        try:
            await self._lead_under(lease, client, service)
        finally:
            await lease.release()

    async def _lead_under(self, lease: Lease, client: Client, service: Service) -> None:
        await self.ground.lead(service)
        await self._recall()
        self.keeper = Doorkeeper(
            self.ground, self.subjects, self.spec.marks, self.source, lambda: self.programs,
            lambda: self._set_doors([]),
        )  # fmt: skip
        await self.keeper.recall()
        await self._set_doors(list(self.programs))
        limiter = Limiter(self.log, self.subjects, self.source, self._say_reached)
        logtime.begin()  # a budget's day, and a bucket, must not jump with this machine's clock
        fresh = self.spec.alone and not self.life.restarts
        await limiter.recall(fresh=fresh)
        await limiter.configure(self.spec.limits, self.spec.limits_since, fresh=fresh)
        limiter.serve(service)
        service.serve(Endpoint("register", self.subjects.registry("register"), self._take, most=MAX_REGISTRATION))
        service.serve(Endpoint("guard", self.subjects.registry("guard.*"), self._tell))
        service.serve(Endpoint("register-own", self.subjects.registry("register.*"), self._take, most=MAX_REGISTRATION))
        started = AgentStarted(pid=os.getpid(), role=self.spec.role, restarts=self.life.restarts)
        name, began = aggregate("agent", self.spec.role, self.spec.name), time.monotonic()
        head = await record(self.log, name, [started], source=self.source)
        if entry := await self.log.entry(head.position):
            logtime.between(entry.time, began, time.monotonic())
        work = (
            self._register_all(), lease.keep(), self.ground.work(), self.keeper.work(), limiter.work(),
        )
        working = [asyncio.create_task(each) for each in work]
        try:
            done, _ = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in working:
                task.cancel()
        for task in done:
            task.result()
        logger.warning("%s cannot show that it still leads, and begins anew", self.spec.name)
        self.status = EXIT_RECYCLE

    async def _recall(self) -> None:
        after = 0
        while entries := await self.log.scan(after, 1000, self.subjects.event("program.*.0")):
            for entry in entries:
                for event in decode_commit(entry.body, entry.position):
                    if isinstance(event.data, ProgramRegistered):
                        self.programs[event.data.program] = event.data
            after = entries[-1].position

    async def _set_doors(self, named: list[str]) -> dict[str, float]:
        """Bring the doors to what is registered and not closed, and see to the consumers of those named. One at a time:
        an older decision must not overtake a newer one."""
        async with self.changing:
            programs = list(self.programs)
            return await self.ground.open_doors(programs, named, self.keeper.shut(programs))

    def _say_reached(self, reason: str) -> None:
        self.link.send({"event": "limit", "agent": self.spec.name, "reason": reason})

    def _tell(self, request: Request) -> None:
        """Say what is private of a program, which whoever submits to it has to know, and whether it takes tasks."""
        name = request.message.subject.rpartition(".")[2]
        known = self.programs.get(name)
        told = Told.of(known.input_schema, known.output_schema) if known else Told()
        told.closed = self.keeper.said(name) if known else ""
        request.respond(msgspec.json.encode(told))

    def _take(self, request: Request) -> None:
        try:
            wanted = msgspec.json.decode(request.data, type=_Registration)
        except NOT_JSON as error:
            raise InvalidInput(f"the registration is not understood: {error}") from None
        if not valid_token(wanted.registration.program):
            raise InvalidInput(f"{wanted.registration.program[:80]!r} cannot be a program's name")
        own = request.message.subject.removeprefix(self.subjects.registry("register")).removeprefix(".")
        if own and own != wanted.registration.program:
            raise InvalidInput(f"an agent of {own} cannot register {wanted.registration.program[:80]}")
        try:
            self.waiting.put_nowait((wanted, request))
        except asyncio.QueueFull:
            raise Unavailable(f"{MAX_WAITING:,} registrations wait already; try again") from None

    async def _register_all(self) -> None:
        """Take what waits, all at once: forty programs that start together cost one change of the stream."""
        while True:
            batch = [await self.waiting.get()]
            while not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            accepted: list[tuple[_Registration, Request]] = []
            fresh: list[str] = []
            for wanted, request in batch:
                try:
                    if await self._accept(wanted):
                        fresh.append(wanted.registration.program)
                    accepted.append((wanted, request))
                except Conflict as error:
                    request.fail(error)
                except LogError as error:
                    request.fail(Unavailable(str(error)))
            try:
                if accepted:  # also for those known before: somebody may have deleted a consumer
                    names = sorted({wanted.registration.program for wanted, _ in accepted})
                    made = await self._set_doors(names)
            except LogError as error:
                for name in fresh:
                    self.programs.pop(name, None)  # so that the next try opens the doors again
                for _, request in accepted:
                    request.fail(Unavailable(str(error)))
                continue
            for wanted, request in accepted:
                name = wanted.registration.program
                place = self.ground.registered(name, made[name])
                request.respond(msgspec.json.encode(place))

    async def _accept(self, wanted: _Registration) -> bool:
        """Whether the registration is new. Raises Conflict when the name has another schema."""
        program = wanted.registration
        known = self.programs.get(program.program)
        if known is not None and known.fingerprint == program.fingerprint:
            return False
        if known is not None and not wanted.replace:
            raise Conflict(
                f"{program.program} is registered with other schemas ({difference(known, program)}); choose another "
                "name, or start with --replace to let the new ones take over"
            )
        name = aggregate("program", program.program, 0)
        head = await head_of(self.log, name)
        result = await self.log.append(name, events_for(name, head, [program], source=self.source), head)
        if not isinstance(result, Appended):
            raise LogError(f"{program.program} was registered by somebody else at the same time; try again")
        self.programs[program.program] = program
        return True

    # -- the supervisor's voice

    def _hear(self, messages: list[dict[str, Any]]) -> None:
        for message in messages:
            if "processes" in message:
                self.processes = message["processes"]
            if "fleet" in message:
                self.supervisor, self.fleet = message["supervisor"], message["fleet"]
            if "answer" in message and self.control:
                self.control.hear(message)
            for notice in message.get("notices", ()):
                if notice["notice"] > self.noticed and not self.notices.full():
                    self.noticed = notice["notice"]
                    self.notices.put_nowait(notice)
        self._steer()

    def _steer(self) -> None:
        """Answer for the supervisor and its agents, and know how much they have to do."""
        if self.control and self.autoscale and self.supervisor:
            agents = [it["agent"] for it in self.processes if it["program"]]
            self.control.serve([self.supervisor, *agents])
            self.autoscale.hear(self.fleet)

    async def _speak(self) -> None:
        """Write into the log what the supervisor saw and did, each once."""
        while True:
            notice = await self.notices.get()
            name, event = _told_of(notice)
            while True:
                try:
                    if not await self._is_written(name, notice["id"]):
                        await record(self.log, name, [event], source=self.source, causation=notice["id"])
                    break
                except LogError as error:
                    logger.warning("%s could not write down what its supervisor saw: %s", self.spec.name, error)
                    await asyncio.sleep(0.5)
            self.link.send({"ack": notice["notice"]})

    async def _is_written(self, aggregate: str, notice: str) -> bool:
        """Whether a registrar before us wrote it down and died before it could say so."""
        if aggregate.startswith("fleet."):  # only their supervisor's voice writes them, one after the other
            last = await self.log.last(aggregate)
            entries = [last] if last else []
        else:
            entries = await self.log.read(aggregate)
        return any(
            event.causation == notice for entry in entries for event in decode_commit(entry.body, entry.position)
        )

    def _stats(self) -> dict[str, Any]:
        fleet = {"supervisor": self.supervisor, "fleet": self.fleet} if self.supervisor else {}
        return {"processes": self.processes, "programs": sorted(self.programs), **fleet}


def _told_of(notice: dict[str, Any]) -> tuple[str, Payload]:
    """The aggregate and the event that a notice of the supervisor is about: a death, one who was given up, or what was
    done with a program's agents."""
    if "aggregate" in notice:
        return notice["aggregate"], msgspec.convert(notice["data"], PAYLOADS[notice["type"]])
    name, reason = aggregate("agent", notice["kind"], notice["agent"]), notice["reason"]
    if notice.get("gave_up"):
        return name, AgentGaveUp(reason=reason, restarts=notice["restarts"])
    return name, AgentCrashed(pid=notice["pid"], reason=reason)


class _Schemas(Protocol):
    @property
    def input_schema(self) -> dict[str, Any]: ...

    @property
    def output_schema(self) -> dict[str, Any]: ...


def difference(old: _Schemas, new: _Schemas) -> str:
    """The first way in which the schemas of a program differ from those it had, in words."""
    for what, before, after in (
        ("input", old.input_schema, new.input_schema), ("output", old.output_schema, new.output_schema),
    ):  # fmt: skip
        mine, theirs = after.get("properties", {}), before.get("properties", {})
        for name in sorted(set(mine) ^ set(theirs)):
            return f"{what} field {name} is {'new' if name in mine else 'gone'}"
        for name in sorted(mine):
            if mine[name] != theirs[name]:
                return f"{what} field {name} has changed"
        if before != after:
            return f"the {what} has changed"
    return "the variables have changed"
