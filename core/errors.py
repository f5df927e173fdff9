"""The errors people see. Each has fields and writes its own sentence.

DspexError
├── DefinitionError        a mistake in a class, found when the class is defined
├── InvalidAssignment      a value outside its variable, an unknown variable, a broken constraint
├── ConfigurationError     a setting, a file or a folder that cannot be used
├── ConnectionFailed       no server answers (exit code 3)
├── LogError               the log could not take or give what was asked
│   └── LogCorrupt         what is stored is not what was written
└── TaskError              a task did not end in an output; `code` is the service error code
    ├── InvalidInput       400
    ├── NotFound           404
    ├── DeadlineExceeded   408
    ├── Conflict           409
    ├── Forgotten          410, its values were forgotten on purpose
    ├── LimitExceeded      429
    │   └── BudgetExhausted  an effect would cost more than a budget has left
    ├── ProgramFailed      500
    │   └── EffectFailed   an effect raised, or gave what cannot be recorded
    ├── BreakerOpen        503, an effect is not called for now
    └── Unavailable        503
"""

from __future__ import annotations

__all__ = [
    "BreakerOpen",
    "BudgetExhausted",
    "ConfigurationError",
    "Conflict",
    "ConnectionFailed",
    "DeadlineExceeded",
    "DefinitionError",
    "DspexError",
    "EffectFailed",
    "Forgotten",
    "InvalidAssignment",
    "InvalidInput",
    "LimitExceeded",
    "LogCorrupt",
    "LogError",
    "NotFound",
    "ProgramFailed",
    "TaskError",
    "Unavailable",
    "task_error",
]


class DspexError(Exception):
    """The root of every error that dspex raises on purpose. `str(error)` is one plain sentence."""


class DefinitionError(DspexError):
    """A class that cannot work, refused when it is defined.

    Fields: `program` (the class), `field` (where in it), `value` (what was found), `problem`, `remedy`.
    """

    def __init__(self, program: str, field: str, value: object, problem: str, remedy: str) -> None:
        self.program, self.field, self.value = program, field, value
        self.problem, self.remedy = problem, remedy
        place = f"{program}.{field}" if field else program
        super().__init__(f"{place} = {_shown(value)}: {problem}; {remedy}.")


class InvalidAssignment(DspexError):
    """A set of values that a space does not admit. Fields: `path`, `value`, `problem`."""

    def __init__(self, path: str, value: object, problem: str) -> None:
        self.path, self.value, self.problem = path, value, problem
        super().__init__(f"{path} = {_shown(value)}: {problem}.")


class ConfigurationError(DspexError):
    """A setting, file or folder that cannot be used; the message says which and what to do."""


class ConnectionFailed(DspexError):
    """No server answers at the address given."""


class LogError(DspexError):
    """The log could not take or give what was asked; nothing is half done."""


class LogCorrupt(LogError):
    """What is stored is not what was written."""


class TaskError(DspexError):
    """A task did not end in an output.

    Fields: `code` (the `Nats-Service-Error-Code`), `type` (the error's class name), `message`, `task` (its id or
    None), `retry_after` (seconds after which it is worth trying again, or None), and `detail`, which is for the
    program's author and is never sent to a client.
    """

    code: int = 500
    detail: str = ""

    def __init__(
        self, message: str, *, type: str = "", task: str | None = None, code: int | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        self.message, self.task, self.retry_after = message, task, retry_after
        self.type = type or self.__class__.__name__
        if code is not None:
            self.code = code
        super().__init__(message)


class InvalidInput(TaskError):
    """The body is not the program's Input (400)."""

    code = 400


class NotFound(TaskError):
    """No such program or task (404)."""

    code = 404


class DeadlineExceeded(TaskError):
    """The task was not done by its deadline (408)."""

    code = 408


class Conflict(TaskError):
    """Somebody else changed it first, or it exists with another content (409)."""

    code = 409


class Forgotten(TaskError):
    """What the task holds was forgotten on purpose, and nobody can give it back (410)."""

    code = 410


class LimitExceeded(TaskError):
    """A bound, a rate or a budget is used up (429)."""

    code = 429


class BudgetExhausted(LimitExceeded):
    """An effect was not performed, because a budget has not so much left (429). Field: `renews`, when the budget does,
    in seconds since the epoch; 0 when it never does."""

    def __init__(
        self, message: str, renews: float = 0.0, *, type: str = "", task: str | None = None, code: int | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message, type=type, task=task, code=code, retry_after=retry_after)
        self.renews = renews
        self.args = (message, renews)  # what is recorded of it, and what it is made from again


class ProgramFailed(TaskError):
    """The program raised, or gave what is not its Output (500). Raise it in a program to choose the words."""

    code = 500


class EffectFailed(ProgramFailed):
    """An effect raised, or gave a result that cannot be recorded. Field: `name`, the effect's."""

    def __init__(self, message: str, *, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class Unavailable(TaskError):
    """Nobody can serve this now: draining, stopping, or no agent (503)."""

    code = 503


class BreakerOpen(TaskError):
    """An effect was not called, because its circuit breaker is open (503). Field: `due`, when it may be tried again, in
    seconds since the epoch."""

    code = 503

    def __init__(
        self, message: str, due: float = 0.0, *, type: str = "", task: str | None = None, code: int | None = None,
        retry_after: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message, type=type, task=task, code=code, retry_after=retry_after)
        self.due = due
        self.args = (message, due)  # what is recorded of it, and what it is made from again

    def __str__(self) -> str:
        return self.message


_BY_CODE: dict[int, type[TaskError]] = {
    kind.code: kind
    for kind in (
        InvalidInput,
        NotFound,
        DeadlineExceeded,
        Conflict,
        Forgotten,
        LimitExceeded,
        ProgramFailed,
        Unavailable,
    )
}


_BY_TYPE: dict[str, type[TaskError]] = {kind.__name__: kind for kind in (BreakerOpen, BudgetExhausted)}


def task_error(
    code: int, message: str, *, type: str = "", task: str | None = None, retry_after: float | None = None
) -> TaskError:
    """The error class for a service error code; an unknown code gives a plain TaskError that carries it."""
    kind = _BY_TYPE.get(type) or _BY_CODE.get(code, TaskError)
    return kind(message, type=type, task=task, code=code, retry_after=retry_after)


def _shown(value: object, limit: int = 80) -> str:
    if isinstance(value, type):
        return value.__name__
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
