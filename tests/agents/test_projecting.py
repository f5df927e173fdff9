"""The views beside the archive: they follow it, wait for a disk that is full, and are made again when they must be."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import pytest
from tests.store.disks import WAYS, full_disk
from tests.store.histories import SUBJECTS, history

from dspex.agents.pace import Pace
from dspex.agents.projecting import Projecting
from dspex.core.errors import Unavailable
from dspex.core.find import TaskQuery
from dspex.core.ports import Entry
from dspex.store.archive import Archive
from dspex.store.finding import find

ENTRIES = history(11, 300)
TOP = ENTRIES[-1].position


async def archive_of(folder: Path, entries: list[Entry] = ENTRIES) -> Archive:
    archive = await Archive.open(folder / "archive.db", epoch="e")
    await archive.add(entries)
    return archive


@asynccontextmanager
async def going(projecting: Projecting, archive: Archive) -> AsyncIterator[None]:
    task = asyncio.create_task(projecting.go_on(archive))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def tasks_of(projecting: Projecting, position: int = TOP) -> list[str]:
    query = TaskQuery(limit=200)
    found = await projecting.with_views(lambda views, rows: find(views, query, lambda task, last: (None, None)), position)
    assert found.position >= position
    return [row.task for row in found.tasks]


EXPECTED = [str(entry.position) for entry in ENTRIES if entry.subject.startswith("dspex.task.")][-200:]


async def test_they_follow_the_archive_and_go_on_where_they_were(tmp_path: Path) -> None:
    archive = await archive_of(tmp_path, ENTRIES[:100])
    projecting = Projecting(tmp_path / "views.db", SUBJECTS, Pace())
    async with going(projecting, archive):
        await tasks_of(projecting, 100)
        await archive.add(ENTRIES[100:])
        assert await tasks_of(projecting) == EXPECTED
    with pytest.raises(Unavailable):
        await asyncio.wait_for(tasks_of(projecting), 10)
    async with going(projecting, archive):
        assert await tasks_of(projecting) == EXPECTED
    await archive.close()


async def test_another_archive_of_the_same_log_makes_them_anew(tmp_path: Path) -> None:
    archive = await archive_of(tmp_path)
    projecting = Projecting(tmp_path / "views.db", SUBJECTS, Pace())
    async with going(projecting, archive):
        await tasks_of(projecting)
    await archive.close()
    other = history(12, 300)[:TOP]
    (tmp_path / "other").mkdir()
    archive = await archive_of(tmp_path / "other", other)
    async with going(projecting, archive):
        expected = [str(entry.position) for entry in other if entry.subject.startswith("dspex.task.")][-200:]
        assert await tasks_of(projecting, other[-1].position) == expected
    await archive.close()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", WAYS)
async def test_a_full_disk_delays_them_and_nothing_is_half_done(tmp_path: Path, how: str) -> None:
    archive = await archive_of(tmp_path)
    with full_disk(tmp_path, how) as disk:
        file = disk.folder / "views.db"
        projecting = Projecting(file, SUBJECTS, Pace())
        async with going(projecting, archive):
            async with asyncio.timeout(20):
                while not projecting.trouble:
                    await asyncio.sleep(0.01)
            assert "what is new waits in the archive" in projecting.trouble
            disk.free()
            async with asyncio.timeout(20):
                while projecting.trouble or projecting.position < TOP:
                    await asyncio.sleep(0.01)
            assert await tasks_of(projecting) == EXPECTED
        with closing(sqlite3.connect(file)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    await archive.close()


@pytest.mark.filterwarnings("ignore")
async def test_a_file_that_is_damaged_meanwhile_is_made_again(tmp_path: Path) -> None:
    archive = await archive_of(tmp_path, ENTRIES[:200])
    file = tmp_path / "views.db"
    projecting = Projecting(file, SUBJECTS, Pace())
    async with going(projecting, archive):
        await tasks_of(projecting, 200)
        await projecting.with_views(lambda views, rows: views.run.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
    data = bytearray(file.read_bytes())
    data[8192:] = b"\xff" * (len(data) - 8192)
    file.write_bytes(data)
    async with going(projecting, archive):
        await archive.add(ENTRIES[200:])
        async with asyncio.timeout(20):
            while projecting.trouble or projecting.position < TOP:
                await asyncio.sleep(0.01)
        assert await tasks_of(projecting) == EXPECTED
    await archive.close()


def test_work_rests_when_others_want_the_cores(tmp_path: Path) -> None:
    stat = tmp_path / "schedstat"
    pace = Pace(stat)
    assert pace.rest(0.1, 0.1, 1.0) == pytest.approx(0.9), "where nothing is known, we are not alone"
    stat.write_text("1000000000 10000000 5\n")
    assert pace.rest(0.1, 0.1, 1.0) == 0
    assert pace.rest(0.1, 0.1, 0.5) == pytest.approx(0.1)
    stat.write_text("1100000000 110000000 6\n")
    assert pace.crowded
    stat.write_text("1100000001 110000000 6\n")
    assert pace.crowded, "one look too soon says nothing new"
    stat.write_text("1200000000 110000001 7\n")
    assert not pace.crowded
