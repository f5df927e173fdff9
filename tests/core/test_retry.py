"""When a task is tried again."""

from __future__ import annotations

import math
from typing import Any

import pytest
from msgspec import Raw

from dspex.core.errors import (
    DeadlineExceeded,
    InvalidInput,
    LimitExceeded,
    NotFound,
    ProgramFailed,
    TaskError,
    Unavailable,
)
from dspex.core.events import EffectRecorded, Event, Payload, TaskRetried, TaskSleeping
from dspex.core.history import remembered
from dspex.core.retry import Retry


def test_the_backoff_grows_up_to_its_longest() -> None:
    policy = Retry(attempts=5, backoff=1, factor=3, longest=10, jitter=0)
    assert [policy.delay(n, "1") for n in range(1, 7)] == [1, 3, 9, 10, 10, None]


def test_jitter_only_takes_away_and_is_the_same_for_a_task() -> None:
    policy = Retry(backoff=8, jitter=0.5)
    delays = {policy.delay(1, str(task)) for task in range(100)}
    assert len(delays) > 90
    assert all(delay is not None and 4 <= delay <= 8 for delay in delays)
    assert policy.delay(1, "7") == policy.delay(1, "7") != policy.delay(1, "8")


@pytest.mark.parametrize(
    "wrong", [{"attempts": 0}, {"backoff": 0}, {"factor": 0.5}, {"longest": -1}, {"jitter": 1.5}], ids=str
)
def test_numbers_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="attempts from 1"):
        Retry(**wrong)


def test_a_huge_number_of_retries_is_no_overflow() -> None:
    assert Retry(attempts=100_000, jitter=0).delay(5_000, "1") == 300


class Later(Exception):
    def __init__(self, retry_after: object) -> None:
        self.retry_after = retry_after


@pytest.mark.parametrize(
    ("error", "waited"),
    [
        (ValueError(), 1.0), (KeyError(), None), (ProgramFailed("no"), 1.0), (InvalidInput("no"), None),
        (NotFound("no"), None), (DeadlineExceeded("late"), 1.0), (LimitExceeded("full", retry_after=7.0), 7.0),
        (Unavailable("away", retry_after=0.5), 1.0), (Later(9), 9.0), (Later("soon"), 1.0), (Later(math.inf), 1.0),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_worth_another_try_and_when(error: Exception, waited: float | None) -> None:
    policy = Retry(attempts=2, jitter=0, on=(ValueError, TaskError, Later))
    assert policy.wait(error, 1, "7") == waited
    assert policy.wait(error, 3, "7") is None


def _event(data: Payload) -> Event:
    return Event(aggregate="task.p.1", version=1, time="", source="", correlation="", causation="", data=data)


@pytest.mark.parametrize(("clean", "left", "life"), [(False, {"a"}, 0), (True, set(), 1)])
def test_what_a_retry_remembers(clean: bool, left: set[str], life: int) -> None:
    story = [
        EffectRecorded(key="a", name="a", digest="", result=Raw(b"1")),
        EffectRecorded(key="b", name="b", digest="", error="builtins:ValueError"),
        TaskSleeping(key="s", until=1.0),
        TaskRetried(retry=1, type="ValueError", message="", until=2.0, clean=clean),
    ]
    memory = remembered(map(_event, story))
    assert set(memory.records) == left
    assert memory.life == life
    assert ("s" in memory.until) is not clean
