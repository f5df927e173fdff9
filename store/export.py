"""Entries of a log put into a SQLite file as they are: with their positions, times and headers.

The file is a log like any other: `SqliteLog.open(file, readonly=True)` reads it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

import msgspec

from dspex.core.codec import decode_commit
from dspex.core.errors import LogError
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects
from dspex.store import sqlite as log_file

__all__ = ["import_entries"]

_PUT = "INSERT OR IGNORE INTO log (position, time, subject, version, headers, body) VALUES (?, ?, ?, ?, ?, ?)"


def import_entries(path: Path | str, entries: Iterable[Entry], *, epoch: str, subjects: Subjects | None = None) -> int:
    """Write entries to a new file, and give how many it took. Raises LogError when the file is there already: what was
    exported once is not changed."""
    path, subjects = Path(path), subjects or Subjects()
    if path.exists():
        raise LogError(f"{path} is there already; an export is never changed, choose another name")
    if not path.parent.is_dir():
        raise LogError(f"there is no folder {path.parent}")
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as file:
            file.execute("BEGIN IMMEDIATE")
            for statement in log_file._SCHEMA:
                file.execute(statement)
            meta = [("epoch", epoch), ("format", str(log_file.FORMAT))]
            file.executemany("INSERT INTO meta VALUES (?, ?)", meta)
            count = file.executemany(_PUT, (_row(entry, subjects) for entry in entries)).rowcount
            file.execute("COMMIT")
            return max(count, 0)
    except sqlite3.Error as error:
        path.unlink(missing_ok=True)
        raise LogError(f"cannot write {path}: {error}") from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _row(entry: Entry, subjects: Subjects) -> tuple[object, ...]:
    door = subjects.door_of(entry.subject)
    version = 0 if door else decode_commit(entry.body, entry.position)[-1].version
    headers = msgspec.json.encode(dict(entry.headers)).decode() if entry.headers else None
    return entry.position, round(entry.time * 1_000_000), entry.subject, version, headers, entry.body
