"""What a registrar stands on: a log in JetStream, or one that its own process owns.

Both give a log to write to, open the doors of programs, and say to agents where their tasks are. A registrar whose
system only adds agents to a log that another system's process owns is a guest there.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Literal, Protocol

from dspex.agents.host import Host
from dspex.agents.keeping import Keeping
from dspex.agents.queue import Queue
from dspex.agents.reader import Reader
from dspex.agents.registered import Registered, served_log
from dspex.agents.rows import Rows
from dspex.agents.timers import rearm
from dspex.agents.vault import Vault
from dspex.agents.veiled import guard_in
from dspex.bus import streams
from dspex.bus.client import Client
from dspex.bus.objects import NatsKeys, NatsObjects, ensure_aside, erase_message
from dspex.bus.service import Service
from dspex.core.doors import Level
from dspex.core.errors import ConfigurationError, LogError
from dspex.core.ports import Backend, Log
from dspex.core.subjects import Subjects
from dspex.store.backends import JETSTREAM, LOG_FILE, factory_of
from dspex.store.jetstream import JetStreamLog
from dspex.store.served import ENVELOPE, ServedLog

__all__ = ["Ground", "GuestGround", "JetStreamGround", "OwnGround"]

logger = logging.getLogger("dspex.agents")


class Ground(Protocol):
    """Where a log is, and how programs get their doors there. A `guest` never leads."""

    @property
    def guest(self) -> bool: ...

    @property
    def queued(self) -> bool:
        """Whether agents get their tasks from a log process's queue."""

    @property
    def log(self) -> Log:
        """The log, to write to as everybody does."""

    def held(self, program: str) -> int:
        """How many tasks and signals of a program wait here for room in the queue."""

    def read(self, service: Service) -> None:
        """Serve the log's doors, if anybody may at any time."""

    async def lead(self, service: Service) -> None:
        """The lease is ours: from now on we alone may change anything."""

    async def open_doors(
        self, programs: list[str], named: list[str], shut: Collection[tuple[str, str]] = ()
    ) -> dict[str, float]:
        """Bring the doors to exactly `programs` but those that are `shut` (door, program), and the consumers of those
        `named`; when their consumers of tasks were made. Raises LogError."""

    async def level(self) -> Level | None:
        """How full the log is; None when that is none of our business. Raises LogError."""

    async def waiting(self, program: str) -> int:
        """How many tasks of a program wait or run. Raises LogError."""

    def registered(self, program: str, since: float) -> Registered:
        """What the agents of a program have to know; its consumer was made at `since`."""

    async def work(self) -> None:
        """What has to be done all the time while we lead."""

    async def close(self) -> None: ...


class JetStreamGround:
    """The log in JetStream: the server keeps it, the doors are the stream's subjects."""

    guest = queued = False

    def __init__(
        self, client: Client, subjects: Subjects, log: JetStreamLog, restored: int, replicas: int, folder: Path | None
    ) -> None:
        self._folder = folder
        self._client, self._subjects, self._restored, self._replicas = client, subjects, restored, replicas
        self._split = False
        self.log: Log = log

    @classmethod
    async def stand(
        cls, client: Client, subjects: Subjects, replicas: int, known: streams.Known | None, folder: Path | None = None
    ) -> JetStreamGround:
        """Make the streams unless they are there. `folder` is on the disk of the server, when that is ours.

        Raises LogError, LogCorrupt when the log that is `known` is gone."""
        epoch = await streams.ensure_log(client, subjects, replicas=replicas, known=known)
        restored = await streams.restored_to(client, subjects)
        if subjects.tenants:  # each program gets timers of its own when its doors are opened
            await streams.shorten_memory(client, subjects)
            await streams.ensure_stream(client, streams.lease_stream(subjects, replicas))
        else:
            await _make_common(client, subjects, replicas)
        return cls(client, subjects, JetStreamLog(client, subjects, epoch), restored, replicas, folder)

    def held(self, program: str) -> int:
        return 0

    def read(self, service: Service) -> None:
        Reader(self._client, self.log, self._subjects, service)
        if self._subjects.tenants:
            Rows(self.log, self._subjects, service, self._client.max_payload, self._erase)

    async def _erase(self, position: int) -> None:
        await erase_message(self._client, self._subjects.stream, position)

    async def lead(self, service: Service) -> None:
        pass

    async def open_doors(
        self, programs: list[str], named: list[str], shut: Collection[tuple[str, str]] = ()
    ) -> dict[str, float]:
        await streams.set_doors(self._client, self._subjects, programs, shut)
        if self._subjects.tenants:
            if not self._split:
                await streams.split_timers(self._client, self._subjects, programs)
                self._split = True
            for name in named:
                await streams.ensure_stream(
                    self._client, streams.timer_stream(self._subjects, self._replicas, name)
                )
                await ensure_aside(self._client, self._subjects, name, self._replicas)
        return await _consumers(self._client, self._subjects, named, queued=False)

    async def level(self) -> Level | None:
        used = await streams.log_bytes(self._client, self._subjects)
        if self._folder is None:
            return Level(used, await streams.storage_left(self._client))
        return _on_disk(used, self._folder)

    async def waiting(self, program: str) -> int:
        return await streams.tasks_at(self._client, self._subjects, program)

    def registered(self, program: str, since: float) -> Registered:
        return Registered(
            epoch=self.log.epoch, stream=self._subjects.stream, consumer=streams.consumer_name(program),
            restored=self._restored, since=since,
        )  # fmt: skip

    async def work(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        await self.log.close()


class GuestGround:
    """A log that another system's process owns: agents of ours work on it, and that is all."""

    guest = queued = True

    def __init__(self, log: ServedLog) -> None:
        self.log = log

    @classmethod
    async def stand(cls, client: Client, subjects: Subjects) -> GuestGround:
        """Find out which log it is, as soon as its process answers."""
        return cls(await served_log(client, subjects))

    def held(self, program: str) -> int:
        return 0

    def read(self, service: Service) -> None:
        pass

    async def lead(self, service: Service) -> None:
        raise AssertionError("a guest never leads")

    async def open_doors(
        self, programs: list[str], named: list[str], shut: Collection[tuple[str, str]] = ()
    ) -> dict[str, float]:
        raise AssertionError("a guest never leads")

    async def level(self) -> Level | None:
        raise AssertionError("a guest never leads")

    async def waiting(self, program: str) -> int:
        raise AssertionError("a guest never leads")

    def registered(self, program: str, since: float) -> Registered:
        raise AssertionError("a guest never leads")

    async def work(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        await self.log.close()


class OwnGround:
    """A log that this process owns; the doors are its subscriptions, and a queue in JetStream feeds the agents."""

    guest = False
    queued = True

    def __init__(
        self, client: Client, subjects: Subjects, own: Backend, name: str, folder: Path, replicas: int, anew: bool,
        master: bytes,
    ) -> None:  # fmt: skip
        self._client, self._subjects, self._own, self._name, self._folder = client, subjects, own, name, folder
        self._replicas, self._anew = 1 if anew else replicas, anew
        # What is written here goes the way of everybody's, so that whoever listens on the bus sees it.
        self.log: Log = ServedLog(client, subjects, own.epoch)
        self._keeping = Keeping(own, subjects, folder / f"{name}.open")
        standing = self._keeping.standing
        self._queue = Queue(client, own, subjects, standing)
        vault = Vault(NatsKeys(client, subjects, replicas), NatsObjects(client, subjects, replicas), master=master)
        self._host = Host(client, own, subjects, standing, self._queue, vault)
        self._programs: list[str] = []
        self._back = asyncio.Event()

    @classmethod
    async def stand(
        cls, client: Client, subjects: Subjects, *, name: str, folder: Path,
        durability: Literal["power", "process"], replicas: int, anew: bool = False, master: bytes = b"",
    ) -> OwnGround:  # fmt: skip
        """Open the log. `anew`: the server is ours alone, and what it has of another log may go. Raises LogError,
        ConfigurationError when another log serves here."""
        if await streams.has_stream(client, subjects.stream):
            raise ConfigurationError(
                f"the log of {subjects.prefix} on this server is in JetStream; start with --log {JETSTREAM}, or choose "
                "another --prefix or data folder"
            )
        room = client.max_payload - ENVELOPE
        own = await factory_of(name)(folder, subjects=subjects, durability=durability, max_payload=room)
        try:
            await _make_common(client, subjects, replicas)
        except BaseException:
            await own.close()
            raise
        return cls(client, subjects, own, name, folder, replicas, anew, master)

    def held(self, program: str) -> int:
        return self._queue.waiting_for(program)

    def read(self, service: Service) -> None:
        pass

    async def lead(self, service: Service) -> None:
        await self._ensure_queue()
        await self._keeping.recall()
        Reader(self._client, self._own, self._subjects, service, self._name)
        Rows(self._own, self._subjects, service, self._client.max_payload)
        self._host.listen(await self._own.head())
        self._client.on_reconnect.append(self._back.set)
        self._back.set()

    async def open_doors(
        self, programs: list[str], named: list[str], shut: Collection[tuple[str, str]] = ()
    ) -> dict[str, float]:
        made = await _consumers(self._client, self._subjects, named, queued=True)
        self._programs = list(programs)
        self._host.open_doors({program: await guard_in(self._own, program) for program in programs}, shut)
        await self._client.flush()
        return made

    async def level(self) -> Level | None:
        return _on_disk(None, self._folder)

    async def waiting(self, program: str) -> int:
        return self._keeping.standing.waiting[program]

    def registered(self, program: str, since: float) -> Registered:
        return Registered(
            epoch=self._own.epoch, stream=self._subjects.queue_stream, consumer=streams.consumer_name(program),
            since=since, served=True,
        )  # fmt: skip

    async def work(self) -> None:
        await asyncio.gather(self._queue.work(), self._keeping.work(), self._refill())

    async def close(self) -> None:
        await self.log.close()
        await self._own.close()
        await self._keeping.keep()

    async def _ensure_queue(self) -> None:
        await streams.ensure_queue(
            self._client, self._subjects, self._own.epoch, replicas=self._replicas, anew=self._anew
        )

    async def _refill(self) -> None:
        """At the start, and whenever the server comes back: see that it has what it must have, and fill it."""
        while True:
            await self._back.wait()
            self._back.clear()
            try:
                await _make_common(self._client, self._subjects, self._replicas)
                await self._ensure_queue()
                await _consumers(self._client, self._subjects, self._programs, queued=True)
                self._queue.fill()
                await rearm(self._client, self._own, self._subjects, self._keeping.standing)
            except LogError as error:
                logger.warning("what the log knows could not be told to the server; trying again: %s", error)
                self._back.set()
                await asyncio.sleep(0.5)


def _on_disk(used: int | None, folder: Path) -> Level:
    """The level of a log with so many bytes, or of the one in a file there."""
    try:
        disk = shutil.disk_usage(folder)
        if used is None:
            used = sum(file.stat().st_size for file in folder.glob(f"{LOG_FILE}*"))
    except OSError as error:
        raise LogError(f"how full the disk of {folder} is cannot be seen: {error}") from None
    return Level(used, disk.free, disk.total)


async def _make_common(client: Client, subjects: Subjects, replicas: int) -> None:
    await streams.ensure_stream(client, streams.lease_stream(subjects, replicas))
    await streams.ensure_stream(client, streams.timer_stream(subjects, replicas))


async def _consumers(client: Client, subjects: Subjects, programs: list[str], *, queued: bool) -> dict[str, float]:
    made: list[float] = []
    for start in range(0, len(programs), 64):
        some = programs[start : start + 64]
        made += await asyncio.gather(
            *(streams.ensure_consumers(client, subjects, name, queued=queued) for name in some)
        )
    return dict(zip(programs, made, strict=True))
