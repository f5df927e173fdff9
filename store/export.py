"""Entries of a log put into a SQLite file as they are: with their positions, times and headers.

The file is a log like any other: what reads or verifies an archive does so with an export. What was left out of it is
a gap with that name, and the head is inside, so that one file is all there is to carry.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from dspex.core.errors import LogError
from dspex.core.ports import Entry
from dspex.store.archive import INSERT, start_file
from dspex.store.chain import EMPTY, GAP, HEAD_INSIDE, ArchiveHead, Row, chained, gap_row, pack_head, row_of

__all__ = ["import_entries"]

LEFT_OUT = "left out of this export"


def import_entries(path: Path | str, entries: Iterable[Entry], *, epoch: str) -> int:
    """Write entries to a new file, and give how many it took. Raises LogError when the file is there already: what was
    exported once is not changed."""
    path = Path(path)
    if path.exists():
        raise LogError(f"{path} is there already; an export is never changed, choose another name")
    if not path.parent.is_dir():
        raise LogError(f"there is no folder {path.parent}")
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as file:
            start_file(file, epoch)
            file.execute("BEGIN IMMEDIATE")
            chain, position, count, gaps = EMPTY, 0, 0, 0
            for row in _with_gaps(entries):
                chain, position, count = chained(chain, row), row.position, count + 1
                gaps += row.subject == GAP
                file.execute(INSERT, (*row[:5], chain))
            head = ArchiveHead(epoch=epoch, count=count, position=position, chain=chain.hex())
            file.execute("INSERT INTO meta VALUES (?, ?)", (HEAD_INSIDE, pack_head(head)))
            file.execute("COMMIT")
            return count - gaps
    except sqlite3.Error as error:
        path.unlink(missing_ok=True)
        raise LogError(f"cannot write {path}: {error}") from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _with_gaps(entries: Iterable[Entry]) -> Iterator[Row]:
    expected, now = 1, round(time.time() * 1e6)
    for entry in entries:
        if entry.position > expected:
            yield gap_row(expected, entry.position - 1, now, LEFT_OUT)
        if entry.position >= expected:
            yield row_of(entry)
            expected = entry.position + 1
