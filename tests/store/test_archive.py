"""The archive: exact after every kill, and nothing in it changes without being found and named."""

# ruff: noqa: ASYNC240 - other processes are waited for, and the files are small
from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.store.archives import EPOCH, entry, fill
from tests.store.disks import WAYS, Full, full_disk

from dspex.core.errors import LogCorrupt, LogError
from dspex.core.ports import Entry
from dspex.store.archive import Archive, set_aside
from dspex.store.chain import head_path
from dspex.store.mend import REACHED, compare, repair
from dspex.store.verify import verify

COUNT = 600
TRIES = 12


class Served:
    """The reading half of a log, of entries that may have holes."""

    epoch = EPOCH

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = {entry.position: entry for entry in entries}

    async def entry(self, position: int) -> Entry | None:
        return self.entries.get(position)

    async def head(self) -> int:
        return max(self.entries, default=0)

    async def scan(self, after: int, limit: int = 1000, subject: str | None = None) -> list[Entry]:
        return [self.entries[position] for position in sorted(self.entries) if position > after][:limit]

    async def tail(self, after: int, subject: str | None = None) -> AsyncIterator[Entry]:
        while True:
            for found in await self.scan(after):
                after = found.position
                yield found
            await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right archive, to be copied."""
    file = tmp_path_factory.mktemp("whole") / "archive.db"
    asyncio.run(fill(file, COUNT))
    return file


@pytest.fixture
def file(whole: Path, tmp_path: Path) -> Path:
    return copy(whole, tmp_path)


def copy(whole: Path, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for path in whole.parent.glob("archive.*"):
        shutil.copy(path, folder / path.name)
    return folder / whole.name


def change(file: Path, sql: str, *parameters: object) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(sql, parameters)


# -- filling


async def test_what_is_read_back_is_what_the_log_had(file: Path) -> None:
    archive = await Archive.open(file, readonly=True)
    assert await archive.scan(0, COUNT) == [entry(position) for position in range(1, COUNT + 1)]
    assert await archive.entry(42) == entry(42)
    assert await archive.read("task.qabot.42") == [entry(42)]
    assert await archive.last("task.qabot.42") == entry(42)
    assert await archive.last("task.qabot.99999") is None
    assert [e.position for e in await archive.scan(10, 2, "dspex.event.*.qabot.*")] == [11, 12]
    assert await archive.head() == COUNT
    await archive.close()
    report = verify(file)
    assert (report.ok, report.rows, report.position, report.gaps) == (True, COUNT, COUNT, [])


async def test_a_log_is_followed_and_its_gaps_are_named(tmp_path: Path) -> None:
    file = tmp_path / "archive.db"
    log = Served([entry(position) for position in (3, 4, 7)])
    for position in (8, 9, 12):
        archive = await Archive.open(file, epoch=EPOCH)
        following = asyncio.create_task(archive.follow(log))  # type: ignore[arg-type]
        log.entries[position] = entry(position)
        async with asyncio.timeout(10):
            while archive.position < position:
                await asyncio.sleep(0.01)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await archive.close()
    report = verify(file)
    assert report.ok
    assert [(gap.first, gap.last) for gap in report.gaps] == [(1, 2), (5, 6), (10, 11)]
    archive = await Archive.open(file, readonly=True)
    assert [e.position for e in await archive.scan(0)] == [3, 4, 7, 8, 9, 12]
    await archive.close()


async def test_a_log_that_lost_its_end_is_not_followed(file: Path) -> None:
    archive = await Archive.open(file, epoch=EPOCH)
    with pytest.raises(LogError, match="has lost its newest entries"):
        await archive.follow(Served([entry(position) for position in range(1, COUNT - 5)]))  # type: ignore[arg-type]
    other = [entry(position) for position in range(1, COUNT)]
    other.append(Entry(position=COUNT, time=1.0, subject="dspex.task.qabot", body=b"{}", headers={}))
    with pytest.raises(LogError, match="is not what was archived"):
        await archive.follow(Served(other))  # type: ignore[arg-type]
    await archive.close()


async def test_another_logs_archive_is_refused_and_can_be_set_aside(file: Path) -> None:
    with pytest.raises(LogError, match="is the archive of log e1, and this is log e2"):
        await Archive.open(file, epoch="e2")
    assert set_aside(file, "e2") == file.with_name("archive-e1.db")
    archive = await Archive.open(file, epoch="e2")
    assert archive.position == 0
    await archive.close()
    set_aside(file, EPOCH)
    archive = await Archive.open(file, epoch=EPOCH)
    assert (archive.position, archive.count) == (COUNT, COUNT)
    await archive.close()
    assert verify(file).ok


async def test_one_process_writes(file: Path) -> None:
    archive = await Archive.open(file, epoch=EPOCH)
    with pytest.raises(LogError, match="already open for writing in process"):
        await Archive.open(file, epoch=EPOCH)
    reader = await Archive.open(file, readonly=True)
    assert await reader.head() == COUNT
    await reader.close()
    await archive.close()


def test_it_is_exact_after_being_killed_at_any_point(tmp_path: Path) -> None:
    file = tmp_path / "archive.db"
    chance = random.Random(7)
    before = 0
    for _ in range(10):
        command = [sys.executable, "-m", "tests.store.archives", str(file)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        assert int(process.stdout.readline().split()[1]) >= before
        time.sleep(chance.uniform(0.0, 0.25))
        process.kill()
        process.wait()
        process.stdout.close()
        report = verify(file)
        assert report.ok, report.first
        assert report.position == report.rows >= before
        before = report.position
    assert before > 0
    with closing(sqlite3.connect(file)) as connection:
        for position, body in connection.execute("SELECT position, body FROM log"):
            assert body == entry(position).body


# -- what is wrong is found, and mended


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << random.randrange(8)
    file.write_bytes(data)


def the_same(file: Path) -> bool:
    """Whether the file still gives all that was archived."""
    try:
        with closing(sqlite3.connect(file)) as connection:
            rows = connection.execute("SELECT position, subject, body FROM log ORDER BY position").fetchall()
    except sqlite3.Error:
        return False
    entries = [entry(position) for position in range(1, COUNT + 1)]
    return rows == [(e.position, e.subject, e.body) for e in entries]


async def mend(file: Path) -> None:
    log = Served([entry(position) for position in range(1, COUNT + 1)])
    mended = await repair(file, log, verify(file))  # type: ignore[arg-type]
    assert not mended.lost
    assert verify(file).ok
    assert the_same(file)


async def test_a_flipped_byte_of_any_row_is_named(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    for number in range(TRIES):
        file = copy(whole, tmp_path / str(number))
        position = random.randrange(1, COUNT + 1)
        body = entry(position).body
        flip(file, data.index(body) + random.randrange(20, len(body)))  # behind it stands another row
        first = verify(file).first
        assert first
        assert first.position == position
        assert "its checksum is another" in first.what
        await mend(file)


def test_a_flipped_byte_anywhere_is_found_or_changes_nothing(whole: Path, tmp_path: Path) -> None:
    for number in range(60):
        file = copy(whole, tmp_path / str(number))
        flip(file, random.randrange(file.stat().st_size))
        report = verify(file)
        assert not report.ok or the_same(file)


async def test_a_flipped_byte_in_the_write_ahead_log_is_found(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    archive = await Archive.open(tmp_path / "open" / "archive.db", epoch=EPOCH)
    for start in range(1, COUNT + 1, 50):
        await archive.add([entry(position) for position in range(start, start + 50)])
    wal = Path(f"{archive.file}-wal")
    for number in range(TRIES):
        file = copy(archive.file, tmp_path / str(number))
        Path(f"{file}-shm").unlink(missing_ok=True)
        data = wal.read_bytes()
        found = data.rindex(entry(random.randrange(COUNT - 100, COUNT + 1)).body)
        flip(Path(f"{file}-wal"), found + 30)
        first = verify(file).first
        assert first
        await mend(file)
    await archive.close()


async def test_a_cut_tail_is_found(whole: Path, tmp_path: Path) -> None:
    for number in range(TRIES):
        file = copy(whole, tmp_path / str(number))
        cut = random.randrange(1, COUNT + 1)
        change(file, "DELETE FROM log WHERE position >= ?", cut)
        first = verify(file).first
        assert first
        assert first.what == f"the tail is cut: positions {cut} to {COUNT} are gone"
        with pytest.raises(LogCorrupt):
            await Archive.open(file, epoch=EPOCH)
        await mend(file)


async def test_a_missing_row_is_named(whole: Path, tmp_path: Path) -> None:
    for number in range(TRIES):
        file = copy(whole, tmp_path / str(number))
        position = random.randrange(1, COUNT)
        change(file, "DELETE FROM log WHERE position = ?", position)
        first = verify(file).first
        assert first
        assert (first.position, first.what) == (position, f"position {position} is missing")
        await mend(file)


async def test_a_swapped_pair_is_named(whole: Path, tmp_path: Path) -> None:
    for number in range(TRIES):
        file = copy(whole, tmp_path / str(number))
        one, other = sorted(random.sample(range(1, COUNT + 1), 2))
        for place, now in ((one, -1), (other, one), (-1, other)):
            change(file, "UPDATE log SET position = ? WHERE position = ?", now, place)
        first = verify(file).first
        assert first
        assert first.position == one
        assert f"swapped with {other}" in first.what
        await mend(file)


def test_another_epoch_is_found(file: Path) -> None:
    assert not verify(file, epoch="e2").ok
    change(file, "UPDATE meta SET value = 'e2' WHERE name = 'epoch'")
    first = verify(file).first
    assert first
    assert "of log e1, and the file is of log e2" in first.what


def test_a_malformed_page_is_a_sentence(whole: Path, tmp_path: Path) -> None:
    for number in range(TRIES):
        file = copy(whole, tmp_path / str(number))
        page = random.randrange(1, file.stat().st_size // 4096)
        with file.open("r+b") as stream:
            stream.seek(page * 4096)
            stream.write(os.urandom(4096))
        first = verify(file).first
        assert first
        assert 0 <= first.position <= COUNT + 1


async def test_a_malformed_page_is_mended(whole: Path, tmp_path: Path) -> None:
    data = whole.read_bytes()
    for number in range(4):
        file = copy(whole, tmp_path / str(number))
        page = data.index(entry(100 + number * 90).body) // 4096
        with file.open("r+b") as stream:
            stream.seek(page * 4096)
            stream.write(bytes(4096))
        await mend(file)


def test_a_head_that_is_gone_is_found(file: Path) -> None:
    head_path(file).unlink()
    assert not verify(file).ok


async def test_what_nobody_has_is_named_and_nothing_is_changed(file: Path) -> None:
    change(file, "DELETE FROM log WHERE position = 42")
    log = Served([entry(position) for position in range(100, COUNT + 1)])
    before = file.read_bytes()
    mended = await repair(file, log, verify(file))  # type: ignore[arg-type]
    assert mended.lost == [42]
    assert file.read_bytes() == before


async def test_the_log_and_the_archive_are_compared(file: Path) -> None:
    archive = await Archive.open(file, epoch=EPOCH)
    await archive.note(REACHED, "299")
    await archive.close()
    log = Served([entry(position) for position in range(300, COUNT + 1)])  # what is forgotten is no difference
    report = verify(file)
    await compare(file, log, report)  # type: ignore[arg-type]
    assert report.ok
    del log.entries[500]
    await compare(file, log, report)  # type: ignore[arg-type]
    assert report.faults.pop().what == "position 500 is in the archive, and the log has lost it"
    log.entries[500] = entry(500)
    log.entries[400] = Entry(position=400, time=1.0, subject="dspex.task.qabot", body=b"{}", headers={})
    await compare(file, log, report)  # type: ignore[arg-type]
    assert [fault.position for fault in report.faults] == [400]


async def test_one_that_is_read_where_nothing_may_be_written_leaves_nothing(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}
    monkeypatch.setattr("dspex.store.reading.os.access", lambda path, mode: False)
    archive = await Archive.open(file, readonly=True)
    assert len(await archive.scan(0, 10)) == 10
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before
    await archive.close()


# -- a full disk


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", WAYS)
async def test_a_full_disk_delays_and_nothing_is_half_done(tmp_path: Path, how: str) -> None:
    with full_disk(tmp_path, how) as disk:
        await _goes_on(disk)


async def _goes_on(disk: Full) -> None:
    archive = await Archive.open(disk.folder / "archive.db", epoch=EPOCH)
    log = Served([entry(position, 600) for position in range(1, 501)])
    following = asyncio.create_task(archive.follow(log))  # type: ignore[arg-type]
    async with asyncio.timeout(20):
        while not archive.trouble:
            await asyncio.sleep(0.01)
    assert "the log" in archive.trouble
    stood = archive.position
    assert verify(archive.file).rows == stood
    disk.free()
    async with asyncio.timeout(20):
        while archive.position < 500 or archive.trouble:
            await asyncio.sleep(0.01)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await archive.close()
    report = verify(archive.file)
    assert (report.ok, report.rows) == (True, 500)
