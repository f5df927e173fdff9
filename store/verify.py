"""Is an archive what was written? Every row is checked against the chain, the last one against the head outside.

SQLite's own check is asked last: it finds what is broken about the file and not about the rows, such as an index.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec

from dspex.core.errors import LogCorrupt
from dspex.store.chain import EMPTY, GAP, HEAD_INSIDE, Gap, Row, chained, read_head, unpack_head
from dspex.store.reading import SELECT, connect

__all__ = ["MAX_FAULTS", "Fault", "Report", "healthy_rows", "verify"]

MAX_FAULTS = 1000
"""Faults that are named one by one; the rest is only counted."""
NEAR = 1000
"""Rows behind a wrong one that are tried in its place."""


class Fault(msgspec.Struct, frozen=True):
    """One thing that is wrong: where, and what. `last` is the last of several positions, else 0."""

    position: int
    what: str
    last: int = 0


class Report(msgspec.Struct, kw_only=True):
    """What a verification found. `first` is the first fault by position; `gaps` are named and are no faults."""

    file: str
    epoch: str = ""
    rows: int = 0
    position: int = 0
    chain: str = ""
    bad: int = 0
    faults: list[Fault] = []
    gaps: list[Gap] = []

    @property
    def ok(self) -> bool:
        return not self.bad

    @property
    def first(self) -> Fault | None:
        return min(self.faults, key=lambda fault: fault.position, default=None)

    def add(self, position: int, what: str, last: int = 0) -> None:
        self.bad += 1
        if len(self.faults) < MAX_FAULTS:
            self.faults.append(Fault(position, what, last))


def verify(file: Path | str, *, epoch: str = "") -> Report:
    """Check an archive; `epoch` is the log it must be of. Nothing is changed, and nothing raises but a missing file
    (FileNotFoundError)."""
    file = Path(file)
    report = Report(file=str(file))
    if not file.exists():
        raise FileNotFoundError(2, "there is no such archive", str(file))
    connection: sqlite3.Connection | None = None
    try:
        connection = connect(file, readonly=True)
        meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
        report.epoch = str(meta.get("epoch", ""))
        if epoch and report.epoch != epoch:
            report.add(0, f"it is the archive of log {report.epoch}, and the log is {epoch}")
        _rows(connection, report, meta.get(HEAD_INSIDE))
        if not report.bad:
            _structure(connection, report)
    except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
        report.add(report.position + 1, f"SQLite cannot read on from here: {error}")
    finally:
        if connection is not None:
            connection.close()
    return report


def healthy_rows(connection: sqlite3.Connection) -> Iterator[Row]:
    """All rows that can be read, in order. Raises sqlite3.Error at the first that cannot."""
    for values in connection.execute(f"{SELECT} ORDER BY position"):
        row = Row._make(values)
        if not (
            isinstance(row.time, int) and isinstance(row.subject, str) and isinstance(row.headers, str | None)
            and isinstance(row.body, bytes) and isinstance(row.chain, bytes)
        ):  # fmt: skip
            row = Row(row.position, 0, "unreadable", None, b"", b"")
        yield row


def _rows(connection: sqlite3.Connection, report: Report, inside: str | None) -> None:
    """Check every row. `inside` is the head of a file that travels alone."""
    try:
        head = unpack_head(inside) if inside else read_head(Path(report.file))
    except LogCorrupt as error:
        report.add(0, str(error))
        head = None
    before, expected, at_head = EMPTY, 1, EMPTY.hex()
    counted = 0
    for row in healthy_rows(connection):
        chain = chained(before, row)
        if row.position != expected:
            what = "is missing" if row.position == expected + 1 else f"to {row.position - 1} are missing"
            report.add(expected, f"position {expected} {what}")
        elif chain != row.chain:
            report.add(row.position, _what(connection, before, row))
        elif row.subject == GAP:
            report.gaps.append(msgspec.json.decode(row.body, type=Gap))
        before = row.chain or chain
        expected = _last_of(row) + 1
        report.rows += 1
        report.position, report.chain = _last_of(row), before.hex()
        if head is not None and row.position <= head.position:
            at_head, counted = before.hex(), counted + 1
    if head is None:
        if report.rows:
            report.add(report.position, "the head kept beside the file is gone: a cut tail would not show")
        return
    if head.epoch != report.epoch:
        report.add(0, f"its head is that of log {head.epoch}, and the file is of log {report.epoch}")
    if head.position > report.position:
        report.add(report.position + 1, f"the tail is cut: positions {report.position + 1} to {head.position} are gone")
    elif not report.bad and (head.chain, head.count) != (at_head, counted):
        report.add(head.position, "the row at the head is not the one that was archived")


def _what(connection: sqlite3.Connection, before: bytes, row: Row) -> str:
    """What is wrong with a row whose checksum is."""
    others = connection.execute(f"{SELECT} WHERE position > ? ORDER BY position LIMIT {NEAR}", (row.position,))
    for other in map(Row._make, others):
        there = chained(before, other._replace(position=row.position))
        if there in (row.chain, other.chain):
            return f"position {row.position} holds what belongs to another place: it was swapped with {other.position}"
    return f"position {row.position} is not what was archived: its checksum is another"


def _last_of(row: Row) -> int:
    """The last position that a row stands for."""
    if row.subject != GAP:
        return row.position
    try:
        return max(row.position, msgspec.json.decode(row.body, type=Gap).last)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return row.position


def _structure(connection: sqlite3.Connection, report: Report) -> None:
    """What SQLite itself finds wrong with the file, when all rows are right."""
    for (said,) in connection.execute("PRAGMA integrity_check(1)"):
        if said != "ok":
            report.add(report.position + 1, f"all rows are right, but the file is not: {said}")
