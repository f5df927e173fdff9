"""An archive beside the log it is of: what differs, and what one can give back to the other.

A repair writes a new file, of the rows that are still right and of those that the log has, and puts it in the place of
the old one only when the whole chain leads to the head. So a repair that fails has changed nothing.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncGenerator
from contextlib import closing, suppress
from pathlib import Path

import msgspec

from dspex.core.errors import LogCorrupt, LogError
from dspex.core.headers import sealed
from dspex.core.ports import Entry, Log
from dspex.core.subjects import STORED_DOORS
from dspex.store.archive import INSERT, Archive, hold, start_file
from dspex.store.chain import EMPTY, GAP, ArchiveHead, Gap, Row, chained, digest, read_head, row_of, write_head
from dspex.store.reading import SELECT, connect
from dspex.store.verify import Report, verify

__all__ = ["REACHED", "Mended", "compare", "examine", "repair"]

_CHUNK = 500
REACHED = "reached"
"""Under this name the archive has the last position that retention has looked at."""


class Mended(msgspec.Struct, kw_only=True):
    """What a repair did: positions fetched from the log; `lost` are those that neither has, and then nothing was
    changed."""

    rows: int = 0
    fetched: list[int] = []
    lost: list[int] = []


async def examine(
    file: Path, log: Log, *, mend: bool, against_log: bool, restored: int = 0
) -> tuple[Report, Mended]:
    """Verify, mend what is wrong if that is wanted, and compare with the log if that is wanted. Raises LogError."""
    report = await asyncio.to_thread(verify, file, epoch=log.epoch)
    mended = Mended()
    if mend and not report.ok:
        mended = await repair(file, log, report, restored=restored)
        if not mended.lost and against_log:
            report = await asyncio.to_thread(verify, file, epoch=log.epoch)
    if against_log and report.ok:
        await compare(file, log, report, restored=restored)
    return report, mended


async def compare(file: Path, log: Log, report: Report, *, restored: int = 0) -> None:
    """Add to `report` where the archive and the log say different things, row by row, by checksum.

    What only the archive has is right when the archivist let the log forget it. `restored` is how far the log was
    rebuilt from an archive: up to there it has times of its own.
    """
    archive = await Archive.open(file, readonly=True)
    try:
        if archive.epoch != log.epoch:
            report.add(0, f"it is the archive of log {archive.epoch}, and the log is {log.epoch}")
            return
        reached = int(await archive.noted(REACHED) or 0)
        lost = _Lost(report)
        after, top = 0, await archive.head()
        while ours := {entry.position: entry for entry in await archive.scan(after, _CHUNK)}:
            until = max(ours) if max(ours) < top else top
            theirs = await _between(log, after, until)
            for position in sorted({*ours, *theirs}):
                mine, other = ours.get(position), theirs.get(position)
                if other is not None:
                    lost.end()
                if mine is None:
                    report.add(position, f"position {position} is in the log and not in the archive")
                elif other is None:
                    # What is sealed here came to the log in the open, where it is erased when its task has ended.
                    if not (may_be_forgotten(mine, reached) or sealed(mine.headers)):
                        lost.add(position)
                elif not _alike(mine, other, timed=position > restored):
                    report.add(position, f"position {position} is another in the log than in the archive")
            after = until
        lost.end()
        if await log.head() < top:
            report.add(await log.head() + 1, f"the log ends at {await log.head()} and the archive has it up to {top}")
    finally:
        await archive.close()


class _Lost:
    """Positions that the log has lost, said once for all that stand together: a damaged block takes thousands."""

    def __init__(self, report: Report) -> None:
        self._report, self._first, self._last = report, 0, 0

    def add(self, position: int) -> None:
        self._first, self._last = self._first or position, position

    def end(self) -> None:
        first, last = self._first, self._last
        if first == last and first:
            self._report.add(first, f"position {first} is in the archive, and the log has lost it")
        elif first:
            what = f"positions {first} to {last} are in the archive, and the log has lost them"
            self._report.add(first, what, last)
        self._first = self._last = 0


async def _between(log: Log, after: int, until: int) -> dict[int, Entry]:
    """What the log has behind a position, up to another."""
    found: dict[int, Entry] = {}
    while after < until and (entries := await log.scan(after, _CHUNK)):
        found |= {entry.position: entry for entry in entries if entry.position <= until}
        after = entries[-1].position
    return found


def _alike(mine: Entry, other: Entry, *, timed: bool) -> bool:
    here, there = row_of(mine), row_of(other)
    return digest(here) == digest(there if timed else there._replace(time=here.time))


def may_be_forgotten(entry: Entry, reached: int) -> bool:
    """Whether an entry is one that retention lets go of, and retention, which is at `reached`, has come to its task."""
    kinds = entry.subject.split(".")[1:]
    if kinds[0] == "event" and len(kinds) == 4 and kinds[1] in ("task", "inbox", "dlq"):
        return kinds[3].isdecimal() and int(kinds[3]) <= reached
    return kinds[0] in STORED_DOORS and entry.position <= reached


async def repair(file: Path, log: Log, report: Report, *, restored: int = 0) -> Mended:
    """Make an archive whole again with what the log has. Nobody else may write it meanwhile.

    Raises LogError when the log is another one, when another process writes the archive, and when the chain does not
    lead to the head although every row is there.
    """
    held = hold(file)
    try:
        return await _repair(file, log, report, restored)
    finally:
        os.close(held)


async def _repair(file: Path, log: Log, report: Report, restored: int) -> Mended:
    if report.epoch and report.epoch != log.epoch:
        raise LogError(f"{file} is the archive of log {report.epoch}, and the log is {log.epoch}: it cannot mend it")
    head: ArchiveHead | None = None
    with suppress(LogCorrupt):
        head = read_head(file)
    fresh = file.with_suffix(".db.new")
    for leftover in (fresh, Path(f"{fresh}-wal"), Path(f"{fresh}-shm")):
        leftover.unlink(missing_ok=True)
    mended = Mended()
    with closing(connect(fresh, readonly=False)) as target:
        target.execute("PRAGMA synchronous = OFF")  # made whole, then flushed once
        start_file(target, log.epoch)
        chain, count, last = EMPTY, 0, 0
        at_head = EMPTY.hex()
        target.execute("BEGIN")
        async for row in _whole(file, log, mended, head.position if head else report.position, restored):
            chain = chained(chain, row)
            target.execute(INSERT, (*row[:5], chain))
            count, last = count + 1, row.position
            if head is not None and row.position == head.position:
                at_head = chain.hex()
        target.execute("COMMIT")
    if mended.lost:
        fresh.unlink()
        return mended
    if head is not None and head.epoch == log.epoch and head.position and at_head != head.chain:
        fresh.unlink()
        raise LogError(
            f"every row of {file} is there again, but together they do not lead to the head at {head.position}: "
            "a row was changed in the archive that the log has forgotten"
        )
    mended.rows = count
    await asyncio.to_thread(_replace, file, fresh)
    write_head(file, ArchiveHead(epoch=log.epoch, count=count, position=last, chain=chain.hex()))
    found = await asyncio.to_thread(verify, file)
    if found.first:
        raise LogError(f"{file} is not right after its repair: {found.first.what}")
    return mended


async def _whole(file: Path, log: Log, mended: Mended, until: int, restored: int) -> AsyncGenerator[Row, None]:
    """Every row of the archive as it should be, in order; what is wrong comes from the log."""
    before, position = EMPTY, 1
    with closing(connect(file, readonly=True)) as source:
        top = max(until, _top(source))
        while position <= top and not mended.lost:
            row = _row_at(source, position)
            if row is None or chained(before, row) != row.chain:
                row = await _better(source, log, before, row, position, mended, restored)
            if row is None:
                mended.lost.append(position)
                return
            yield row
            before = chained(before, row)
            position = row.position + 1
            if row.subject == GAP:
                position = msgspec.json.decode(row.body, type=Gap).last + 1


async def _better(
    source: sqlite3.Connection, log: Log, before: bytes, row: Row | None, position: int, mended: Mended, restored: int
) -> Row | None:
    """The row that belongs at a position where the file has none or a wrong one; None when nobody has it."""
    entry = await log.entry(position)
    if entry is not None:
        better = row_of(entry)
        if row is not None and position <= restored and row.subject != GAP:
            better = better._replace(time=row.time)
        mended.fetched.append(position)
        return better
    if row is not None:  # its checksum may be what is wrong: then the next row still follows
        following = _row_at(source, position + 1)
        if following is not None and chained(chained(before, row), following) == following.chain:
            mended.fetched.append(position)
            return row
    return None


def _row_at(source: sqlite3.Connection, position: int) -> Row | None:
    try:
        values = source.execute(f"{SELECT} WHERE position = ?", (position,)).fetchone()
    except (sqlite3.Error, UnicodeDecodeError):
        return None
    row = Row._make(values) if values else None
    sound = row is not None and isinstance(row.body, bytes) and isinstance(row.subject, str)
    return row if sound and isinstance(row.time, int) else None  # type: ignore[union-attr]


def _top(source: sqlite3.Connection) -> int:
    try:
        return int(source.execute("SELECT COALESCE(MAX(position), 0) FROM log").fetchone()[0])
    except sqlite3.Error:
        return 0


def _replace(file: Path, fresh: Path) -> None:
    """Put the new file in the old one's place, on disk before anything else is done."""
    number = os.open(fresh, os.O_RDONLY)
    os.fsync(number)
    os.close(number)
    # The old write-ahead log must not be read into the new file.
    for leftover in (Path(f"{file}-wal"), Path(f"{file}-shm")):
        leftover.unlink(missing_ok=True)
    fresh.replace(file)
    folder = os.open(file.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
