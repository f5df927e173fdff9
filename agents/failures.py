"""Failures of a task, put into the words that the log keeps and those that a client may read."""

from __future__ import annotations

import traceback

from dspex.agents import logtime
from dspex.core.errors import BreakerOpen, ProgramFailed, TaskError
from dspex.core.events import TaskFailed, TaskRetried
from dspex.core.retry import Retry

__all__ = ["failed", "program_failed", "retried"]

MAX_WORDS = 2000
"""Characters of an error's message that a client gets."""


def program_failed(name: str, error: BaseException) -> ProgramFailed:
    """What the client is told: the kind of error. Its words may hold anything, so they stay in the log."""
    kind = type(error).__name__
    failure = ProgramFailed(f"{name} raised {kind}; its events have the details", type=kind)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    failure.detail = f"{type(error).__name__}: {_words(error)[:1000]}{place}"
    return failure


def failed(error: TaskError, seconds: float) -> TaskFailed:
    """The event of a task that ended in an error after `seconds`."""
    return TaskFailed(
        code=error.code, type=_clean(error.type, 200), message=_clean(error.message, MAX_WORDS),
        detail=_clean(error.detail, MAX_WORDS), seconds=round(seconds, 6),
    )  # fmt: skip


def retried(
    policy: Retry | None, error: TaskError, *, retries: int, task: str, deadline: float | None
) -> TaskRetried | None:
    """What a program's policy says of an error that the program raised; None when it is the end. `deadline` is the
    task's, in seconds since the epoch."""
    cause = error.__cause__ or error
    delay = policy.wait(cause, retries + 1, task) if policy else None
    if policy is None or delay is None:
        return None
    until = logtime.now() + delay
    if isinstance(cause, BreakerOpen):  # before that it is only refused again
        until = max(until, cause.due)
    if deadline is not None and deadline < until:
        return None
    return TaskRetried(
        retry=retries + 1, type=_clean(error.type, 200), message=_clean(error.message, MAX_WORDS),
        until=until, clean=policy.clean,
    )  # fmt: skip


def _words(error: BaseException) -> str:
    """What an exception says, whose `__str__` may raise itself."""
    try:
        return str(error)
    except Exception:
        return "its words cannot be read"


def _clean(text: object, limit: int) -> str:
    """Text that JSON can hold, of bounded length."""
    return str(text)[:limit].encode("utf-8", "backslashreplace").decode()
