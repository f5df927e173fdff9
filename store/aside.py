"""What stands beside a log in SQLite and in memory: large values, and the keys of private ones.

The files are overwritten where something is deleted (`secure_delete`) and have no write-ahead log, which would keep old
pages. One connection a file, used by one thread at a time.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Self, TypeVar

from dspex.core.errors import Forgotten, LogCorrupt, LogError, NotFound
from dspex.core.ports import MAX_OBJECT, Kept, KeyChange
from dspex.core.subjects import valid_token

__all__ = ["FileKeys", "FileNames", "FileObjects", "MemoryKeys", "MemoryObjects", "has_aside", "named"]

T = TypeVar("T")
KEY_BYTES = 32
_TABLES = (
    "CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS named (epoch TEXT, program TEXT, task TEXT, object TEXT, position INTEGER,"
    " PRIMARY KEY (epoch, program, task, object)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS named_object ON named (object)",
    "CREATE TABLE IF NOT EXISTS objects (name TEXT PRIMARY KEY, time REAL NOT NULL, data BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS keys (number INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, key BLOB)",
)


def named(data: bytes) -> str:
    """The name of a value. Raises LogError when it is too large."""
    if len(data) > MAX_OBJECT:
        raise LogError(f"a value has {len(data):,} bytes and the object store takes {MAX_OBJECT:,}")
    return hashlib.sha256(data).hexdigest()


def has_aside(path: Path, table: str) -> bool:
    """Whether a file is one of ours that has this table."""
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as file:
            found = file.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (table,)).fetchone()
            return found is not None
    except sqlite3.Error:
        return False


def checked(name: str, data: bytes) -> bytes:
    """The value, if it is the one of this name. Raises LogCorrupt."""
    if hashlib.sha256(data).hexdigest() != name:
        raise LogCorrupt(f"the object {name} is not what was put: its checksum differs")
    return data


class _File:
    """A SQLite file of ours; `readonly` opens one that another process may write."""

    def __init__(self, path: Path | str, *, readonly: bool = False) -> None:
        self.path = Path(path).absolute()
        self._one = asyncio.Lock()
        try:
            mode = "ro" if readonly else "rwc"
            self._connection = sqlite3.connect(
                f"{self.path.as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False
            )
            if not readonly:
                if not self.path.stat().st_size:  # ours from the start, and it may hold keys
                    self.path.chmod(0o600)
                for statement in ("PRAGMA secure_delete = ON", "PRAGMA synchronous = FULL", *_TABLES):
                    self._connection.execute(statement)
        except sqlite3.Error as error:
            raise LogError(f"{self.path} cannot be used: {error}") from None
        self._closed = False

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        async with self._one:
            if self._closed:
                raise LogError(f"{self.path} is closed")
            task = asyncio.ensure_future(asyncio.to_thread(work, self._connection))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                await asyncio.wait([task])  # the connection is used by one thread at a time
                raise
            except sqlite3.Error as error:
                raise LogError(f"{self.path} cannot be used: {error}") from None

    async def close(self) -> None:
        """Give the file back. Closing twice is fine."""
        async with self._one:
            if not self._closed:
                self._closed = True
                await asyncio.to_thread(self._connection.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


class FileObjects(_File):
    """The `Objects` port in a SQLite file, which may be a log's own."""

    async def put(self, data: bytes) -> str:
        name = named(data)
        row = (name, time.time(), data)
        await self._do(lambda file: file.execute("INSERT OR REPLACE INTO objects VALUES (?, ?, ?)", row))
        return name

    async def get(self, name: str) -> bytes | None:
        row = await self._do(lambda file: file.execute("SELECT data FROM objects WHERE name = ?", (name,)).fetchone())
        return checked(name, row[0]) if row else None

    async def delete(self, name: str, *, before: float | None = None) -> bool:
        sql = "DELETE FROM objects WHERE name = ? AND time <= ?"
        limit = float("inf") if before is None else before
        return await self._do(lambda file: file.execute(sql, (name, limit)).rowcount) > 0

    async def list(self) -> list[Kept]:
        rows = await self._do(lambda file: file.execute("SELECT name, length(data), time FROM objects").fetchall())
        return [Kept(*row) for row in rows]

    async def tidy(self, before: float) -> int:
        return 0


class FileKeys(_File):
    """The `Keys` port in a SQLite file, which may be a log's own."""

    async def create(self, name: str, key: bytes | None = None) -> bytes:
        fresh = _fresh(name, key)
        await self._do(lambda file: file.execute("INSERT OR IGNORE INTO keys (name, key) VALUES (?, ?)", (name, fresh)))
        return await self.get(name)

    async def get(self, name: str) -> bytes:
        row = await self._do(lambda file: file.execute("SELECT key FROM keys WHERE name = ?", (name,)).fetchone())
        return _known(name, row)

    async def forget(self, name: str) -> bool:
        def work(file: sqlite3.Connection) -> bool:
            file.execute("BEGIN IMMEDIATE")
            had = file.execute("DELETE FROM keys WHERE name = ? RETURNING key", (name,)).fetchone()
            file.execute("INSERT INTO keys (name, key) VALUES (?, NULL)", (name,))
            file.execute("COMMIT")
            return bool(had and had[0])

        return await self._do(work)

    async def changes(self, after: int, limit: int = 1000) -> list[KeyChange]:
        sql = "SELECT number, name, key FROM keys WHERE number > ? ORDER BY number LIMIT ?"
        return [KeyChange(*row) for row in await self._do(lambda file: file.execute(sql, (after, limit)).fetchall())]


class FileNames(_File):
    """Which tasks name which objects, in the file of the objects."""

    async def add(self, epoch: str, program: str, task: str, name: str, position: int) -> None:
        """A task names an object, at a position of the log."""
        row = (epoch, program, task, name, position)
        await self._do(lambda file: file.execute("INSERT OR REPLACE INTO named VALUES (?, ?, ?, ?, ?)", row))

    async def note(self, name: str, value: int) -> None:
        """Keep a number."""
        await self._do(lambda file: file.execute("INSERT OR REPLACE INTO notes VALUES (?, ?)", (name, value)))

    async def noted(self, name: str) -> int:
        """The number kept under a name; 0 when there is none."""
        row = await self._do(lambda file: file.execute("SELECT value FROM notes WHERE name = ?", (name,)).fetchone())
        return int(row[0]) if row else 0

    async def of_task(self, epoch: str, program: str, task: str) -> list[str]:
        """The objects that a task names."""
        sql = "SELECT object FROM named WHERE epoch = ? AND program = ? AND task = ?"
        return [row[0] for row in await self._do(lambda file: file.execute(sql, (epoch, program, task)).fetchall())]

    async def positions(self, name: str) -> list[tuple[str, int]]:
        """Where an object is named: epochs and positions."""
        sql = "SELECT epoch, position FROM named WHERE object = ?"
        return await self._do(lambda file: file.execute(sql, (name,)).fetchall())

    async def programs(self, name: str) -> list[str]:
        """Whose tasks name an object."""
        sql = "SELECT DISTINCT program FROM named WHERE object = ? ORDER BY program"
        return [row[0] for row in await self._do(lambda file: file.execute(sql, (name,)).fetchall())]

    async def drop(self, epoch: str, program: str, task: str) -> None:
        """A task names nothing any more."""
        sql = "DELETE FROM named WHERE epoch = ? AND program = ? AND task = ?"
        await self._do(lambda file: file.execute(sql, (epoch, program, task)))


class MemoryObjects:
    """The `Objects` port in memory."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[bytes, float]] = {}

    async def put(self, data: bytes) -> str:
        name = named(data)
        self._kept[name] = (data, time.time())
        return name

    async def get(self, name: str) -> bytes | None:
        kept = self._kept.get(name)
        return kept[0] if kept else None

    async def delete(self, name: str, *, before: float | None = None) -> bool:
        kept = self._kept.get(name)
        if kept is None or (before is not None and kept[1] > before):
            return False
        del self._kept[name]
        return True

    async def list(self) -> list[Kept]:
        return [Kept(name, len(data), when) for name, (data, when) in self._kept.items()]

    async def tidy(self, before: float) -> int:
        return 0


class MemoryKeys:
    """The `Keys` port in memory."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[int, bytes | None]] = {}
        self._number = 0

    async def create(self, name: str, key: bytes | None = None) -> bytes:
        if name not in self._kept:
            self._put(name, _fresh(name, key))
        return await self.get(name)

    async def get(self, name: str) -> bytes:
        kept = self._kept.get(name)
        return _known(name, kept and (kept[1],))

    async def forget(self, name: str) -> bool:
        had = self._kept.get(name)
        self._put(name, None)
        return bool(had and had[1])

    async def changes(self, after: int, limit: int = 1000) -> list[KeyChange]:
        found = sorted((number, name, key) for name, (number, key) in self._kept.items() if number > after)
        return [KeyChange(*each) for each in found[:limit]]

    def _put(self, name: str, key: bytes | None) -> None:
        self._number += 1
        self._kept[name] = (self._number, key)


def _fresh(name: str, key: bytes | None) -> bytes:
    if not valid_token(name):
        raise ValueError(f"{name!r} cannot be a key's name")
    return secrets.token_bytes(KEY_BYTES) if key is None else key


def _known(name: str, row: tuple[bytes | None] | None) -> bytes:
    if row is None:
        raise NotFound(f"the key {name} is not here, and what it seals cannot be read without it", type="MissingKey")
    if row[0] is None:
        raise Forgotten(f"the key {name} was forgotten, and with it what it sealed")
    return row[0]
