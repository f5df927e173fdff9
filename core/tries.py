"""The attempts on a task, told from its events: who held it, when, what it recorded, and how that ended."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from dspex.core.events import (
    AttemptDied,
    EffectRecorded,
    Event,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskDuplicate,
    TaskFailed,
    TaskRetried,
    TaskSleeping,
)

__all__ = ["Try", "tries_of"]

_NO_ATTEMPTS = (TaskDeadLettered, TaskDuplicate)
"""What ends a task without being the end of an attempt."""


class Try(Struct, kw_only=True):
    """One attempt. Times are RFC 3339 in UTC; `effects` is how many it recorded; `end` is `SIGKILL`, `exit 3`, `408
    DeadlineExceeded`, `slept`, …, and `where` what the log has of the place and the words. `alone`: nothing else ran in
    its process."""

    attempt: int
    agent: str = ""
    began: str = ""
    ended: str = ""
    effects: int = 0
    alone: bool = False
    end: str = ""
    where: str = ""


def tries_of(events: Iterable[Event]) -> list[Try]:
    """The attempts in the order in which they began. One that ended before it wrote anything is known by the number of
    the next; of one without an end nobody knows more than that it was lost, unless it is the last and goes on."""
    tries: list[Try] = []
    for event in events:
        match event.data:
            case TaskClaimed(attempt=attempt, agent=agent, alone=alone):
                if attempt > 1 and not tries:
                    tries.append(Try(attempt=1, end="lost", where="it had written nothing"))
                if tries and not tries[-1].end:
                    tries[-1].end = "lost"
                tries.append(Try(attempt=attempt, agent=agent, began=event.time, alone=alone is True))
            case EffectRecorded() if tries:
                tries[-1].effects += 1
            case AttemptDied(reason=reason):
                _end(tries, event, reason)
            case TaskSleeping(signal=signal):
                _end(tries, event, "slept", f"for the signal {signal}" if signal else "")
            case TaskRetried(type=kind, message=message, retry=retry):
                _end(tries, event, f"raised {kind}", f"{message}; retry {retry} was planned")
            case TaskFailed(code=code, type=kind, message=message, detail=detail):
                _end(tries, event, f"{code} {kind}", detail or message)
            case TaskCancelled(reason=reason):
                _end(tries, event, "cancelled", reason)
            case TaskCompleted():
                _end(tries, event, "completed")
            case end if isinstance(end, _NO_ATTEMPTS) and tries and not tries[-1].end:
                tries[-1].end = "lost"
    return tries


def _end(tries: list[Try], event: Event, end: str, where: str = "") -> None:
    if tries and not tries[-1].end:
        tries[-1].end, tries[-1].where, tries[-1].ended = end, where, event.time
