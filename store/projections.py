"""Projections: tables computed from the log, in a file that can be thrown away.

What a projection has computed and how far it has read are written in one transaction, so that its tables are exact
after any crash. It begins anew when its version is another, when the log is another (the epoch), and when the archive
is another at the place where it stopped (the chain).
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

from msgspec import Struct

from dspex.core.errors import InvalidInput, LogError
from dspex.core.events import Event

__all__ = ["DROPPED", "Projection", "View", "Views", "damaged", "throw_away"]

logger = logging.getLogger("dspex.store")

FORMAT = 1
APPLICATION_ID = 0x64737076  # "dspv"
DROPPED = -1
"""The position of a projection that was dropped, and is not to be made again until somebody asks for it."""
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_SCHEMA = (
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {FORMAT}",
    "CREATE TABLE checkpoints (name TEXT PRIMARY KEY, version INTEGER NOT NULL, epoch TEXT NOT NULL,"
    " position INTEGER NOT NULL, mark TEXT NOT NULL, tables TEXT NOT NULL) WITHOUT ROWID",
)


class Projection(Protocol):
    """What a table is computed by. `version` is raised when the same events would give other rows."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int: ...

    @property
    def tables(self) -> Mapping[str, Sequence[str]]:
        """The statements that make each of its tables, indexes behind it. No two projections share a table."""

    def apply(self, run: sqlite3.Connection, events: Sequence[Event]) -> None:
        """Bring the tables up to date with events that follow those applied before. It must not commit."""


class View(Struct, frozen=True, kw_only=True):
    """How far a projection is. `position` is `DROPPED` for one that was dropped; `trouble` is why it does not go on."""

    name: str
    version: int
    position: int
    trouble: str = ""


class Views:
    """Projections and their file. `file` None keeps them in memory (SQLite spills a large one to a nameless file).

    Used by one thread at a time. Raises LogError when the file cannot be used; a damaged one is made anew.
    """

    def __init__(
        self, file: Path | None, projections: Sequence[Projection], *, epoch: str, readonly: bool = False
    ) -> None:
        self.file, self.epoch, self._readonly = file, epoch, readonly
        self._projections = {projection.name: projection for projection in projections}
        self.trouble: dict[str, str] = {}
        try:
            self.run = self._opened()
            self._checkpoints: dict[str, tuple[int, str]] = {}
            self._begin()
        except sqlite3.Error as error:
            raise LogError(f"the views in {file} cannot be used: {error}") from None

    def close(self) -> None:
        """Give the file back."""
        with suppress(sqlite3.Error):
            self.run.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # -- how far it is

    @property
    def position(self) -> int:
        """Up to where all projections that go on are; what they need next stands behind it."""
        return min((position for _, (position, _) in self._going()), default=0)

    @property
    def going(self) -> bool:
        """Whether there is any projection to bring forward."""
        return bool(self._going())

    def at(self, name: str) -> int:
        """Where one projection is."""
        return self._checkpoints[name][0] if name in self._checkpoints else DROPPED

    def described(self) -> list[View]:
        """All of them, by name."""
        return [
            View(name=name, version=self._projections[name].version, position=self.at(name),
                 trouble=self.trouble.get(name, ""))
            for name in sorted(self._projections)
        ]  # fmt: skip

    def fit(self, mark_at: Callable[[int], str | None]) -> None:
        """Begin anew with whatever was made from other rows: `mark_at` gives the archive's chain at a position."""
        for name, (position, mark) in list(self._checkpoints.items()):
            if position > 0 and mark_at(position) != mark:
                logger.warning("the archive is another than the view %s was made of; it is made again", name)
                self.rebuild(name)

    # -- going on

    def advance(self, events: Sequence[Event], position: int, mark: str) -> None:
        """Apply what follows `self.position`, up to `position`, whole or not at all. Raises sqlite3.Error when the file
        cannot be written; a projection that fails on an event stops there, and the others go on."""
        behind = self.position
        names = [name for name, (at, _) in self._going() if at == behind]
        try:
            self._apply(names, events, position, mark)
        except Exception as error:
            if _of_the_file(error):
                raise
            for name in names:  # one by one, to find out which
                try:
                    self._apply([name], events, position, mark)
                except Exception as error:
                    if _of_the_file(error):
                        raise
                    logger.exception("the view %s cannot go on", name)
                    self.trouble[name] = f"it cannot take in what stands up to position {position}: {error!r}"

    def until(self) -> int | None:
        """Up to where a group may go at most: to where another projection stands that is further on; None: anywhere."""
        behind = self.position
        return min((at for _, (at, _) in self._going() if at > behind), default=None)

    def rebuild(self, name: str) -> None:
        """Throw away what a projection has computed; it begins at the beginning. Raises InvalidInput."""
        self._reset(name, 0)

    def drop(self, name: str) -> None:
        """Throw it away, and leave it so until it is rebuilt. Raises InvalidInput."""
        self._reset(name, DROPPED)

    # -- inside

    def _going(self) -> list[tuple[str, tuple[int, str]]]:
        return [
            (name, checkpoint)
            for name, checkpoint in self._checkpoints.items()
            if checkpoint[0] != DROPPED and name not in self.trouble
        ]

    def _apply(self, names: Iterable[str], events: Sequence[Event], position: int, mark: str) -> None:
        run, names = self.run, list(names)
        run.execute("BEGIN IMMEDIATE")
        try:
            for name in names:
                self._projections[name].apply(run, events)
                run.execute("UPDATE checkpoints SET position = ?, mark = ? WHERE name = ?", (position, mark, name))
            run.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                run.execute("ROLLBACK")
            raise
        for name in names:
            self._checkpoints[name] = (position, mark)

    def _reset(self, name: str, position: int) -> None:
        projection = self._projections.get(name)
        if projection is None:
            raise InvalidInput(f"there is no view {name[:40]!r}; they are {', '.join(sorted(self._projections))}")
        run = self.run
        run.execute("BEGIN IMMEDIATE")
        try:
            self._remove(name)
            if position != DROPPED:
                for statements in projection.tables.values():
                    for statement in statements:
                        run.execute(statement)
            run.execute(
                "INSERT INTO checkpoints VALUES (?, ?, ?, ?, '', ?)",
                (name, projection.version, self.epoch, position, json.dumps(list(projection.tables))),
            )
            run.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                run.execute("ROLLBACK")
            raise
        self.trouble.pop(name, None)
        self._checkpoints[name] = (position, "")

    def _remove(self, name: str) -> None:
        """Drop what the last one of that name had made, by the names that it left."""
        row = self.run.execute("SELECT tables FROM checkpoints WHERE name = ?", (name,)).fetchone()
        for table in json.loads(row[0]) if row else ():
            self.run.execute(f'DROP TABLE IF EXISTS "{table}"')
        self.run.execute("DELETE FROM checkpoints WHERE name = ?", (name,))

    def _opened(self) -> sqlite3.Connection:
        """A connection to a file of our format, made anew when it is damaged or of another format."""
        if self._readonly:
            assert self.file is not None
            return _connect(self.file, readonly=True)
        connection: sqlite3.Connection | None = None
        for attempt in (1, 2):
            try:
                connection = _connect(self.file)
                if _is_ours(connection):
                    return connection
                if not connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0]:
                    connection.execute("BEGIN IMMEDIATE")
                    for statement in _SCHEMA:
                        connection.execute(statement)
                    connection.execute("COMMIT")
                    return connection
            except sqlite3.DatabaseError as error:
                if attempt == 2 or not damaged(error):
                    raise
            if connection is not None:
                connection.close()
            assert self.file is not None
            logger.warning("%s is damaged, or of another version; it is made again from the archive", self.file)
            throw_away(self.file)
        raise LogError(f"{self.file} cannot be made")

    def _begin(self) -> None:
        found = {
            name: (version, epoch, position, mark)
            for name, version, epoch, position, mark in self.run.execute(
                "SELECT name, version, epoch, position, mark FROM checkpoints"
            )
        }
        for name, projection in self._projections.items():
            version, epoch, position, mark = found.get(name, (None, "", 0, ""))
            if version == projection.version and epoch == self.epoch:
                self._checkpoints[name] = (position, mark)
            elif not self._readonly:
                self._reset(name, 0)
        if not self._readonly:
            for name in found.keys() - self._projections.keys():  # of a version that had more
                self._remove(name)


def damaged(error: sqlite3.Error) -> bool:
    """Whether it says that the file is not to be used any more."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED


def throw_away(file: Path) -> None:
    """Remove the views' file; nobody may have it open."""
    for end in ("", "-wal", "-shm"):
        Path(f"{file}{end}").unlink(missing_ok=True)


def _of_the_file(error: Exception) -> bool:
    """Whether the file is what failed, and not a projection on an event."""
    return isinstance(error, sqlite3.OperationalError) or (isinstance(error, sqlite3.Error) and damaged(error))


def _connect(file: Path | None, *, readonly: bool = False) -> sqlite3.Connection:
    if file is None:
        return sqlite3.connect("", isolation_level=None, check_same_thread=False)
    mode = "ro" if readonly else "rwc"
    connection = sqlite3.connect(
        f"{file.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=5.0
    )
    if not readonly:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # what a power cut takes is computed again
    return connection


def _is_ours(connection: sqlite3.Connection) -> bool:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    return bool(application == APPLICATION_ID and connection.execute("PRAGMA user_version").fetchone()[0] == FORMAT)
