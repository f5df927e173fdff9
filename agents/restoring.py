"""A JetStream log rebuilt from an archive: the same positions, the same epoch.

While it is rebuilt the stream has no epoch, so that no system takes a half of it for the log; a restore that was cut
off begins again. A gap is filled with messages that are deleted at the end: a stream gives no position away twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec

from dspex.agents.beside import put_back
from dspex.bus.client import Client
from dspex.bus.streams import EPOCH, RESTORED, jetstream_api, log_stream, set_doors
from dspex.core.codec import decode_commit
from dspex.core.errors import ConnectionFailed, LogCorrupt, LogError
from dspex.core.events import ProgramRegistered
from dspex.core.ports import Entry
from dspex.core.subjects import STORED_DOORS, Subjects
from dspex.store.archive import Archive
from dspex.store.verify import verify

__all__ = ["keep_positions", "restore"]

RESTORING = "dspex.restoring"
FILLER = "restore.filler.0"
IN_FLIGHT = 512
WINDOW = 0.1
"""Seconds in which the server takes the same `Nats-Msg-Id` for the same message; the shortest it allows."""
NO_STREAM = 10059


async def restore(
    file: Path, client: Client, subjects: Subjects, *, replicas: int = 3,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:  # fmt: skip
    """Rebuild the log from the archive `file` and return its last position. Raises LogError when the archive is not
    right, and when there is a log already."""
    report = await asyncio.to_thread(verify, file)
    if report.first:
        raise LogError(f"{file} is not right, so no log is made of it: {report.first.what}; `dspex verify` says more")
    archive = await Archive.open(file, readonly=True, subjects=subjects)
    try:
        await put_back(archive, client, subjects)  # first: who comes to a task finds what its events name
        rebuilding = _Rebuilding(archive, client, subjects, replicas)
        return await rebuilding.all(on_progress or (lambda done, top: None))
    finally:
        await archive.close()


async def keep_positions(url: str, subjects: Subjects, top: int, credentials: str | None = None) -> int:
    """Bring the log's end to `top` and return how many positions that leaves empty: they were given once, so nobody may
    get them again. What stands there meanwhile is taken out at the end. The consumers may have had acknowledgements for
    what the log has lost, the end of a task for one: they are deleted, and made again by the next registration. Raises
    LogError."""
    filler, filled = subjects.event(FILLER), 0
    async with await Client.connect(url, name="dspex positions", wait=10.0, credentials=credentials) as client:
        while (end := await _end_of(client, subjects)) < top:
            count = min(top - end, IN_FLIGHT)
            await asyncio.gather(*(client.request(filler, b"", timeout=30.0) for _ in range(count)))
            filled += count
        answer = await jetstream_api(client, f"STREAM.PURGE.{subjects.stream}", {"filter": filler}, timeout=60.0)
        if "error" in answer:
            raise LogError(f"JetStream refused to forget {filler}: {answer['error'].get('description', '')}")
        while names := (await jetstream_api(client, f"CONSUMER.NAMES.{subjects.stream}")).get("consumers"):
            for name in names:
                await jetstream_api(client, f"CONSUMER.DELETE.{subjects.stream}.{name}")
    return filled


async def _end_of(client: Client, subjects: Subjects) -> int:
    info = await jetstream_api(client, f"STREAM.INFO.{subjects.stream}")
    if "error" in info:
        raise LogError(f"JetStream cannot be asked for {subjects.stream}: {info['error'].get('description', '')}")
    return int(info["state"]["last_seq"])


class _Rebuilding:
    def __init__(self, archive: Archive, client: Client, subjects: Subjects, replicas: int) -> None:
        self.archive, self.client, self.subjects, self.replicas = archive, client, subjects, replicas
        self.filler = subjects.event(FILLER)
        self.programs: set[str] = set()
        self.recent: dict[str, float] = {}
        self.under_way: list[tuple[int, asyncio.Future[object]]] = []

    async def all(self, on_progress: Callable[[int, int], None]) -> int:
        top = await self.archive.head()
        first = await self.archive.scan(0, 1)
        if not first:
            raise LogError(f"{self.archive.file} is empty: there is nothing to restore")
        await self._begin(first[0].position)
        position = first[0].position - 1
        while entries := await self.archive.scan(position, 1000):
            for entry in entries:
                while position + 1 < entry.position:
                    position += 1
                    await self._send(position, self.filler, b"", {})
                await self._send_entry(entry)
                position = entry.position
            on_progress(position, top)
        await self._settle()
        await self._end(position)
        return position

    async def _begin(self, first: int) -> None:
        """An empty stream that begins at `first` and takes every door."""
        name = self.subjects.stream
        info = await jetstream_api(self.client, f"STREAM.INFO.{name}")
        if "error" not in info:
            if RESTORING not in info["config"].get("metadata", {}):
                raise LogError(
                    f"there is a log {name} already, of {info['state']['messages']:,} messages; a log is only restored "
                    "where there is none"
                )
            await self._api(f"STREAM.DELETE.{name}", None)
        elif info["error"].get("err_code") != NO_STREAM:
            raise LogError(f"JetStream cannot be asked for {name}: {info['error'].get('description', '')}")
        doors = [f"{self.subjects.prefix}.{door}.>" for door in STORED_DOORS]
        config = log_stream(self.subjects, (), self.replicas) | {
            "subjects": [self.subjects.events, *doors], "first_seq": first,
            "duplicate_window": int(WINDOW * 1e9), "metadata": {RESTORING: self.archive.epoch},
        }  # fmt: skip
        answer = await jetstream_api(self.client, f"STREAM.CREATE.{name}", config)
        if "error" in answer and self.replicas > 1:
            config["num_replicas"] = 1
            answer = await jetstream_api(self.client, f"STREAM.CREATE.{name}", config)
        if "error" in answer:
            raise LogError(f"JetStream refused the stream {name}: {answer['error'].get('description', '')}")

    async def _send_entry(self, entry: Entry) -> None:
        if entry.subject.startswith(self.subjects.event("program.")):
            try:
                for event in decode_commit(entry.body, entry.position):
                    if isinstance(event.data, ProgramRegistered):
                        self.programs.add(event.data.program)
            except LogCorrupt:
                pass  # it is restored as it was archived; no door is opened for what cannot be read
        mark = next((value for name, value in entry.headers.items() if name.lower() == "nats-msg-id"), None)
        if mark is not None:
            now = asyncio.get_running_loop().time()
            if now - self.recent.get(mark, -1e9) < 4 * WINDOW:
                await self._settle()
                await asyncio.sleep(2 * WINDOW)
            self.recent[mark] = asyncio.get_running_loop().time()
            if len(self.recent) > 100_000:
                self.recent = {name: when for name, when in self.recent.items() if now - when < 4 * WINDOW}
        await self._send(entry.position, entry.subject, entry.body, entry.headers)

    async def _send(self, position: int, subject: str, body: bytes, headers: dict[str, str]) -> None:
        try:
            future = self.client.call(subject, body, headers=headers or None, timeout=30.0)
        except (ConnectionFailed, ValueError) as error:
            raise LogError(f"position {position} could not be restored: {error}") from None
        self.under_way.append((position, future))  # type: ignore[arg-type]
        if len(self.under_way) >= IN_FLIGHT:
            await self._settle()

    async def _settle(self) -> None:
        """Wait for what is under way; every message must stand where it stood."""
        for position, future in self.under_way:
            try:
                reply = await future
                answer = msgspec.json.decode(reply.data) if reply.data else {}  # type: ignore[attr-defined]
            except (TimeoutError, ConnectionFailed, msgspec.DecodeError) as error:
                why = str(error) or "no answer"
                raise LogError(f"position {position} could not be restored: {why}; start again") from None
            if answer.get("seq") != position or answer.get("duplicate"):
                why = answer.get("error", {}).get("description") or f"it came to {answer.get('seq')}"
                raise LogError(f"position {position} could not be restored where it was: {why}")
        self.under_way.clear()

    async def _end(self, position: int) -> None:
        """Take the fillers out, and make the stream the log."""
        name = self.subjects.stream
        await self._api(f"STREAM.PURGE.{name}", {"filter": self.filler})
        info = await jetstream_api(self.client, f"STREAM.INFO.{name}")
        if info["state"]["last_seq"] != position:
            raise LogError(f"the restored log ends at {info['state']['last_seq']} and not at {position}")
        config = log_stream(self.subjects, self.programs, info["config"]["num_replicas"])
        metadata = {EPOCH: self.archive.epoch, RESTORED: str(position)}
        await self._api(f"STREAM.UPDATE.{name}", info["config"] | config | {"metadata": metadata})
        await set_doors(self.client, self.subjects, self.programs)

    async def _api(self, verb: str, what: object) -> None:
        answer = await jetstream_api(self.client, verb, what, timeout=60.0)
        if "error" in answer:
            raise LogError(f"JetStream refused {verb}: {answer['error'].get('description', 'no reason given')}")
