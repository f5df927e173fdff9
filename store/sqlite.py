"""The log in one SQLite file: one writer, group commit, readers beside it.

The file is an archive's: the same table, the same chain of checksums, the same head beside it. So what reads, verifies
or copies an archive does the same with a log, and a copied archive is a log to go on with.

Writes wait in a queue; one transaction takes all that wait, so one flush pays for many rows. Whether a write fits is
decided here from the positions, since no other process can write while we hold the file's lock.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Literal, Self

import msgspec

from dspex.core.errors import LogCorrupt, LogError
from dspex.core.events import Event, Head
from dspex.core.ports import Appended, Conflict, Entry, Stored, Taken
from dspex.core.subjects import Subjects
from dspex.store.archive import INSERT, Archive
from dspex.store.chain import EMPTY, GAP, ArchiveHead, Gap, Row, chained, gap_row, packed, read_head, write_head
from dspex.store.reading import connect
from dspex.store.rules import MAX_PAYLOAD, commit_body, door_size, head_of, microseconds

__all__ = ["Durability", "SqliteLog"]

logger = logging.getLogger("dspex.store")

Durability = Literal["power", "process"]

LOST = "they were lost with the machine's power: the log was kept with durability process"
HEAD_EVERY = 1.0
"""Seconds between heads: so much of the tail may be cut unseen."""
BATCH = 2000
WAITING = 10_000
WAITING_BYTES = 64 * 1024 * 1024
HEADS_KEPT = 100_000
_HEADS = (
    "SELECT subject, MAX(position) FROM log WHERE subject IN (SELECT value FROM json_each(?)) GROUP BY subject"
)
_encode = msgspec.json.Encoder().encode


class _Put:
    """One row that waits for its transaction. `expected` is None for what may stand anywhere."""

    __slots__ = ("body", "done", "expected", "headers", "subject")

    def __init__(
        self, subject: str, body: bytes, headers: str | None, expected: int | None,
        done: asyncio.Future[Stored | Taken],
    ) -> None:  # fmt: skip
        self.subject, self.body, self.headers, self.expected, self.done = subject, body, headers, expected, done


class SqliteLog(Archive):
    """A log in a SQLite file. Make one with `await SqliteLog.open(path)`; use it in one event loop.

    `durability`: "power" is a flush to disk before every acknowledgement, "process" survives any crash of ours but not
    of the machine. One process writes; others may open the same file with `readonly=True`.
    """

    durability: Durability = "power"
    _writer: sqlite3.Connection | None = None
    _max_payload = MAX_PAYLOAD

    @classmethod
    async def open(
        cls, file: Path | str, *, epoch: str = "", readonly: bool = False, subjects: Subjects | None = None,
        durability: Durability = "power", max_payload: int = MAX_PAYLOAD,
    ) -> Self:  # fmt: skip
        """Open the log at `file`, made anew when nothing is there (unless `readonly`).

        Raises LogError when the file is no log of ours, is written by another process, or cannot be used; LogCorrupt
        when rows are gone that the head beside it knows of.
        """
        log = await super().open(file, epoch=epoch or uuid.uuid4().hex, readonly=readonly, subjects=subjects)
        log.durability, log._max_payload = durability, max_payload
        if not readonly:
            try:
                await asyncio.to_thread(log._begin_writing)
            except BaseException as error:
                await log.close()
                if isinstance(error, sqlite3.Error | OSError):
                    raise LogError(f"cannot open {log.file}: {error}") from None
                raise
            log._task = asyncio.create_task(log._work_on(), name=f"log {log.file.name}")
        return log

    def _setup(self) -> None:
        self._heads: dict[str, int] = {}
        self._waiting: deque[_Put] = deque()
        self._waiting_bytes = 0
        self._work, self._room, self._grown = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._ending = False
        self._task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="dspex-log")
        self._head_due = 0.0
        self._clock = self._head_at = 0

    # -- writing

    async def append(self, aggregate: str, events: Sequence[Event], expected: Head) -> Appended | Conflict:
        """Append one commit if the aggregate still stands at `expected`."""
        body = commit_body(aggregate, events, expected, self._max_payload)
        await self._has_room()
        found = await self.put(self._subjects.event(aggregate), body, {}, expected.position)
        if isinstance(found, Stored):
            return Appended(Head(events[-1].version, found.position))
        last = await self.entry(found.position)
        if last is None:
            return Conflict(Head())
        if last.body == body:
            return Appended(Head(events[-1].version, last.position))
        return Conflict(head_of(last.body, last.position))

    async def store(self, subject: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Store a door message and return its position."""
        door_size(self._subjects, subject, body, headers, self._max_payload)
        await self._has_room()
        return (await self.put(subject, body, headers)).position

    def put(
        self, subject: str, body: bytes, headers: Mapping[str, str], expected: int | None = None
    ) -> asyncio.Future[Stored | Taken]:
        """Write these bytes as they are; what comes of it is known when it is on disk."""
        self._check()
        if self._task is None or self._task.done():
            raise LogError(f"the log {self.file} is open for reading only")
        if self._is_full():
            raise LogError(f"the log {self.file} has no time: {WAITING:,} writes wait already")
        done: asyncio.Future[Stored | Taken] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Put(subject, body, packed(headers), expected, done))
        self._waiting_bytes += len(body)
        self._work.set()
        return done

    def _is_full(self) -> bool:
        return len(self._waiting) >= WAITING or self._waiting_bytes >= WAITING_BYTES

    async def _has_room(self) -> None:
        while self._is_full():
            self._check()
            self._room.clear()
            await self._room.wait()

    async def _work_on(self) -> None:
        """Write what waits, all at once, again and again."""
        loop = asyncio.get_running_loop()
        while self._waiting or not self._ending:
            if not self._waiting:
                self._work.clear()
                await self._wait_for_work(loop.time())
                continue
            batch: list[_Put] = []
            while self._waiting and len(batch) < BATCH:
                put = self._waiting.popleft()
                self._waiting_bytes -= len(put.body)
                if not put.done.done():
                    batch.append(put)
            self._room.set()
            before = self.position
            outcomes = await loop.run_in_executor(self._pool, self._settle, batch)
            for put, outcome in zip(batch, outcomes, strict=True):
                if put.done.done():
                    continue
                if isinstance(outcome, LogError):
                    put.done.set_exception(outcome)
                else:
                    put.done.set_result(outcome)
            if self.position != before:
                grown, self._grown = self._grown, asyncio.Event()
                grown.set()

    async def _wait_for_work(self, now: float) -> None:
        """Wait for something to write, and keep the head when nothing comes."""
        if self.position == self._head_at:
            await self._work.wait()
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(max(self._head_due - now, 0.0)):
                await self._work.wait()
                return
        await asyncio.get_running_loop().run_in_executor(self._pool, self._keep_head)

    # -- in the writer's thread

    def _settle(self, batch: list[_Put]) -> list[Stored | Taken | LogError]:
        """Commit together; when that fails (disk full, I/O error), in halves, so that each gets its own answer."""
        try:
            outcomes: list[Stored | Taken | LogError] = [*self._commit(batch)]
        except Exception as error:
            assert self._writer is not None
            with suppress(sqlite3.Error):
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
            self._heads.clear()
            if len(batch) == 1:
                return [LogError(f"cannot write the log {self.file}: {error}")]
            middle = len(batch) // 2
            return self._settle(batch[:middle]) + self._settle(batch[middle:])
        if time.monotonic() > self._head_due:
            self._keep_head()
        return outcomes

    def _commit(self, batch: list[_Put]) -> list[Stored | Taken]:
        assert self._writer is not None
        self._load_heads(batch)
        known = self._heads
        now = self._clock = max(time.time_ns() // 1000, self._clock)
        seconds = microseconds(now)
        heads: dict[str, int] = {}
        rows: list[tuple[object, ...]] = []
        outcomes: list[Stored | Taken] = []
        position, chain = self.position, self.chain
        for put in batch:
            subject = put.subject
            if put.expected is not None:
                head = heads.get(subject)
                if head is None:
                    head = known.get(subject, 0)
                if head != put.expected:
                    outcomes.append(Taken(head))
                    continue
            position += 1
            chain = chained(chain, Row(position, now, subject, put.headers, put.body))
            rows.append((position, now, subject, put.headers, put.body, chain))
            outcomes.append(Stored(position, seconds))
            if put.expected is not None:
                heads[subject] = position
        if rows:
            run = self._writer.execute
            run("BEGIN IMMEDIATE")
            self._writer.executemany(INSERT, rows)
            run("COMMIT")
            self.position, self.chain, self.count = position, chain, self.count + len(rows)
            known.update(heads)
        return outcomes

    def _load_heads(self, batch: Sequence[_Put]) -> None:
        assert self._writer is not None
        if len(self._heads) > HEADS_KEPT:
            self._heads.clear()
        unknown = {put.subject for put in batch if put.expected is not None and put.subject not in self._heads}
        if unknown:
            self._heads.update(dict.fromkeys(unknown, 0))
            self._heads.update(self._writer.execute(_HEADS, (_encode(list(unknown)).decode(),)))

    def _keep_head(self) -> None:
        """Write how far the file goes beside it; a disk that is too full for it only delays it."""
        self._head_due = time.monotonic() + HEAD_EVERY
        if self.position == self._head_at:
            return
        with suppress(OSError):
            write_head(self.file, self._head())
            self._head_at = self.position

    # -- reading

    async def head(self) -> int:
        """The position of the newest entry; 0 when the log is empty."""
        self._check()
        return await super().head()

    async def tail(self, after: int, subject: str | None = None) -> AsyncGenerator[Entry, None]:
        """All entries behind `after` and then every new one; ends when the log is closed."""
        self._check()
        if self._writer is None:
            async for entry in super().tail(after, subject):
                yield entry
            return
        while not self._ending:
            grown, top = self._grown, self.position
            try:
                entries = await self.scan(after, subject=subject)
            except LogError:
                if self._ending:
                    return
                raise
            for entry in entries:
                after = entry.position
                yield entry
            if not entries:
                after = max(after, top)  # what does not match is not looked at again
                await grown.wait()

    # -- opening and closing

    def _begin(self, epoch: str, readonly: bool) -> None:
        """As for an archive; but a log that lost its newest rows as durability "process" allows goes on behind them."""
        self._setup()
        made = bool(self._connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone())
        epoch = "" if made or readonly else epoch  # an existing log has one of its own
        try:
            super()._begin(epoch, readonly)
        except LogCorrupt:
            if readonly or not self._name_what_was_lost():
                raise
            super()._begin(epoch, readonly)
        last = self._connection.execute(f"{self._select} ORDER BY position DESC LIMIT 1").fetchone()
        if last is not None and last[2] == GAP:
            self.position = msgspec.json.decode(last[4], type=Gap).last
        self._clock = last[1] if last else 0
        self._head_at = self.position

    def _name_what_was_lost(self) -> bool:
        """Write a gap for the rows that the head knows and the file does not have, if they were never flushed."""
        head, run = read_head(self.file), self._connection.execute
        meta = dict(run("SELECT name, value FROM meta").fetchall())
        last, chain = run("SELECT position, chain FROM log ORDER BY position DESC LIMIT 1").fetchone() or (0, EMPTY)
        if head is None or meta.get("durability") != "process" or head.position <= last:
            return False
        row = gap_row(last + 1, head.position, time.time_ns() // 1000, LOST)
        chain = chained(chain, row)
        run(INSERT, (*row[:5], chain))
        (count,) = run("SELECT COUNT(*) FROM log").fetchone()
        write_head(self.file, ArchiveHead(epoch=head.epoch, count=count, position=row.position, chain=chain.hex()))
        logger.warning("%s: positions %d to %d are gone: %s", self.file, last + 1, head.position, LOST)
        return True

    def _begin_writing(self) -> None:
        self._writer = connect(self.file, readonly=False)
        self._writer.execute(f"PRAGMA synchronous = {'FULL' if self.durability == 'power' else 'NORMAL'}")
        self._writer.execute(f"PRAGMA fullfsync = {int(self.durability == 'power')}")
        self._writer.execute("INSERT OR REPLACE INTO meta VALUES ('durability', ?)", (self.durability,))

    def _check(self) -> None:
        if self._ending or self._closed:
            raise LogError(f"the log {self.file} is closed")

    async def close(self) -> None:
        """Write what waits, end the tails, give the file back. Closing twice is fine."""
        if self._closing is None:
            self._ending = True
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._work.set()
        self._room.set()
        if self._task is not None:
            await self._task
        await asyncio.get_running_loop().run_in_executor(self._pool, self._end_writing)
        self._grown.set()
        self._pool.shutdown()
        await super().close()

    def _end_writing(self) -> None:
        if self._writer is not None:
            self._keep_head()
            with suppress(sqlite3.Error):
                self._writer.close()
