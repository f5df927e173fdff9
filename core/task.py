"""A task's life, decided in pure functions: the fold of its events, and what an attempt may do next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from msgspec import Raw

from dspex.core.events import (
    Event,
    Head,
    InputSealed,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskDuplicate,
    TaskFailed,
    TaskRetried,
    TaskSleeping,
    TaskSubmitted,
)

__all__ = ["Status", "TaskState", "fold", "may_attempt"]

Status = Literal["submitted", "running", "sleeping", "completed", "failed", "dead", "duplicate", "cancelled"]
TERMINAL = frozenset({"completed", "failed", "dead", "duplicate", "cancelled"})


@dataclass(frozen=True, slots=True)
class TaskState:
    """Where a task stands after some of its events. `head` is where the aggregate stands; `rested` is the last
    attempt that ended as it should, by going to sleep; `waits` is what a sleeping task waits for."""

    status: Status = "submitted"
    attempts: int = 0
    rested: int = 0
    retries: int = 0
    waits: tuple[TaskSleeping, ...] = ()
    agent: str = ""
    assignment: str = ""
    input: Raw | None = None
    output: Raw | None = None
    code: int = 0
    error: str = ""
    message: str = ""
    of: str = ""
    seconds: float = 0.0
    head: Head = Head()  # noqa: RUF009 - frozen

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL


def fold(events: Iterable[Event], state: TaskState = TaskState()) -> TaskState:
    """The state after `events`. An event of a kind that says nothing about the task changes only the head."""
    for event in events:
        state = _evolve(state, event)
        if event.version:
            state = replace(state, head=Head(event.version, event.position))
    return state


def _evolve(state: TaskState, event: Event) -> TaskState:
    match event.data:
        case TaskSubmitted(input=input) | InputSealed(input=input):
            return replace(state, input=input)
        case TaskClaimed(attempt=attempt, agent=agent, assignment=assignment):
            return replace(
                state, status="running", attempts=attempt, agent=agent, assignment=assignment,
                waits=(),
            )  # fmt: skip
        case TaskSleeping():
            return replace(state, status="sleeping", rested=state.attempts, waits=(*state.waits, event.data))
        case TaskRetried(retry=retry):
            return replace(state, status="sleeping", rested=state.attempts, retries=retry)
        case TaskCompleted(output=output, seconds=seconds):
            return replace(state, status="completed", output=output, seconds=seconds)
        case TaskFailed(code=code, type=kind, message=message, seconds=seconds):
            return replace(state, status="failed", code=code, error=kind, message=message, seconds=seconds)
        case TaskDuplicate(of=of):
            return replace(state, status="duplicate", of=of)
        case TaskDeadLettered(reason=reason):
            return replace(state, status="dead", code=500, error="TaskDeadLettered", message=reason)
        case TaskCancelled(reason=reason):
            message = f"the task was cancelled: {reason}" if reason else "the task was cancelled"
            return replace(state, status="cancelled", code=409, error="TaskCancelled", message=message, waits=())
        case _:
            return state


def may_attempt(state: TaskState, limit: int) -> bool:
    """Whether a task whose last attempt did not come to an end may be tried once more.

    An attempt that died before it wrote anything is not in the log, so the first claim seen counts as the second try.
    """
    return not state.ended and state.attempts - state.rested < limit
