"""A task's life as a fold of its events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from dspex.core.events import (
    AttemptDied,
    EffectRecorded,
    Event,
    Head,
    OutcomeReported,
    Payload,
    SignalReceived,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskDuplicate,
    TaskFailed,
    TaskRetried,
    TaskSleeping,
    TaskSubmitted,
    UnknownEvent,
)  # fmt: skip
from dspex.core.task import TERMINAL, Status, TaskState, fold


def events(*payloads: Payload, start: int = 1) -> list[Event]:
    return [
        Event(
            aggregate="task.qabot.42", version=version, time="2026-11-23T10:00:00Z", source="/x", correlation="42",
            causation="42", data=data, position=100 + version,
        )
        for version, data in enumerate(payloads, start)
    ]  # fmt: skip


def claim(attempt: int = 1) -> TaskClaimed:
    return TaskClaimed(attempt=attempt, agent=f"qabot-{attempt}", assignment="abc")


DONE = TaskCompleted(output=Raw(b'{"answer":"x"}'), seconds=0.5)
FAILED = TaskFailed(code=408, type="DeadlineExceeded", message="too late", detail="inside")
ENDINGS: list[tuple[Payload, Status]] = [
    (DONE, "completed"), (FAILED, "failed"), (TaskDuplicate(of="7", key="k"), "duplicate"),
    (TaskDeadLettered(attempts=3, reason="died"), "dead"), (TaskCancelled(reason="no need"), "cancelled"),
]  # fmt: skip


def test_a_task_without_events_is_submitted() -> None:
    assert fold([]) == TaskState()
    assert fold([]).status == "submitted" and not fold([]).ended


def test_a_claim_makes_it_running_and_says_who_holds_it() -> None:
    state = fold(events(claim(2)))
    assert (state.status, state.attempts, state.agent, state.assignment) == ("running", 2, "qabot-2", "abc")
    assert not state.ended


@pytest.mark.parametrize(("payload", "status"), ENDINGS)
def test_each_ending_ends_it(payload: Payload, status: Status) -> None:
    state = fold(events(claim(), payload))
    assert state.status == status and state.ended


def test_the_endings_are_the_terminal_states_and_nothing_else_is() -> None:
    assert {status for _, status in ENDINGS} == TERMINAL
    assert set(get_args(Status)) == TERMINAL | {"submitted", "running", "sleeping"}


def test_the_result_of_each_ending_can_be_told() -> None:
    assert bytes(fold(events(DONE)).output or b"") == b'{"answer":"x"}'
    failed = fold(events(FAILED))
    assert (failed.code, failed.error, failed.message) == (408, "DeadlineExceeded", "too late")
    dead = fold(events(TaskDeadLettered(attempts=3, reason="died")))
    assert (dead.code, dead.error, dead.message) == (500, "TaskDeadLettered", "died")
    assert fold(events(TaskDuplicate(of="7", key="k"))).of == "7"


def test_sleeping_is_no_ending_and_a_claim_wakes_it() -> None:
    asleep = fold(events(claim(), TaskSleeping(key="nap", until=5.0)))
    assert asleep.status == "sleeping" and not asleep.ended and len(asleep.waits) == 1
    awake = fold(events(claim(2), start=3), asleep)
    assert awake.status == "running" and awake.waits == ()


@pytest.mark.parametrize(
    "payload",
    [
        UnknownEvent(type="TaskPainted", data=Raw(b"{}")), SignalReceived(name="a", position=1, value=Raw(b"1")),
        EffectRecorded(key="k", name="n", digest="d"), OutcomeReported(program="qabot", outcome=Raw(b"{}")),
    ],
)  # fmt: skip
def test_what_says_nothing_about_the_task_moves_only_the_head(payload: Payload) -> None:
    before = fold(events(claim()))
    after = fold(events(payload, start=2), before)
    assert after.head == Head(2, 102)
    assert (after.status, after.attempts, after.agent) == (before.status, before.attempts, before.agent)


def test_the_submission_has_no_version_and_leaves_the_head() -> None:
    state = fold(events(TaskSubmitted(program="qabot", input=Raw(b"1")), start=0))
    assert state.head == Head() and state.input is not None


DIED = AttemptDied(attempt=2, agent="a", reason="SIGKILL", alone=True)


def test_deaths_are_counted_until_the_task_comes_to_rest() -> None:
    died = [claim(2), DIED, claim(3)]
    assert fold(events(*died)).deaths == (DIED,)
    for rest in (TaskSleeping(key="a", until=1.0), TaskRetried(retry=1, type="t", message="m", until=1.0)):
        assert fold(events(*died, rest)).deaths == ()


def test_a_claim_says_where_it_stands_and_whether_it_is_alone() -> None:
    state = fold(events(claim(1), TaskClaimed(attempt=2, agent="a", assignment="x", alone=True)))
    assert (state.claimed_at, state.alone) == (102, True)
    assert not fold(events(claim(3), start=103), state).alone


payloads = st.lists(
    st.sampled_from(
        [claim(1), claim(2), DIED, TaskSleeping(key="k", until=1.0), TaskRetried(retry=1, type="t", message="m", until=1.0),
         *(payload for payload, _ in ENDINGS), UnknownEvent(type="New", data=Raw(b"{}"))]
    ),
    max_size=12,
)  # fmt: skip


@given(payloads, st.integers(0, 12))
def test_folding_in_two_steps_is_folding_at_once(found: Sequence[Payload], cut: int) -> None:
    story = events(*found)
    assert fold(story[cut:], fold(story[:cut])) == fold(story)


@given(payloads)
def test_the_head_is_that_of_the_last_event(found: Sequence[Payload]) -> None:
    story = events(*found)
    assert fold(story).head == (Head(len(story), 100 + len(story)) if story else Head())
