"""The archive: one SQLite file that is the long memory of a log.

It is fed by tailing the log behind its own last row, and what waits is written in one transaction, so that one flush
pays for many rows. After each the head is written to a file beside it. Whatever is killed at whatever point, the file
goes on behind its last durable row: the rows are the only thing that counts.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Self

from dspex.core.errors import LogCorrupt, LogError
from dspex.core.ports import Entry, Log
from dspex.core.subjects import Subjects
from dspex.store.chain import EMPTY, ArchiveHead, Row, chained, gap_row, head_path, read_head, row_of, write_head
from dspex.store.reading import PLAIN, SELECT, Reading, connect, finished

__all__ = ["GROUP_WAIT", "MAX_GROUP", "Archive", "hold", "is_archive", "set_aside", "start_file"]

logger = logging.getLogger("dspex.store")

FORMAT = 1
APPLICATION_ID = 0x64737061  # "dspa"
OLD_LOG = 0x64737078
"""What exports were marked with before their rows were chained; they can be read."""
GROUP_WAIT = 0.4
"""Seconds between groups, so that one flush pays for many rows."""
IDLE_WAIT = 0.5
"""The same when nothing has come for a while."""
MAX_GROUP = 10_000
RETRY = 0.5
LOST = "the log did not have them when the archive came to them"
INSERT = "INSERT INTO log (position, time, subject, headers, body, chain) VALUES (?, ?, ?, ?, ?, ?)"
SCHEMA = (
    "CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS log (position INTEGER PRIMARY KEY, time INTEGER NOT NULL, subject TEXT NOT NULL,"
    " headers TEXT, body BLOB NOT NULL, chain BLOB NOT NULL)",
    "CREATE INDEX IF NOT EXISTS log_subject ON log (subject, position)",
    f"PRAGMA application_id = {APPLICATION_ID}",
)


class Archive(Reading):
    """An archive, open. Make one with `await Archive.open(path, epoch=…)`; use it in one event loop.

    What reads a log reads an archive. `position`, `count` and `chain` are
    those of the last durable row. One process writes; others may open the file with `readonly=True`.
    """

    def __init__(self, file: Path, connection: sqlite3.Connection, lock: int | None, subjects: Subjects) -> None:
        super().__init__(file, connection, subjects)
        self._lock = lock
        self.position = self.count = 0
        self.chain = EMPTY
        self.trouble = ""
        self.grown = asyncio.Event()
        """Set whenever rows were added; whoever waits for it clears it."""
        self._hurry = asyncio.Event()

    @classmethod
    async def open(
        cls, file: Path | str, *, epoch: str = "", readonly: bool = False, subjects: Subjects | None = None
    ) -> Self:
        """Open the archive at `file`, made anew when nothing is there (unless `readonly`), for the log `epoch`.

        Raises LogError when it is another log's, is written by another process or cannot be used, and LogCorrupt when
        the head kept beside it says that rows are gone.
        """
        file = Path(file).absolute()  # noqa: ASYNC240  (asks for the working directory, no more)
        if readonly and not await asyncio.to_thread(file.exists):
            raise LogError(f"there is no log at {file}")
        lock = None if readonly else hold(file)
        connection: sqlite3.Connection | None = None
        try:
            await asyncio.to_thread(_refuse_foreign, file)
            connection = await asyncio.to_thread(connect, file, readonly=readonly)
            archive = cls(file, connection, lock, subjects or Subjects())
            await asyncio.to_thread(archive._begin, epoch, readonly)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if lock is not None:
                os.close(lock)
            if isinstance(error, sqlite3.Error | KeyError | ValueError):
                raise LogError(f"cannot open {file}: {error}") from None
            raise
        return archive

    async def close(self) -> None:
        """Give the file back. Closing twice is fine."""
        async with self._one:
            if self._closed:
                return
            self._closed = True
            with suppress(sqlite3.Error):  # what a close could not write back is in the WAL
                await asyncio.to_thread(self._connection.close)
            if self._lock is not None:
                os.close(self._lock)

    # -- filling it

    async def follow(self, log: Log, rest: Callable[[float], float] = lambda cost: 0.0) -> None:
        """Archive all that the log has behind our last row, and then what is new, until cancelled.

        It reads in groups, not entry by entry as they come: that costs the running system the least. `rest` says how
        many seconds to rest after a group, by the seconds of a core that it took. Raises LogError when the log cannot
        be read, and when it does not go on from what was archived. A disk that is full only delays: the same rows are
        tried again until they fit, and `trouble` says so meanwhile.
        """
        await self.check(log)
        pause = GROUP_WAIT
        while True:
            began = time.process_time()
            entries = await log.scan(self.position, MAX_GROUP)
            await self.add(entries, log)
            pause = GROUP_WAIT if entries else min(2 * pause, IDLE_WAIT)
            due = 0.0 if len(entries) >= MAX_GROUP else pause
            await self._rest(max(due, rest(time.process_time() - began)))

    async def watch(self) -> None:
        """See how far a file has come that another process writes, until cancelled. Raises LogError."""
        while True:
            rows = await self._rows("ORDER BY position DESC LIMIT 1", ())
            if rows and rows[0].position != self.position:
                self.position = rows[0].position
                self.grown.set()
            await self._rest(GROUP_WAIT)

    def hurry(self) -> None:
        """Archive what waits now, and not only when the next group is due."""
        self._hurry.set()

    async def _rest(self, seconds: float) -> None:
        """Wait, unless somebody wants what is new at once."""
        if seconds > 0:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), seconds)
        self._hurry.clear()

    async def check(self, log: Log) -> None:
        """See that the log still has what we have of it at our last row. Raises LogError.

        A JetStream that lost its newest messages gives their positions to others: nothing behind that may be mixed.
        """
        if log.epoch != self.epoch:
            raise LogError(f"{self.file} is the archive of log {self.epoch}, and this is log {log.epoch}")
        if not self.position:
            return
        theirs = await log.entry(self.position)
        ours = await self._row(self.position)
        if theirs is None and await log.head() < self.position:
            raise LogError(
                f"the log ends at {await log.head()} and the archive has it up to {self.position}: the log has lost "
                "its newest entries; `dspex restore` rebuilds it from the archive"
            )
        if theirs is not None and ours is not None and ours.position == theirs.position:
            found = row_of(theirs)
            if (found.subject, found.body) != (ours.subject, ours.body):
                raise LogError(
                    f"position {self.position} of the log is not what was archived: it has lost its newest entries "
                    "and given their positions to others; `dspex restore` rebuilds it from the archive"
                )

    async def add(self, entries: Iterable[Entry], log: Log | None = None) -> None:
        """Archive entries that follow the last row, all in one transaction; a position that is missing among them
        becomes a gap with a name. `log` is asked whether it is really missing."""
        rows: list[Row] = []
        expected = self.position + 1
        for entry in entries:
            if entry.position < expected:
                if log is not None:
                    raise LogError(f"the log went back to position {entry.position}: it has lost entries")
                continue
            if entry.position > expected:
                if log is not None and await log.entry(expected) is not None:
                    raise LogError(f"position {expected} was left out while the log was read; it is read again")
                rows.append(gap_row(expected, entry.position - 1, round(time.time() * 1e6), LOST))
            rows.append(row_of(entry))
            expected = entry.position + 1
        while rows:
            try:
                async with self._one:
                    if self._closed:
                        raise LogError(f"{self.file} is closed")
                    await finished(asyncio.to_thread(self._write, rows))
                self.trouble = ""
                self.grown.set()
                return
            except (sqlite3.OperationalError, OSError) as error:
                trouble = f"{self.file} cannot be written ({error}); what is new waits in the log"
                if trouble != self.trouble:  # said once, not at every try
                    logger.warning(trouble)
                self.trouble = trouble
                await asyncio.sleep(RETRY)

    async def note(self, name: str, value: str) -> None:
        """Keep a word beside the rows; it is no part of the chain. Raises LogError."""
        await self._meta("INSERT OR REPLACE INTO meta VALUES (?, ?)", f"note.{name}", value)

    async def noted(self, name: str) -> str | None:
        """What was kept under a name."""
        rows = await self._meta("SELECT value FROM meta WHERE name = ?", f"note.{name}")
        return rows[0][0] if rows else None

    async def _meta(self, sql: str, *parameters: str) -> list[tuple[str]]:
        async with self._one:
            if self._closed:
                raise LogError(f"{self.file} is closed")
            try:
                return await finished(asyncio.to_thread(lambda: self._connection.execute(sql, parameters).fetchall()))
            except sqlite3.Error as error:
                raise LogError(f"{self.file} cannot be used: {error}") from None

    def _write(self, rows: list[Row]) -> None:
        """Write one group and the head behind it; after an error, whether before or behind the commit, try again."""
        if rows[-1].position > self.position:
            chain, linked = self.chain, []
            for row in rows:
                chain = chained(chain, row)
                linked.append((*row[:5], chain))
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany(INSERT, linked)
                self._connection.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
            self.chain, self.count = chain, self.count + len(rows)
            self.position = rows[-1].position
        write_head(self.file, self._head())

    def _head(self) -> ArchiveHead:
        return ArchiveHead(epoch=self.epoch, count=self.count, position=self.position, chain=self.chain.hex())

    def _begin(self, epoch: str, readonly: bool) -> None:
        run = self._connection.execute
        head = read_head(self.file)
        if not readonly and not run("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
            if head is not None:
                raise LogCorrupt(f"{self.file} is gone or empty, and its head says that it had {head.count:,} rows")
            start_file(self._connection, epoch)
        (application,) = run("PRAGMA application_id").fetchone()
        if application != APPLICATION_ID and not readonly:
            raise LogError(f"{self.file} was exported by an older dspex: it can be read, and not written")
        meta = dict(run("SELECT name, value FROM meta").fetchall())
        if int(meta["format"]) > FORMAT:
            raise LogError(f"{self.file} has format {meta['format']} and this version reads up to {FORMAT}")
        self.epoch = meta["epoch"]
        if epoch and self.epoch != epoch:
            raise LogError(f"{self.file} is the archive of log {self.epoch}, and this is log {epoch}")
        if application == OLD_LOG:
            self._select = PLAIN
            return
        last = run(f"{SELECT} ORDER BY position DESC LIMIT 1").fetchone()
        if last is not None:
            self.position, self.chain = last[0], last[5]
        if head is not None:
            at = run("SELECT chain FROM log WHERE position = ?", (head.position,)).fetchone()
            if head.position > self.position or (head.count and (at is None or at[0].hex() != head.chain)):
                raise LogCorrupt(
                    f"{self.file} ends at {self.position} and its head is at {head.position}, or differs there; "
                    "`dspex verify --repair` fetches what is missing from the log"
                )
        known = head or ArchiveHead(epoch=self.epoch)
        behind = run("SELECT COUNT(*) FROM log WHERE position > ?", (known.position,)).fetchone()
        self.count = known.count + int(behind[0])


def _refuse_foreign(file: Path) -> None:
    """Raise LogError for a file that is none of ours, before anything in it is changed."""
    if not file.is_file() or not file.stat().st_size:
        return
    with closing(connect(file, readonly=True)) as connection:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if tables and application not in (APPLICATION_ID, OLD_LOG):
        raise LogError(f"{file} is no log of dspex")


def start_file(connection: sqlite3.Connection, epoch: str) -> None:
    """Make an empty archive of the log `epoch`, whole or not at all."""
    connection.execute("BEGIN IMMEDIATE")
    for statement in SCHEMA:
        connection.execute(statement)
    connection.execute("INSERT INTO meta VALUES ('format', ?), ('epoch', ?)", (str(FORMAT), epoch))
    connection.execute("COMMIT")


def hold(file: Path) -> int:
    """Hold the file for ourselves; the lock ends with the process."""
    path = file.with_suffix(".lock")
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LogError(f"{path} cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        holder = os.pread(number, 20, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(number)
        raise LogError(f"{file} is already open for writing in process {holder}") from None
    with suppress(OSError):  # a full disk must not keep the file from being opened
        os.ftruncate(number, 0)
        os.pwrite(number, str(os.getpid()).encode(), 0)
    return number


def is_archive(file: Path) -> bool:
    """Whether a file is an archive, and not a log of another kind; False when it cannot be read."""
    with suppress(sqlite3.Error), closing(connect(file, readonly=True)) as connection:
        return bool(connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID)
    return False


def set_aside(file: Path, epoch: str) -> Path | None:
    """Make room for the archive of log `epoch` when the file is another log's: that one is kept beside it under the
    name of its epoch, and one that was set aside for `epoch` comes back. Where the other one is now, or None."""
    if not file.exists():
        return None
    try:
        with closing(connect(file, readonly=False)) as connection:  # closing it brings all of it into the one file
            known = connection.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
    except sqlite3.Error:
        return None  # opening it says what is wrong
    if known is None or known[0] == epoch:
        return None
    aside, back = (file.with_name(f"{file.stem}-{name}.db") for name in (known[0], epoch))
    with suppress(FileNotFoundError):
        head_path(file).replace(head_path(aside))
    file.replace(aside)
    if back.exists():
        back.replace(file)
        with suppress(FileNotFoundError):
            head_path(back).replace(head_path(file))
    return aside
