"""An archive's file as a log to read from."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncGenerator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from dspex.core.errors import LogError
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects, parse_aggregate
from dspex.store.chain import GAP, Row, entry_of
from dspex.store.rules import SCAN_BYTES, subject_filter

__all__ = ["SELECT", "Reading", "connect", "finished"]

T = TypeVar("T")

SELECT = "SELECT position, time, subject, headers, body, chain FROM log"
PLAIN = "SELECT position, time, subject, headers, body, x'' FROM log"
"""The same of a log that was exported before rows were chained."""
POLL = 0.2
"""Seconds until a tail looks again: another process writes, and cannot tell us."""
_CHUNK = 1000


def connect(file: Path, *, readonly: bool) -> sqlite3.Connection:
    """A connection to an archive's file; a writing one commits through to the disk. Raises sqlite3.Error."""
    mode = "ro" if readonly else "rwc"
    if readonly and not os.access(file.parent, os.W_OK) and not Path(f"{file}-wal").exists():
        mode = "ro&immutable=1"  # SQLite could not put its files beside it, and nobody writes it
    connection = sqlite3.connect(
        f"{file.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=5.0
    )
    if not readonly:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    return connection


async def finished(work: Coroutine[Any, Any, T]) -> T:
    """Wait for what runs in a thread, also when we are cancelled: a connection is used by one thread at a time."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


class Reading:
    """The reading half of the `Log` port, on a connection to an archive's file."""

    def __init__(self, file: Path, connection: sqlite3.Connection, subjects: Subjects) -> None:
        self.file, self._connection, self._subjects = file, connection, subjects
        self._one = asyncio.Lock()
        self._closed = False
        self._select = SELECT
        self.epoch = ""

    async def read(self, aggregate: str) -> list[Entry]:
        """All commits of an aggregate, oldest first."""
        subject = self._subjects.event(".".join(parse_aggregate(aggregate)))
        return [entry_of(row) for row in await self._rows("WHERE subject = ? ORDER BY position", (subject,))]

    async def last(self, aggregate: str) -> Entry | None:
        """The newest commit of an aggregate."""
        subject = self._subjects.event(".".join(parse_aggregate(aggregate)))
        rows = await self._rows("WHERE subject = ? ORDER BY position DESC LIMIT 1", (subject,))
        return entry_of(rows[0]) if rows else None

    async def entry(self, position: int) -> Entry | None:
        """What stands at a position; None where there is a gap."""
        row = await self._row(position)
        return entry_of(row) if row is not None and row.subject != GAP else None

    async def scan(self, after: int, limit: int = 1000, subject: str | None = None) -> list[Entry]:
        """Up to `limit` entries behind position `after`, in order."""
        matches = subject_filter(subject) if subject is not None else None
        where, more = _where(subject)
        found: list[Entry] = []
        size = 0
        while len(found) < limit and size < SCAN_BYTES:
            rows = await self._rows(f"WHERE position > ?{where} ORDER BY position LIMIT {_CHUNK}", (after, *more))
            for row in rows:
                if row.subject != GAP and (matches is None or matches(row.subject)) and len(found) < limit:
                    found.append(entry_of(row))
                    size += len(row.body)
            if len(rows) < _CHUNK:
                break
            after = rows[-1].position
        return found

    async def holding(self, subject: str, text: str) -> list[Entry]:
        """The entries of one subject whose bodies hold some bytes, in order; found without making all the others. The
        last token of the subject may be `*`."""
        how = "GLOB" if subject.endswith("*") else "="
        where = f"WHERE subject {how} ? AND instr(body, ?) > 0 ORDER BY position"
        rows = await self._rows(where, (subject, text.encode()))
        return [entry_of(row) for row in rows]

    async def marked(self, after: int, until: int, prefix: str, word: bytes) -> list[Entry]:
        """The entries behind `after`, up to `until`, whose subjects begin with `prefix` or whose bodies hold `word`, in
        order; found without making all the others."""
        wanted = "(substr(subject, 1, ?) = ? OR instr(body, ?))"
        where = f"WHERE position > ? AND position <= ? AND {wanted} ORDER BY position"
        rows = await self._rows(where, (after, until, len(prefix), prefix, word))
        return [entry_of(row) for row in rows]

    async def tail(self, after: int, subject: str | None = None) -> AsyncGenerator[Entry, None]:
        """All entries behind `after` and then every new one; ends when the archive is closed."""
        while not self._closed:
            entries = await self.scan(after, subject=subject)
            for entry in entries:
                after = entry.position
                yield entry
            if not entries:
                await asyncio.sleep(POLL)

    async def head(self) -> int:
        """The position of the newest entry; 0 when there is none."""
        rows = await self._rows("WHERE subject <> '' ORDER BY position DESC LIMIT 1", ())
        return rows[0].position if rows else 0

    async def _row(self, position: int) -> Row | None:
        rows = await self._rows("WHERE position = ?", (position,))
        return rows[0] if rows else None

    async def _rows(self, where: str, parameters: tuple[object, ...]) -> list[Row]:
        async with self._one:
            if self._closed:
                raise LogError(f"{self.file} is closed")
            try:
                return await finished(asyncio.to_thread(self._fetch, where, parameters))
            except sqlite3.Error as error:
                raise LogError(f"cannot read {self.file}: {error}") from None

    def _fetch(self, where: str, parameters: tuple[object, ...]) -> list[Row]:
        return [Row._make(row) for row in self._connection.execute(f"{self._select} {where}", parameters)]


def _where(pattern: str | None) -> tuple[str, tuple[str, ...]]:
    """What SQLite can leave out of a scan with a filter: every match satisfies it, and the filter itself decides.

    A prefix that ends in a wildcard goes through the index only for subjects that are few; for many, the rows are read
    in their order and looked at.
    """
    if pattern is None or pattern == ">":
        return "", ()
    if "*" not in pattern and not pattern.endswith(">"):
        return " AND subject = ?", (pattern,)
    tokens = ["*" if token in ("*", ">") else token for token in pattern.split(".")]
    return " AND +subject GLOB ?", (".".join(tokens).replace("[", "[[]").replace("?", "[?]"),)
