"""A task's life, decided in pure functions: the fold of its events, and what an attempt may do next."""

from __future__ import annotations

from typing import Literal, get_args

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from dspex.core.events import (
    AttemptDied,
    EffectRecorded,
    Event,
    Head,
    InputSealed,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskDuplicate,
    TaskFailed,
    TaskForked,
    TaskRetried,
    TaskSleeping,
    TaskSubmitted,
)
from dspex.core.fold import Fold
from dspex.core.headers import CODE

__all__ = ["STATES", "TERMINAL", "Status", "TaskState", "fold"]

Status = Literal["submitted", "running", "sleeping", "completed", "failed", "dead", "duplicate", "cancelled"]
STATES: tuple[Status, ...] = get_args(Status)
TERMINAL = frozenset({"completed", "failed", "dead", "duplicate", "cancelled"})


class TaskState(Struct, frozen=True, omit_defaults=True, gc=False):
    """Where a task stands after some of its events. `head` is where the aggregate stands; `rested` is the last
    attempt that ended as it should, by going to sleep; `waits` is what a sleeping task waits for. `code_version` is
    that of the last claim, or before there is one, the only one that may run it. `forked` says of whom it is a fork.
    `claimed_at` is where the last claim stands in the log, and `alone` what it says; `deaths` are the attempts that
    died since the task last came to rest."""

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
    code_version: str = ""
    forked: TaskForked | None = None
    seconds: float = 0.0
    claimed_at: int = 0
    alone: bool = False
    deaths: tuple[AttemptDied, ...] = ()
    head: Head = Head()

    @property
    def ended(self) -> bool:
        return self.status in TERMINAL


def _evolve(state: TaskState, event: Event) -> TaskState:
    """An event of a kind that says nothing about the task changes only the head."""
    head = Head(event.version, event.position) if event.version else state.head
    match event.data:
        case EffectRecorded():
            return replace(state, head=head)
        case TaskSubmitted(input=input, headers=headers):
            return replace(state, head=head, input=input, code_version=headers.get(CODE, ""))
        case InputSealed(input=input):
            return replace(state, head=head, input=input)
        case TaskForked():
            return replace(state, head=head, forked=event.data)
        case TaskClaimed(attempt=attempt, agent=agent, assignment=assignment, code=code, alone=alone):
            return replace(
                state, head=head, status="running", attempts=attempt, agent=agent, assignment=assignment,
                code_version=code, waits=(), claimed_at=event.position, alone=alone is True,
            )  # fmt: skip
        case AttemptDied() as death:
            return replace(state, head=head, deaths=(*state.deaths, death))
        case TaskCompleted(output=output, seconds=seconds):
            return replace(state, head=head, status="completed", output=output, seconds=seconds)
        case TaskSleeping() as wait:
            return replace(
                state, head=head, status="sleeping", rested=state.attempts, deaths=(), waits=(*state.waits, wait)
            )
        case TaskRetried(retry=retry):
            return replace(state, head=head, status="sleeping", rested=state.attempts, deaths=(), retries=retry)
        case TaskFailed(code=code, type=kind, message=message, seconds=seconds):
            return replace(
                state, head=head, status="failed", code=code, error=kind, message=message, seconds=seconds
            )
        case TaskDuplicate(of=of):
            return replace(state, head=head, status="duplicate", of=of)
        case TaskDeadLettered(reason=reason):
            return replace(state, head=head, status="dead", code=500, error="TaskDeadLettered", message=reason)
        case TaskCancelled(reason=reason):
            message = f"the task was cancelled: {reason}" if reason else "the task was cancelled"
            return replace(
                state, head=head, status="cancelled", code=409, error="TaskCancelled", message=message, waits=()
            )
        case _:
            return replace(state, head=head)


class _Kept(TaskState, frozen=True):
    """A state as it is read back: msgspec decodes no `Raw | None`; what is left out, because it is None, is empty."""

    input: Raw = Raw()
    output: Raw = Raw()


_decode_kept = msgspec.json.Decoder(_Kept).decode


def _load(data: bytes) -> TaskState:
    kept = _decode_kept(data)
    fields = {name: getattr(kept, name) for name in TaskState.__struct_fields__}
    for name in ("input", "output"):
        fields[name] = fields[name] if bytes(fields[name]) else None
    return TaskState(**fields)


fold = Fold(kind="task", version=3, initial=TaskState(), evolve=_evolve, load=_load)
"""The state of a task after some of its events."""
