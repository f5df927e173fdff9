"""The archivist: the one process that has the archive open. It tails the log into it, and lets the log forget what is
archived when it is told to.

It serves as soon as it is connected, for nothing waits for the archive: what it has not written yet is in the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from dspex.agents.beside import Beside
from dspex.agents.bounds import Bounds
from dspex.agents.finding import Finding
from dspex.agents.forgetting import Forgetter
from dspex.agents.guards import can_erase
from dspex.agents.journal import record
from dspex.agents.link import Link
from dspex.agents.overdue import Overdue
from dspex.agents.pace import Pace
from dspex.agents.process import live, work_until
from dspex.agents.projecting import VIEWS, Projecting
from dspex.agents.registered import log_of, served_log
from dspex.agents.retention import Forgetting
from dspex.agents.supervisor import EXIT_RECYCLE, EXIT_REFUSED, Life
from dspex.agents.vault import Vault, master_from
from dspex.agents.veiled import VeiledLog
from dspex.bus import streams
from dspex.bus.client import Client
from dspex.bus.identity import subjects_of
from dspex.bus.lease import Lease
from dspex.bus.objects import NatsKeys, NatsObjects
from dspex.bus.service import Endpoint, Request, Service
from dspex.core.codec import NOT_JSON
from dspex.core.errors import DspexError, InvalidInput, LogCorrupt, LogError, Unavailable
from dspex.core.events import AgentStarted
from dspex.core.ports import Log
from dspex.core.subjects import aggregate
from dspex.store.archive import MAX_GROUP, Archive, set_aside
from dspex.store.chain import read_head
from dspex.store.jetstream import JetStreamLog
from dspex.store.mend import Mended, examine
from dspex.store.served import ServedLog
from dspex.store.verify import Report

__all__ = ["ARCHIVE", "ArchivistSpec", "archivist_main", "known_log"]

logger = logging.getLogger("dspex.agents")

ARCHIVE = "archive.db"
VERSION = "0.1.0"
MAX_WAITING = 16
NICE = 10
"""When the machine has no time for all, the programs come first: what is not archived yet waits in the log."""
LAST = 1.5
"""Seconds for what is archived when it is told to stop."""
SHARE = 0.1
"""The share of a core that archiving takes at most when others want it: some 7,000 messages a second."""
LOOK = 1.0
"""Seconds between looks at how far the log is ahead, and between tries after trouble."""


@dataclass(frozen=True)
class ArchivistSpec:
    """What an archivist is to be. `file` is the archive; nobody else opens it for writing. `served`: a log process owns
    the log; `is_log`: and `file` is that log, so that there are only views to keep."""

    name: str
    url: str
    file: Path
    prefix: str = "dspex"
    credentials: str | None = None
    replicas: int = 3
    bounds: Bounds = field(default_factory=Bounds)
    master: str = ""
    known: streams.Known | None = None
    served: bool = False
    is_log: bool = False


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    repair: bool = False
    against_log: bool = False


def known_log(file: Path) -> streams.Known | None:
    """What the head of an archive says of the log on our own server; None when there is none that can be read."""
    with suppress(LogCorrupt):
        head = read_head(file)
        return streams.Known(head.epoch, head.position) if head and head.position else None
    return None


def archivist_main(link: Link, life: Life, spec: ArchivistSpec) -> int:
    """Be an archivist until told to stop. Returns the exit status."""
    os.nice(NICE)
    return uvloop.run(_Archivist(link, life, spec).live())


class _Archivist:
    def __init__(self, link: Link, life: Life, spec: ArchivistSpec) -> None:
        self.link, self.life, self.spec = link, life, spec
        self.subjects = subjects_of(spec.prefix, spec.credentials)
        self.stopping = asyncio.Event()
        self.status = 0
        self.archive: Archive | None = None
        self.beside: Beside | None = None
        self.pace = Pace()
        self.projecting = Projecting(spec.file.with_name(VIEWS), self.subjects, self.pace)
        self.position = self.head = self.forgotten = 0
        self.leads = False
        self.back = asyncio.Event()
        self.trouble = ""
        self.jobs: asyncio.Queue[tuple[_Wanted, asyncio.Future[tuple[Report, Mended]]]] = asyncio.Queue(MAX_WAITING)

    async def live(self) -> int:
        spec = self.spec
        return await live(
            self.link, spec.name, spec.url, spec.credentials, stopping=self.stopping, serve=self._serve,
            stop=lambda why, grace: self.stopping.set(), hear=lambda messages: None,
        )  # fmt: skip

    async def _serve(self, client: Client) -> int:
        client.on_reconnect.append(self.back.set)  # a server that was away may have lost something
        self.link.send({"state": "serving"})
        try:
            log = await self._log(client)
        except LogCorrupt as error:
            self.link.send({"refused": str(error)})
            return EXIT_REFUSED
        await streams.ensure_stream(client, streams.lease_stream(self.subjects, self.spec.replicas))
        service = Service(
            client, name=f"{self.spec.prefix}-archivist", id=self.spec.name, version=VERSION,
            description="keeps the archive of the log", data=self._stats,
            metadata={"dspex": self.spec.prefix, "agent": self.spec.name},
        )  # fmt: skip
        service.announce()
        try:
            await work_until(self.stopping, self._lead(client, service, log), self._look(log))
        finally:
            service.stop()
        return self.status

    async def _log(self, client: Client) -> JetStreamLog | ServedLog:
        """The log, in JetStream or with a log process, which may be about to begin."""
        if self.spec.served:
            return await served_log(client, self.subjects)
        return await log_of(client, self.subjects, replicas=self.spec.replicas, known=self.spec.known)

    async def _lead(self, client: Client, service: Service, log: Log) -> None:
        """Hold the lease, and archive until it is lost."""
        lease = Lease(client, self.subjects, "archivist", self.spec.name)
        await lease.acquire()
        self.leads = True
        service.serve(Endpoint("archive-verify", self.subjects.archive("verify"), self._verify))
        forgetter = Forgetter(client, log, self.subjects, f"/archivist/{self.spec.name}", self)
        service.serve(Endpoint("privacy-forget", self.subjects.privacy("forget"), forgetter.forget))
        Finding(self.projecting, self.subjects, self._archived).serve(service)
        started = AgentStarted(pid=os.getpid(), role="archivist", restarts=self.life.restarts)
        name = aggregate("agent", "archivist", self.spec.name)
        await record(log, name, [started], source=f"/archivist/{self.spec.name}")
        keys, objects = NatsKeys(client, self.subjects), NatsObjects(client, self.subjects)
        veiled = VeiledLog(log, self.subjects, Vault(keys, objects, master=master_from(self.spec.master)))
        overdue = Overdue(self.projecting, client, log, self.subjects, f"/archivist/{self.spec.name}")
        working = [
            asyncio.create_task(work) for work in (self._archive(client, veiled), lease.keep(), overdue.go_on())
        ]
        try:
            done, _ = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in working:
                task.cancel()
            await asyncio.gather(*working, return_exceptions=True)
        logger.warning("%s cannot show that it still leads, and begins anew", self.spec.name)
        self.status = EXIT_RECYCLE

    # -- archiving

    async def _archive(self, client: Client, log: Log) -> None:
        """Follow the log; when that cannot be, say why and try again, and between tries do what is asked."""
        aside = None if self.spec.is_log else await asyncio.to_thread(set_aside, self.spec.file, log.epoch)
        if aside:
            logger.warning("%s was the archive of another log; it is kept as %s", self.spec.file, aside.name)
        while True:
            working = [asyncio.create_task(self._follow(client, log)), asyncio.create_task(self.jobs.get())]
            try:
                await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in working:
                    task.cancel()
                await asyncio.gather(*working, return_exceptions=True)
            job = working[1]
            if not job.cancelled():
                wanted, answer = job.result()  # type: ignore[misc]
                await self._work(client, log, wanted, answer)

    async def _follow(self, client: Client, log: Log) -> None:
        """Archive until the log or the file gives trouble; then wait a little."""
        archive: Archive | None = None
        try:
            is_log = self.spec.is_log
            archive = self.archive = await Archive.open(
                self.spec.file, epoch=log.epoch, subjects=self.subjects, readonly=is_log
            )
            self.back.clear()
            await archive.check(log)
            self.trouble = ""
            self.beside = Beside(client, self.subjects, log, archive)
            work = [
                self.projecting.go_on(archive), self.beside.go_on(),
                archive.watch() if is_log else archive.follow(log, self._rest),
            ]
            if can_erase(log):
                work.append(Forgetting(client, self.subjects, archive, self.spec.bounds, self._forgot).go_on())
            working = [asyncio.create_task(each) for each in (*work, self._until_back())]
            try:
                done, _ = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
                if self.back.is_set():
                    return
            finally:
                for task in working:
                    task.cancel()
                await asyncio.gather(*working, return_exceptions=True)
        except asyncio.CancelledError:
            if self.stopping.is_set() and archive is not None and not self.trouble and not self.spec.is_log:
                await self._last_group(archive, log)
            raise
        except LogError as error:
            if str(error) != self.trouble:
                logger.warning("%s archives nothing now: %s", self.spec.name, error)
            self.trouble = str(error)
        finally:
            if self.beside is not None:
                await self.beside.close()
                self.beside = None
            if archive is not None:
                self.position = archive.position
                await archive.close()
            self.archive = None
        await asyncio.sleep(LOOK)

    async def _last_group(self, archive: Archive, log: Log) -> None:
        """Told to stop, the agents have ended before us: what they wrote last is archived while the log is there."""
        with suppress(LogError, TimeoutError):
            async with asyncio.timeout(LAST):
                await archive.add(await log.scan(archive.position, MAX_GROUP), log)
                if self.beside is not None:
                    await self.beside.once()

    def _rest(self, cost: float) -> float:
        return self.pace.rest(cost, SHARE)

    async def _until_back(self) -> None:
        await self.back.wait()

    def _forgot(self, count: int) -> None:
        self.forgotten += count

    async def _look(self, log: Log) -> None:
        while True:
            try:
                self.head = await log.head()
            except LogError as error:
                logger.debug("the end of the log is not known: %s", error)
            await asyncio.sleep(LOOK)

    # -- what it is asked

    async def _verify(self, request: Request) -> None:
        try:
            wanted = msgspec.json.decode(request.data or b"{}", type=_Wanted)
        except NOT_JSON as error:
            raise InvalidInput(f"the request is not understood: {error}") from None
        answer: asyncio.Future[tuple[Report, Mended]] = asyncio.get_running_loop().create_future()
        try:
            self.jobs.put_nowait((wanted, answer))
        except asyncio.QueueFull:
            raise Unavailable(f"{MAX_WAITING} verifications wait already; try again") from None
        try:
            report, mended = await answer
        except LogError as error:
            raise Unavailable(str(error)) from None
        request.respond(msgspec.json.encode({"report": report, "mended": mended}))

    async def _work(
        self, client: Client, log: Log, wanted: _Wanted, answer: asyncio.Future[tuple[Report, Mended]]
    ) -> None:
        """Verify, while nobody writes; and mend, if that is wanted and needed."""
        try:
            restored = await streams.restored_to(client, self.subjects) if can_erase(log) else 0
            report, mended = await examine(
                self.spec.file, log, mend=wanted.repair, against_log=wanted.against_log, restored=restored
            )
        except (DspexError, OSError) as error:
            if not answer.done():
                answer.set_exception(LogError(str(error)))
        else:
            if not answer.done():
                answer.set_result((report, mended))

    # -- what it says

    def _archived(self) -> int:
        return self.archive.position if self.archive else self.position

    def _stats(self) -> dict[str, Any]:
        archive, position = self.archive, self._archived()
        return {
            "agent": self.spec.name, "program": None, "role": "archivist", "pid": os.getpid(), "state": "serving",
            "restarts": self.life.restarts, "lag": max(0, self.head - position), "position": position,
            "leads": self.leads, "forgotten": self.forgotten, "file": str(self.spec.file),
            "views": self.projecting.position,
            "trouble": (archive.trouble if archive else "") or self.trouble or self.projecting.trouble,
        }  # fmt: skip
