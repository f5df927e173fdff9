"""Old logs stay golden: none is ever rewritten, and every task in them replays the same on today's code."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tests.golden import programs

from dspex import Program, Replay

HERE = Path(__file__).resolve().parent
LOGS = sorted(HERE.glob("*.db"))
DIGESTS = dict(reversed(line.split()) for line in (HERE / "digests.txt").read_text().splitlines())
PROGRAMS = {
    value.name: value for value in vars(programs).values()
    if isinstance(value, type) and issubclass(value, Program) and value is not Program
}  # fmt: skip


def tasks(log: Path) -> list[Replay]:
    return Replay.every(PROGRAMS[log.stem.rpartition("-")[2]], log=log)


def test_no_golden_log_was_changed_added_silently_or_lost() -> None:
    assert {log.name: hashlib.sha256(log.read_bytes()).hexdigest() for log in LOGS} == DIGESTS
    assert max(log.stat().st_size for log in LOGS) < 100_000


@pytest.mark.parametrize("log", LOGS, ids=lambda log: log.stem)
def test_every_task_replays_the_same(log: Path) -> None:
    reports = [task.report for task in tasks(log)]
    assert reports
    assert [report for report in reports if not report.same or report.stopped] == []


def test_the_golden_logs_hold_every_kind_of_event_of_a_task() -> None:
    kinds = {event.type for log in LOGS for task in tasks(log) for event in task.events}
    assert kinds >= {
        "TaskSubmitted", "TaskClaimed", "EffectRecorded", "TaskSleeping", "TaskRetried", "TaskCompleted", "TaskFailed",
    }  # fmt: skip


def test_every_program_has_a_golden_log() -> None:
    assert {log.stem.rpartition("-")[2] for log in LOGS} == set(PROGRAMS)
