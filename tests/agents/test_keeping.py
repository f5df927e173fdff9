"""The checkpoint of what is open saves time and never decides anything."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import Raw

from dspex.agents.keeping import Keeping
from dspex.core.events import Event, Head, TaskCompleted
from dspex.core.subjects import Subjects
from dspex.store import MemoryLog

SUBJECTS = Subjects()
DOOR = SUBJECTS.door("task", "qabot")


async def end(log: MemoryLog, task: int) -> None:
    name = f"task.qabot.{task}"
    done = TaskCompleted(output=Raw(b"null"), seconds=0.0)
    event = Event(name, 1, "2026-11-23T10:00:00.000000Z", "tests", "1", "1", done)
    await log.append(name, [event], Head())


async def recalled(log: MemoryLog, file: Path) -> Keeping:
    keeping = Keeping(log, SUBJECTS, file)
    await keeping.recall()
    return keeping


@pytest.fixture
async def log() -> MemoryLog:
    """Three tasks, of which the second has ended."""
    log = MemoryLog(SUBJECTS)
    for _ in range(3):
        await log.store(DOOR, b"{}", {})
    await end(log, 2)
    return log


async def test_it_goes_on_behind_its_checkpoint(log: MemoryLog, tmp_path: Path) -> None:
    file = tmp_path / "sqlite.open"
    keeping = await recalled(log, file)
    assert keeping.standing.awake == {1: "qabot", 3: "qabot"} and file.exists()
    await end(log, 1)
    await log.store(DOOR, b"{}", {})
    again = await recalled(log, file)
    assert (again.standing.awake, again.standing.position) == ({3: "qabot", 6: "qabot"}, 6)


@pytest.mark.parametrize("spoil", ["gone", "empty", "rubbish", "of another log", "ahead of the log"])
async def test_a_checkpoint_that_does_not_fit_is_made_again(log: MemoryLog, tmp_path: Path, spoil: str) -> None:
    file = tmp_path / "sqlite.open"
    await recalled(log, file)
    match spoil:
        case "gone":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
        case "rubbish":
            file.write_bytes(b'{"epoch": 7}')
        case "of another log":
            file.write_bytes(b'{"epoch":"other","position":4,"awake":{"qabot":[2]}}')
        case _:
            file.write_bytes(b'{"epoch":"%b","position":99,"awake":{"qabot":[2]}}' % log.epoch.encode())
    keeping = await recalled(log, file)
    assert keeping.standing.awake == {1: "qabot", 3: "qabot"}
    assert b"[1,3]" in file.read_bytes()


async def test_a_folder_that_takes_nothing_costs_only_time(log: MemoryLog, tmp_path: Path) -> None:
    keeping = await recalled(log, tmp_path / "no such folder" / "sqlite.open")
    assert keeping.standing.awake == {1: "qabot", 3: "qabot"}
