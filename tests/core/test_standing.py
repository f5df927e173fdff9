"""What a log process knows of open tasks is what the fold of the whole log says."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspex.core.codec import encode_commit, encode_event
from dspex.core.errors import LogCorrupt
from dspex.core.events import (
    PAYLOADS,
    Event,
    Payload,
    SignalReceived,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskDuplicate,
    TaskFailed,
    TaskForked,
    TaskRetried,
    TaskSleeping,
)
from dspex.core.standing import Checkpoint, Standing, briefs
from dspex.core.subjects import Subjects
from dspex.core.task import fold

SUBJECTS = Subjects()
RAW = msgspec.Raw(b"null")
OF_A_TASK: list[Payload] = [
    TaskClaimed(attempt=1, agent="a", assignment="", code=""), TaskSleeping(key="k", until=None, signal="go"),
    TaskRetried(retry=1, type="E", message="", until=0.0, clean=False), TaskCompleted(output=RAW, seconds=0.0),
    TaskFailed(code=500, type="E", message="", detail="", seconds=0.0), TaskDuplicate(of="1", key="k"),
    TaskDeadLettered(attempts=1, reason=""), TaskCancelled(), TaskForked(parent="1", at=1, seed="1"),
]  # fmt: skip


def event(name: str, version: int, data: Payload, position: int = 0) -> Event:
    return Event(name, version, "2026-11-23T10:00:00.000000Z", "tests", "1", "1", data, position)


def test_every_event_of_a_task_is_in_this_test() -> None:
    kinds = {name for name in PAYLOADS if name.startswith("Task")}
    elsewhere = {"TaskSubmitted", "TaskForgotten", "TaskResubmitted", "TaskDropped"}
    assert kinds == {type(data).__name__ for data in OF_A_TASK} | elsewhere


@pytest.mark.parametrize("data", OF_A_TASK, ids=lambda data: type(data).__name__)
def test_what_ends_a_task_in_the_fold_ends_it_here(data: Payload) -> None:
    standing = Standing(SUBJECTS)
    standing.door(7, "task", "qabot", b"{}")
    standing.row(8, SUBJECTS.event("task.qabot.7"), encode_commit([event("task.qabot.7", 1, data)]))
    state = fold([event("task.qabot.7", 1, data)])
    assert standing.is_open(7) is not state.ended
    assert (7 in standing.asleep) is (state.status == "sleeping")


steps = st.lists(st.tuples(st.integers(0, 4), st.sampled_from([*OF_A_TASK, "submit", "signal", "take"])), max_size=40)


def play(steps: list[tuple[int, Any]]) -> tuple[list[tuple[int, str, bytes]], dict[int, list[Event]], dict[int, int]]:
    """Rows of a log, the events of each task, and the signals that are in no inbox, by position."""
    rows: list[tuple[int, str, bytes]] = []
    tasks: dict[int, list[Event]] = {}
    signals: dict[int, int] = {}
    for number, what in steps:
        position = len(rows) + 1
        task = sorted(tasks)[number % len(tasks)] if tasks else 0
        if what == "submit":
            tasks[position] = []
            rows.append((position, SUBJECTS.door("task", "qabot"), b"{}"))
        elif what == "signal":
            if task and not fold(tasks[task]).ended:
                signals[position] = task
            rows.append((position, SUBJECTS.door("signal", "qabot"), b'{"task": "%d", "name": "go"}' % task))
        elif task and not fold(tasks[task]).ended:
            name = f"task.qabot.{task}"
            if what == "take":
                taken = next((at for at, of in signals.items() if of == task), None)
                if taken is None:
                    continue
                del signals[taken]
                name = f"inbox.qabot.{task}"
                what = SignalReceived(name="go", position=taken, value=RAW)
                rows.append((position, SUBJECTS.event(name), encode_commit([event(name, 1, what)])))
                continue
            made = event(name, len(tasks[task]) + 1, what, position)
            tasks[task].append(made)
            rows.append((position, SUBJECTS.event(name), encode_commit([made])))
            if fold(tasks[task]).ended:
                signals = {at: of for at, of in signals.items() if of != task}
    return rows, tasks, signals


@given(steps, st.integers(0, 40))
def test_any_log_stands_as_its_fold_does_also_from_a_checkpoint(steps: list[tuple[int, Any]], cut: int) -> None:
    rows, tasks, signals = play(steps)
    standing = Standing(SUBJECTS)
    for number, row in enumerate(rows):
        if number == cut:
            kept = msgspec.json.decode(msgspec.json.encode(standing.checkpoint("e")), type=Checkpoint)
            standing = Standing(SUBJECTS)
            standing.resume(kept)
        standing.row(*row)
    states = {task: fold(events) for task, events in tasks.items()}
    assert set(standing.asleep) == {task for task, state in states.items() if state.status == "sleeping"}
    assert set(standing.awake) == {
        task for task, state in states.items() if not state.ended and state.status != "sleeping"
    }
    assert {at: task for at, (_, task) in standing.signals.items()} == signals
    assert standing.position == len(rows)


@pytest.mark.parametrize("body", [b"", b"rubbish", b"[]", b"[{}]", b"[[]]", b"\xff", b'{"type": "TaskCompleted"}'])
def test_rubbish_is_passed_over(body: bytes) -> None:
    with pytest.raises(LogCorrupt):
        briefs(body)
    standing = Standing(SUBJECTS)
    standing.row(1, SUBJECTS.door("task", "qabot"), body)
    standing.row(2, SUBJECTS.event("task.qabot.1"), body)
    standing.row(3, SUBJECTS.door("signal", "qabot"), body)
    assert (standing.awake, standing.signals, standing.position) == ({1: "qabot"}, {}, 3)


def test_a_brief_is_an_event_in_short() -> None:
    whole = event("task.qabot.7", 1, OF_A_TASK[0])
    assert briefs(b"[" + encode_event(whole) + b"]")[0].type == "TaskClaimed"
