"""The log in a SQLite file."""

# ruff: noqa: ASYNC220, ASYNC221, ASYNC240  (a test may block: nothing else runs in its loop)

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from dspex.core.codec import decode_commit
from dspex.core.errors import LogCorrupt, LogError
from dspex.core.events import Head
from dspex.core.ports import Appended, Conflict, Log
from dspex.core.subjects import Subjects
from dspex.store import Archive, SqliteLog
from dspex.store.contract import BackendContract, commit, positions, put
from dspex.store.export import import_entries
from dspex.store.sqlite import Durability
from dspex.store.verify import verify

TASK = "task.qabot.1"


class File:
    def __init__(self, folder: Path, durability: Durability) -> None:
        self.subjects = Subjects()
        self.folder, self.durability, self.others = folder, durability, 0

    async def open(self) -> Log:
        return await SqliteLog.open(self.folder / "log.db", durability=self.durability)

    async def another(self) -> Log:
        self.others += 1
        return await SqliteLog.open(self.folder / f"other{self.others}.db", durability=self.durability)

    async def close(self) -> None:
        pass


class TestSqlitePower(BackendContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> File:
        return File(tmp_path, "power")


class TestSqliteProcess(BackendContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> File:
        return File(tmp_path, "process")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
async def log(path: Path) -> AsyncIterator[SqliteLog]:
    log = await SqliteLog.open(path)
    yield log
    await log.close()


# -- one writer


async def test_a_second_writer_is_refused_with_the_holders_pid(path: Path, log: SqliteLog) -> None:
    with pytest.raises(LogError, match=f"already open for writing in process {os.getpid()}"):
        await SqliteLog.open(path)
    await put(log, TASK)


def test_a_second_writer_process_is_refused(path: Path) -> None:
    async def main() -> None:
        log = await SqliteLog.open(path)
        code = f"import asyncio; from dspex.store import SqliteLog; asyncio.run(SqliteLog.open({str(path)!r}))"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "LogError" in other.stderr and "already open for writing" in other.stderr
        await put(log, TASK)
        await log.close()

    asyncio.run(main())


async def test_others_may_read_while_one_writes(path: Path, log: SqliteLog) -> None:
    await put(log, TASK, count=2)
    reader = await SqliteLog.open(path, readonly=True)
    assert reader.epoch == log.epoch
    tail = reader.tail(0)
    head = await put(log, "task.qabot.2", count=3)
    seen = [await anext(tail) for _ in range(5)]
    assert seen == await log.scan(0) and seen[-1].position == head.position
    await tail.aclose()  # type: ignore[attr-defined]
    with pytest.raises(LogError, match="reading only"):
        await put(reader, "task.qabot.3")
    await reader.close()


async def test_a_log_that_nobody_writes_can_be_read(path: Path) -> None:
    log = await SqliteLog.open(path)
    await put(log, TASK, count=2)
    written = await log.scan(0)
    await log.close()
    reader = await SqliteLog.open(path, readonly=True)
    assert await reader.scan(0) == written
    await reader.close()


async def test_the_log_is_free_again_after_close(path: Path) -> None:
    for _ in range(3):
        log = await SqliteLog.open(path)
        await log.close()


@pytest.mark.parametrize(("durability", "level"), [("power", 2), ("process", 1)])
async def test_durability_decides_about_fsync(path: Path, durability: Durability, level: int) -> None:
    log = await SqliteLog.open(path, durability=durability)
    assert log._writer is not None
    ((found,),) = log._writer.execute("PRAGMA synchronous").fetchall()
    assert found == level
    await log.close()


async def test_what_waits_is_written_before_closing(path: Path) -> None:
    log = await SqliteLog.open(path)
    names = [f"task.qabot.{i}" for i in range(500)]
    waiting = [asyncio.create_task(log.append(name, commit(name), Head())) for name in names]
    await asyncio.sleep(0)
    await log.close()
    assert all(isinstance(result, Appended) for result in await asyncio.gather(*waiting))
    log = await SqliteLog.open(path)
    assert len(await log.scan(0)) == 500
    await log.close()


# -- what is no log


async def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.write_text("dear diary, " * 1000)
    with pytest.raises(LogError, match=r"cannot open .*log\.db: file is not a database"):
        await SqliteLog.open(path)
    assert path.read_text() == "dear diary, " * 1000


async def test_another_programs_database_is_refused_and_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE diary (day TEXT)")
        other.commit()
    before = path.read_bytes()
    for readonly in (False, True):
        with pytest.raises(LogError, match=r"log\.db is no log of dspex"):
            await SqliteLog.open(path, readonly=readonly)
    assert path.read_bytes() == before


async def test_a_newer_format_is_refused(path: Path) -> None:
    await (await SqliteLog.open(path)).close()
    with closing(sqlite3.connect(path)) as newer:
        newer.execute("UPDATE meta SET value = '2' WHERE name = 'format'")
        newer.commit()
    with pytest.raises(LogError, match="has format 2 and this version reads up to 1"):
        await SqliteLog.open(path)


async def test_a_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LogError, match="cannot be used: Not a directory"):
        await SqliteLog.open(tmp_path / "file" / "log.db")


async def test_a_missing_log_is_not_made_by_a_reader(path: Path) -> None:
    with pytest.raises(LogError, match="there is no log at"):
        await SqliteLog.open(path, readonly=True)
    assert not path.exists()


# -- group commit


async def test_each_append_of_a_group_gets_its_own_result(log: SqliteLog) -> None:
    head = await put(log, TASK)
    names = [f"task.qabot.{i}" for i in range(2, 102)]
    good = [log.append(name, commit(name), Head()) for name in names]
    late = [log.append(TASK, commit(TASK, mark=str(i)), Head()) for i in range(50)]
    again = [log.append(TASK, commit(TASK), Head()) for _ in range(3)]
    doors = [log.store("dspex.task.qabot", b"%d" % i, {}) for i in range(50)]
    results = await asyncio.gather(*good, *late, *again, *doors)
    assert all(isinstance(result, Appended) for result in results[:100])
    assert results[100:150] == [Conflict(head)] * 50
    assert results[150:153] == [Appended(head)] * 3
    assert len({*results[153:]}) == 50
    assert len(await log.scan(0)) == 151


async def test_more_than_the_queue_holds_is_written_all_the_same(path: Path) -> None:
    log = await SqliteLog.open(path, durability="process")
    stored = await asyncio.gather(*(log.store("dspex.task.qabot", b"x" * 100, {}) for _ in range(25_000)))
    assert sorted(stored) == list(range(1, 25_001))
    await log.close()


async def test_heads_that_were_forgotten_are_looked_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspex.store.sqlite.HEADS_KEPT", 3)
    log = await SqliteLog.open(path, durability="process")
    heads = {name: await put(log, name, count=2) for name in (f"task.qabot.{i}" for i in range(10))}
    for name, head in heads.items():
        assert await log.append(name, commit(name, mark="late"), Head()) == Conflict(head)
        assert (await put(log, name, head=head)).version == 3
    await log.close()


# -- crashes


_WRITER = """
    import asyncio, sys
    from dspex.core.events import Head
    from dspex.core.ports import Appended
    from dspex.store import Archive, SqliteLog
    from dspex.store.contract import commit

    async def main():
        log = await SqliteLog.open(sys.argv[1], durability=sys.argv[2])
        async def write(name):
            head = Head()
            while True:
                result = await log.append(name, commit(name, head.version, 3), head)
                assert isinstance(result, Appended)
                head = result.head
                sys.stdout.write(f"{name} {head.version} {head.position}\\n")
                sys.stdout.flush()
        await asyncio.gather(*(write(f"task.qabot.{i}") for i in range(8)))

    asyncio.run(main())
"""


@pytest.mark.parametrize("durability", ["power", "process"])
async def test_kill_9_loses_nothing_acknowledged_and_leaves_no_half_commit(path: Path, durability: Durability) -> None:
    acknowledged: dict[str, Head] = {}
    for round_ in range(3):
        target = path.with_name(f"log{round_}.db")
        writer = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_WRITER), str(target), durability],
            stdout=subprocess.PIPE,
            text=True,
        )
        with writer:
            assert writer.stdout is not None
            acknowledged.clear()
            for count, line in enumerate(writer.stdout):
                if count == 100 + 37 * round_:
                    writer.send_signal(signal.SIGKILL)
                if not line.endswith("\n"):
                    break
                name, version, position = line.split()
                acknowledged[name] = Head(int(version), int(position))
        assert len(acknowledged) == 8
        log = await SqliteLog.open(target)
        for name, head in acknowledged.items():
            kept = await log.read(name)
            assert head.position in positions(kept)
            versions = [event.version for entry in kept for event in decode_commit(entry.body)]
            assert versions == list(range(1, 3 * len(kept) + 1))
            assert len(versions) >= head.version
        everything = positions(await log.scan(0, 100_000))
        assert everything == list(range(1, len(everything) + 1))
        await put(log, "task.qabot.new")
        await log.close()


# -- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system of 4 MiB; needs the right to mount."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no right to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


async def test_a_full_disk_is_said_and_the_log_goes_on_when_there_is_room(small_disk: Path) -> None:
    log = await SqliteLog.open(small_disk / "log.db")
    head = await put(log, TASK)
    filler = small_disk / "filler"
    free = os.statvfs(small_disk)
    filler.write_bytes(b"x" * (free.f_bavail * free.f_frsize))
    with pytest.raises(LogError, match=r"cannot write the log .* full"):
        await log.append(TASK, commit(TASK, after=1, mark="x" * 200_000), head)
    assert len(await log.read(TASK)) == 1
    filler.unlink()
    head = await put(log, TASK, head=head)
    before = await log.scan(0)
    await log.close()
    log = await SqliteLog.open(small_disk / "log.db")
    assert await log.scan(0) == before and len(before) == 2
    await log.close()


async def test_only_the_appends_that_did_not_fit_fail(path: Path) -> None:
    log = await SqliteLog.open(path)
    head = await put(log, TASK)
    assert log._writer is not None
    ((pages,),) = log._writer.execute("PRAGMA page_count").fetchall()
    log._writer.execute(f"PRAGMA max_page_count = {pages + 20}")
    small = [f"task.qabot.{i}" for i in range(2, 12)]
    large = [f"task.qabot.{i}" for i in range(12, 15)]
    results = await asyncio.gather(
        *(log.append(name, commit(name), Head()) for name in small[:5]),
        *(log.append(name, commit(name, mark="x" * 200_000), Head()) for name in large),
        *(log.append(name, commit(name), Head()) for name in small[5:]),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [Appended] * 5 + [LogError] * 3 + [Appended] * 5
    assert "full" in str(results[5])
    for name in large:
        assert await log.read(name) == []
    log._writer.execute("PRAGMA max_page_count = 1000000")
    for name in large:
        await put(log, name)
    await put(log, TASK, head=head)
    everything = positions(await log.scan(0))
    assert everything == list(range(1, 16))
    await log.close()


# -- rows that were there


async def _cut(path: Path, durability: Durability) -> None:
    """A log whose newest rows were acknowledged and never reached the disk."""
    log = await SqliteLog.open(path, durability=durability)
    await put(log, TASK, count=9)
    await log.close()
    with closing(sqlite3.connect(path)) as file:
        file.execute("DELETE FROM log WHERE position > 5")
        file.commit()


async def test_what_a_loss_of_power_took_becomes_a_gap_and_its_positions_are_never_given_again(path: Path) -> None:
    await _cut(path, "process")
    for _ in range(2):
        log = await SqliteLog.open(path, durability="process")
        assert positions(await log.scan(0)) == [1, 2, 3, 4, 5]
        await log.close()
    log = await SqliteLog.open(path, durability="process")
    (last,) = [await log.last(TASK)]
    assert last is not None and last.position == 5
    head = await put(log, TASK, head=Head(5, 5))
    assert head == Head(6, 10)
    await log.close()
    report = verify(path)
    assert report.ok and [(gap.first, gap.last) for gap in report.gaps] == [(6, 9)]
    log = await SqliteLog.open(path)
    assert positions(await log.scan(0)) == [1, 2, 3, 4, 5, 10]
    await log.close()


async def test_a_tail_that_was_flushed_and_is_gone_is_refused(path: Path) -> None:
    await _cut(path, "power")
    with pytest.raises(LogCorrupt, match="ends at 5 and its head is at 9"):
        await SqliteLog.open(path)
    assert not verify(path).ok


# -- one format for logs, archives and exports


async def test_an_archive_is_a_log_to_go_on_with(tmp_path: Path, path: Path) -> None:
    log = await SqliteLog.open(path, durability="process")
    await put(log, TASK, count=3)
    archive = await Archive.open(tmp_path / "archive.db", epoch=log.epoch)
    await archive.add(await log.scan(0))
    await archive.close()
    other = await SqliteLog.open(tmp_path / "archive.db")
    assert other.epoch == log.epoch and await other.scan(0) == await log.scan(0)
    head = await put(other, TASK, head=Head(3, 3))
    assert head == Head(4, 4)
    await other.close()
    await log.close()
    assert verify(tmp_path / "archive.db").ok and verify(path).ok


async def test_an_export_is_verified_by_itself_and_says_what_was_left_out(tmp_path: Path, path: Path) -> None:
    log = await SqliteLog.open(path, durability="process")
    await put(log, TASK, count=6)
    entries = [entry for entry in await log.scan(0) if entry.position in (2, 5)]
    await log.close()
    export = tmp_path / "export.db"
    assert import_entries(export, entries, epoch="e") == 2
    report = verify(export)
    assert report.ok and [(gap.first, gap.last, gap.reason) for gap in report.gaps] == [
        (1, 1, "left out of this export"), (3, 4, "left out of this export")
    ]  # fmt: skip
    reader = await SqliteLog.open(export, readonly=True)
    assert await reader.scan(0) == entries
    await reader.close()
    with closing(sqlite3.connect(export)) as file:
        file.execute("DELETE FROM log WHERE position = 5")
        file.commit()
    assert not verify(export).ok
