"""The log in one SQLite file: one writer, group commit, readers beside it.

Appends wait in a queue; one transaction takes all that wait, so one fsync pays for many. The decision whether
an append fits is made here from the heads, since no other process can write while we hold the file's lock.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import sqlite3
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import aiosqlite
import msgspec

from dspex.core.errors import LogError
from dspex.core.events import Event, Head
from dspex.core.ports import Appended, Conflict, Entry
from dspex.core.subjects import Subjects
from dspex.store.rules import MAX_PAYLOAD, SCAN_BYTES, commit_body, door_size, microseconds, subject_filter

__all__ = ["SqliteLog"]

Durability = Literal["power", "process"]
Row = tuple[int, int, str, int, str | None, bytes]

FORMAT = 1
APPLICATION_ID = 0x64737078  # "dspx"

_SCHEMA = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE log (position INTEGER PRIMARY KEY AUTOINCREMENT, time INTEGER NOT NULL,"
    " subject TEXT NOT NULL, version INTEGER NOT NULL, headers TEXT, body BLOB NOT NULL)",
    "CREATE INDEX log_subject ON log (subject, position)",
)
_INSERT = "INSERT INTO log (position, time, subject, version, headers, body) VALUES (?, ?, ?, ?, ?, ?)"
_SELECT = "SELECT position, time, subject, version, headers, body FROM log"
_HEADS = (
    "SELECT subject, version, MAX(position) FROM log WHERE subject IN (SELECT value FROM json_each(?)) GROUP BY subject"
)
_BATCH = 2000
_WAITING = 10_000
_WAITING_BYTES = 64 * 1024 * 1024
_HEADS_KEPT = 100_000
_NO_HEAD = Head()
_encode = msgspec.json.Encoder().encode
_decode_headers = msgspec.json.Decoder(dict[str, str]).decode


class _Write:
    """One append or door message that waits for its transaction. `expected` is None for a door message."""

    __slots__ = ("body", "done", "expected", "headers", "subject", "version")

    def __init__(
        self, subject: str, version: int, expected: Head | None, headers: str | None, body: bytes,
        done: asyncio.Future[Appended | Conflict],
    ) -> None:  # fmt: skip
        self.subject, self.version, self.expected = subject, version, expected
        self.headers, self.body, self.done = headers, body, done


class SqliteLog:
    """A log in a SQLite file. Make one with `await SqliteLog.open(path)`; use it in one event loop.

    `durability`: "power" is fsync before every acknowledgement, "process" survives any crash of ours but not
    of the machine. One process writes; others may open the same file with `readonly=True`.
    """

    def __init__(
        self, path: Path, writer: aiosqlite.Connection | None, reader: aiosqlite.Connection, lock: int | None,
        subjects: Subjects, max_payload: int,
    ) -> None:  # fmt: skip
        self._path, self._writer, self._reader, self._lock = path, writer, reader, lock
        self._subjects, self._max_payload = subjects, max_payload
        self._epoch = ""
        self._position = 0
        self._heads: dict[str, Head] = {}
        self._waiting: deque[_Write] = deque()
        self._waiting_bytes = 0
        self._work = asyncio.Event()
        self._room = asyncio.Event()
        self._grown = asyncio.Event()
        self._closed = False
        self._task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        path: Path | str,
        *,
        subjects: Subjects | None = None,
        durability: Durability = "power",
        readonly: bool = False,
        max_payload: int = MAX_PAYLOAD,
    ) -> SqliteLog:
        """Open the log at `path`, made anew when nothing is there (unless `readonly`).

        Raises LogError when the file is no log of ours, is written by another process, or cannot be used.
        """
        path = Path(path).absolute()  # noqa: ASYNC240 - asks nobody
        lock = None if readonly else _lock_file(path)
        opened: list[aiosqlite.Connection] = []
        try:
            if not readonly:
                opened.append(await aiosqlite.connect(path, isolation_level=None))
                await _prepare(opened[0], path, durability)
            elif not path.exists():
                raise LogError(f"there is no log at {path}")
            opened.append(await aiosqlite.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None))
            await opened[-1].execute("PRAGMA busy_timeout = 5000")
            log = cls(path, None if readonly else opened[0], opened[-1], lock, subjects or Subjects(), max_payload)
            await log._begin()
        except BaseException as error:
            for connection in opened:
                await connection.close()
            if lock is not None:
                os.close(lock)
            if isinstance(error, sqlite3.Error):
                raise LogError(f"cannot open the log {path}: {error}") from None
            raise
        return log

    @property
    def epoch(self) -> str:
        """Which log this is; a new file has another."""
        return self._epoch

    async def append(self, aggregate: str, events: Sequence[Event], expected: Head) -> Appended | Conflict:
        """Append one commit if the aggregate still stands at `expected`."""
        body = commit_body(aggregate, events, expected, self._max_payload)
        return await self._write(self._subjects.event(aggregate), events[-1].version, expected, None, body)

    async def store(self, subject: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Store a door message and return its position."""
        door_size(self._subjects, subject, body, headers, self._max_payload)
        packed = _encode(dict(headers)).decode() if headers else None
        return (await self._write(subject, 0, None, packed, body)).head.position

    async def read(self, aggregate: str) -> list[Entry]:
        """All commits of an aggregate, oldest first; never stale."""
        rows = await self._rows(f"{_SELECT} WHERE subject = ? ORDER BY position", (self._subjects.event(aggregate),))
        return [_entry(row) for row in rows]

    async def last(self, aggregate: str) -> Entry | None:
        """The newest commit of an aggregate; never stale."""
        return await self._one(
            f"{_SELECT} WHERE subject = ? ORDER BY position DESC LIMIT 1", self._subjects.event(aggregate)
        )

    async def entry(self, position: int) -> Entry | None:
        """What stands at a position; never stale."""
        return await self._one(f"{_SELECT} WHERE position = ?", position)

    async def scan(self, after: int, limit: int = 1000, subject: str | None = None) -> list[Entry]:
        """Up to `limit` entries behind position `after`, in order, without gaps."""
        matches = subject_filter(subject) if subject is not None else None
        where, more = "position > ?", ()  # type: str, tuple[str, ...]
        if subject is not None and subject != ">":
            exact = "*" not in subject and not subject.endswith(">")
            where += " AND subject = ?" if exact else " AND subject GLOB ?"
            more = (subject if exact else _glob(subject),)
        found: list[Entry] = []
        size = 0
        while len(found) < limit and size < SCAN_BYTES:
            want = min(limit - len(found), 256)
            rows = await self._rows(f"{_SELECT} WHERE {where} ORDER BY position LIMIT ?", (after, *more, want))
            for row in rows:
                if matches is None or matches(row[2]):
                    found.append(_entry(row))
                    size += len(row[5])
            if len(rows) < want:
                break
            after = rows[-1][0]
        return found

    async def holding(self, subject: str, text: str) -> list[Entry]:
        """The entries of one subject whose bodies hold some bytes, in order; found without making all the others."""
        where = "WHERE subject = ? AND instr(body, ?) > 0 ORDER BY position"
        return [_entry(row) for row in await self._rows(f"{_SELECT} {where}", (subject, text.encode()))]

    async def tail(self, after: int, subject: str | None = None) -> AsyncIterator[Entry]:
        """All entries behind `after` and then every new one; ends when the log is closed."""
        self._check()
        while not self._closed:
            grown = self._grown
            try:
                top = self._position if self._writer is not None else await self.head()
                entries = await self.scan(after, subject=subject)
            except LogError:
                if self._closed:
                    return
                raise
            for entry in entries:
                after = entry.position
                yield entry
            if not entries:
                after = max(after, top)  # what does not match is not looked at again
                await self._growth(grown)

    async def head(self) -> int:
        """The position of the newest entry; 0 when the log is empty."""
        return int((await self._rows("SELECT COALESCE(MAX(position), 0) FROM log", ()))[0][0])

    async def close(self) -> None:
        """Write what waits, end the tails, give the file back. Closing twice is fine."""
        if self._closing is None:
            self._closed = True
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    # -- opening and closing

    async def _begin(self) -> None:
        (application,), *_ = await self._rows("PRAGMA application_id", ())
        if application != APPLICATION_ID:
            raise LogError(f"{self._path} is no dspex log")
        meta = dict(await self._rows("SELECT name, value FROM meta", ()))
        if int(meta["format"]) > FORMAT:
            raise LogError(f"{self._path} has format {meta['format']} and this version reads up to {FORMAT}")
        self._epoch = meta["epoch"]
        if self._writer is not None:
            rows = await self._rows("SELECT seq FROM sqlite_sequence WHERE name = 'log'", ())
            self._position = rows[0][0] if rows else 0
            self._task = asyncio.create_task(self._work_on(self._writer), name=f"log {self._path.name}")

    async def _close(self) -> None:
        self._work.set()
        self._room.set()
        if self._task is not None:
            await self._task
        self._grown.set()
        await self._reader.close()
        if self._writer is not None:
            await self._writer.close()
        if self._lock is not None:
            os.close(self._lock)

    def _check(self) -> None:
        if self._closed:
            raise LogError(f"the log {self._path} is closed")

    # -- reading

    async def _rows(self, sql: str, parameters: tuple[object, ...]) -> list[Any]:
        self._check()
        try:
            return list(await self._reader.execute_fetchall(sql, parameters))
        except sqlite3.Error as error:
            raise LogError(f"cannot read the log {self._path}: {error}") from None
        except ValueError:  # aiosqlite's word for a connection that was closed meanwhile
            raise LogError(f"the log {self._path} is closed") from None

    async def _one(self, sql: str, parameter: object) -> Entry | None:
        rows = await self._rows(sql, (parameter,))
        return _entry(rows[0]) if rows else None

    async def _growth(self, grown: asyncio.Event) -> None:
        if self._writer is not None:
            await grown.wait()
            return
        with suppress(TimeoutError):  # another process writes, and cannot tell us
            await asyncio.wait_for(grown.wait(), 0.2)

    # -- writing

    async def _write(
        self, subject: str, version: int, expected: Head | None, headers: str | None, body: bytes
    ) -> Appended | Conflict:
        while len(self._waiting) >= _WAITING or self._waiting_bytes >= _WAITING_BYTES:
            self._check()
            self._room.clear()
            await self._room.wait()
        self._check()
        if self._task is None or self._task.done():
            raise LogError(f"the log {self._path} is open for reading only")
        done: asyncio.Future[Appended | Conflict] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Write(subject, version, expected, headers, body, done))
        self._waiting_bytes += len(body)
        self._work.set()
        return await done

    async def _work_on(self, writer: aiosqlite.Connection) -> None:
        while self._waiting or not self._closed:
            if not self._waiting:
                self._work.clear()
                await self._work.wait()
                continue
            batch: list[_Write] = []
            while self._waiting and len(batch) < _BATCH:
                write = self._waiting.popleft()
                self._waiting_bytes -= len(write.body)
                if not write.done.done():
                    batch.append(write)
            self._room.set()
            if batch:
                await self._commit_or_split(writer, batch)

    async def _commit_or_split(self, writer: aiosqlite.Connection, batch: list[_Write]) -> None:
        """Commit together; when that fails (disk full, I/O error), one by one, so that each gets its own
        answer."""
        try:
            await self._commit(writer, batch)
        except (sqlite3.Error, LogError) as error:
            with suppress(sqlite3.Error):
                if writer.in_transaction:
                    await writer.rollback()
            self._heads.clear()
            if len(batch) > 1:
                for write in batch:
                    await self._commit_or_split(writer, [write])
            elif not batch[0].done.done():
                batch[0].done.set_exception(LogError(f"cannot write the log {self._path}: {error}"))
        except BaseException as error:
            for write in batch:
                if not write.done.done():
                    write.done.set_exception(LogError(f"the log's writer failed: {error!r}"))
            raise

    async def _commit(self, writer: aiosqlite.Connection, batch: list[_Write]) -> None:
        await self._load_heads(writer, batch)
        now = time.time_ns() // 1000
        heads: dict[str, Head] = {}
        bodies: dict[int, bytes] = {}
        rows: list[tuple[object, ...]] = []
        results: list[Appended | Conflict] = []
        position = self._position
        for write in batch:
            if write.expected is not None:
                head = heads.get(write.subject) or self._heads.get(write.subject, _NO_HEAD)
                if head != write.expected:
                    again = head.version == write.version and await _body(writer, bodies, head.position) == write.body
                    results.append(Appended(head) if again else Conflict(head))
                    continue
            position += 1
            head = Head(write.version, position)
            rows.append((position, now, write.subject, write.version, write.headers, write.body))
            bodies[position] = write.body
            results.append(Appended(head))
            if write.expected is not None:
                heads[write.subject] = head
        if rows:
            await writer.execute("BEGIN IMMEDIATE")
            await writer.executemany(_INSERT, rows)
            await writer.execute("COMMIT")
            self._position = position
            self._heads.update(heads)
        for write, result in zip(batch, results, strict=True):
            if not write.done.done():
                write.done.set_result(result)
        if rows:
            grown, self._grown = self._grown, asyncio.Event()
            grown.set()

    async def _load_heads(self, writer: aiosqlite.Connection, batch: Iterable[_Write]) -> None:
        if len(self._heads) > _HEADS_KEPT:
            self._heads.clear()
        unknown = {w.subject for w in batch if w.expected is not None and w.subject not in self._heads}
        if unknown:
            self._heads.update(dict.fromkeys(unknown, _NO_HEAD))
            for subject, version, position in await writer.execute_fetchall(_HEADS, (_encode(list(unknown)).decode(),)):
                self._heads[subject] = Head(version, position)


async def _body(writer: aiosqlite.Connection, known: dict[int, bytes], position: int) -> bytes | None:
    if position not in known:
        for (body,) in await writer.execute_fetchall("SELECT body FROM log WHERE position = ?", (position,)):
            known[position] = body
    return known.get(position)


async def _prepare(writer: aiosqlite.Connection, path: Path, durability: Durability) -> None:
    """Make a new file a log, refuse a foreign one before anything in it is changed, and set the pragmas."""

    async def value(sql: str) -> Any:
        return next(iter(await writer.execute_fetchall(sql)))[0]

    tables = await value("SELECT COUNT(*) FROM sqlite_master")
    if await value("PRAGMA application_id") != APPLICATION_ID and tables:
        raise LogError(f"{path} is no dspex log")
    await writer.execute_fetchall("PRAGMA journal_mode = WAL")
    await writer.execute(f"PRAGMA synchronous = {'FULL' if durability == 'power' else 'NORMAL'}")
    await writer.execute("PRAGMA fullfsync = 1" if durability == "power" else "PRAGMA fullfsync = 0")
    await writer.execute_fetchall("PRAGMA busy_timeout = 5000")
    if not tables:
        await writer.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA:
            await writer.execute(statement)
        await writer.executemany(
            "INSERT INTO meta VALUES (?, ?)", [("epoch", uuid.uuid4().hex), ("format", str(FORMAT))]
        )
        await writer.execute("COMMIT")


def _lock_file(path: Path) -> int:
    """One writer a file, across processes and within one. The lock goes with the process, however it ends."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise LogError(f"cannot write the log {path}: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise LogError(f"the log {path} is already open for writing in process {holder}") from None
    with suppress(OSError):  # a full disk must not keep the log from being opened
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _entry(row: Row) -> Entry:
    headers = _decode_headers(row[4]) if row[4] else {}
    return Entry(position=row[0], time=microseconds(row[1]), subject=row[2], body=row[5], headers=headers)


def _glob(pattern: str) -> str:
    """A GLOB that every match of the filter satisfies; the filter itself decides."""
    tokens = ["*" if token in ("*", ">") else token for token in pattern.split(".")]
    return ".".join(tokens).replace("[", "[[]").replace("?", "[?]")
