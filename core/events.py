"""What can happen: one frozen record per event type, and the envelope around it.

Types are past tense and are never changed once a log holds them: a new shape is a new `schema` number and an
upcaster in `codec`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from msgspec import UNSET, Raw, Struct, UnsetType, field

__all__ = [
    "PAYLOADS", "AgentCrashed", "AgentGaveUp", "AgentStarted", "AgentStopped", "AssignmentProposed", "AttemptDied",
    "BreakerClosed", "BreakerHalfOpened", "BreakerOpened", "BudgetLeased", "BudgetSettled", "DoorsClosed",
    "DoorsOpened", "EffectRecorded", "EffectRetried", "EffectsInterrupted", "Event", "Head", "Held", "InputSealed",
    "Interrupted", "KeyBound", "LimitCleared", "LimitReached", "LimitSet", "OutcomeReported", "Payload", "Permit",
    "ProgramRegistered", "ProgramReloaded", "ProgramScaled", "SignalReceived", "SignalSent", "TaskCancelled",
    "TaskClaimed", "TaskCompleted", "TaskDeadLettered", "TaskDropped", "TaskDuplicate", "TaskFailed", "TaskForgotten",
    "TaskForked", "TaskResubmitted", "TaskRetried", "TaskSleeping", "TaskSubmitted", "UnknownEvent", "Usage",
]  # fmt: skip


class Head(Struct, frozen=True, order=True, gc=False):
    """Where an aggregate stands: the version of its last event and the log position of its last commit."""

    version: int = 0
    position: int = 0


class Payload(Struct, frozen=True, kw_only=True, gc=False):
    """What an event says. The class name is the event type. Never part of a cycle, so the collector leaves it alone."""

    schema: ClassVar[int] = 1


class Held(Struct, frozen=True, omit_defaults=True):
    """Where a value is that is not in its event as it stands: `sealed` with the key of this name (base64 of nonce and
    ciphertext), or in the object store as the `blob` of this SHA-256 and `size` in bytes, or both: then the blob is
    what is sealed. It stands beside the value and never in its place, so no value can be taken for one."""

    key: str = ""
    sealed: str = ""
    blob: str = ""
    size: int = 0


class TaskSubmitted(Payload, frozen=True, kw_only=True):
    """A task came in through its door. `input` is the body as it came (JSON), or null when it is not JSON; of a sealed
    one it is what is open."""

    program: str
    input: Raw
    headers: dict[str, str] = field(default_factory=dict)
    held: Held | UnsetType = UNSET


class OutcomeReported(Payload, frozen=True, kw_only=True):
    """Somebody scored a task. `outcome` is the body as it came."""

    program: str
    outcome: Raw


class SignalSent(Payload, frozen=True, kw_only=True):
    """Somebody told a task something. `signal` is the body as it came."""

    program: str
    signal: Raw
    held: Held | UnsetType = UNSET


class InputSealed(Payload, frozen=True, kw_only=True):
    """A private input that came in the open, kept here sealed: its message is erased when the task has ended. `input`
    is what is open of it, `headers` and `stored` (seconds since the epoch) are those of the message."""

    input: Raw
    held: Held
    stored: float
    headers: dict[str, str] = field(default_factory=dict)


class TaskClaimed(Payload, frozen=True, kw_only=True):
    """An attempt began to hold the task. `assignment` is the hash of the values it runs on; `alone` says that nothing
    else runs in its process; `wake` is the position of the wake that it took the task with, in the stream of timers."""

    attempt: int
    agent: str
    assignment: str
    code: str = ""
    alone: bool | UnsetType = UNSET
    wake: int | UnsetType = UNSET


class AttemptDied(Payload, frozen=True, kw_only=True):
    """The process of an attempt died while it held the task, and `reason` says of what (`SIGKILL`, `exit 3`). Written
    by whoever took the task over, as far as the log says of that process that it crashed."""

    attempt: int
    agent: str
    reason: str
    alone: bool = False


class TaskForked(Payload, frozen=True, kw_only=True):
    """The task shares what its `parent` had recorded up to the parent's event `at`, and goes on from there by itself.

    `records` is how many records it shares: so many copies follow. `waits` are the ends of the waits that were under
    way at that point, by place. `seed` is the task whose random numbers it draws, `life` how often that had begun
    anew; a retry has the idempotency keys of the task `keys`, so that what was under way is known outside when it comes
    again.
    """

    parent: str
    at: int
    seed: str
    life: int = 0
    records: int = 0
    waits: dict[str, float | None] = field(default_factory=dict)
    keys: str | UnsetType = UNSET


class Usage(Struct, frozen=True):
    """What an effect has cost: dollars, tokens, calls (0 for an effect that only reads), and of which model, if any."""

    usd: float = 0.0
    tokens: int = 0
    calls: int = 0
    model: str | UnsetType = UNSET


class EffectRecorded(Payload, frozen=True, kw_only=True):
    """An effect was performed. `key` is its place, `digest` a hash of what was asked, `request` what that was
    (`[positional, by name]`, null when it is large); `result` is what it gave, or `error` the class (`module:name`) and
    `arguments` those of what it raised; for a signal, `arguments` is where it stands. `seconds` is how long it took,
    `usage` what it has cost."""

    key: str
    name: str
    digest: str
    request: Raw = Raw(b"null")
    result: Raw = Raw(b"null")
    error: str = ""
    arguments: list[str | int | float | bool | None] = field(default_factory=list)
    seconds: float = 0.0
    usage: Usage | UnsetType = UNSET
    held: Held | UnsetType = UNSET


class EffectRetried(Payload, frozen=True, kw_only=True):
    """An effect raised, and its policy says to do it again at `until`: its try number `retry` + 1. `type` is the class
    of what it raised, `usage` what that try has cost."""

    key: str
    name: str
    retry: int
    type: str
    until: float
    usage: Usage | UnsetType = UNSET


class Interrupted(Struct, frozen=True):
    """An effect that was under way when its run was stopped: its place, its name, and the key that it gave outside."""

    key: str
    name: str
    idempotency_key: str


class EffectsInterrupted(Payload, frozen=True, kw_only=True):
    """These effects of an attempt were under way when it was stopped, and nobody knows what they did."""

    attempt: int
    agent: str
    effects: list[Interrupted]


class TaskSleeping(Payload, frozen=True, kw_only=True):
    """The task holds no process until `until` (seconds since the epoch), or until it gets the signal `signal`; `key` is
    the place where it waits."""

    key: str
    until: float | None = None
    signal: str = ""


class TaskRetried(Payload, frozen=True, kw_only=True):
    """The program raised, and its policy says to try again at `until`. `clean` forgets the effects so far."""

    retry: int
    type: str
    message: str
    until: float
    clean: bool = False
    held: Held | UnsetType = UNSET


class SignalReceived(Payload, frozen=True, kw_only=True):
    """A signal has reached its task's inbox. `position` is where its door message stands."""

    name: str
    position: int
    value: Raw
    held: Held | UnsetType = UNSET


class TaskCompleted(Payload, frozen=True, kw_only=True):
    """The task ended in an output. `seconds` is how long the program ran."""

    output: Raw
    seconds: float = 0.0
    held: Held | UnsetType = UNSET


class TaskFailed(Payload, frozen=True, kw_only=True):
    """The task ended without an output. `code`, `type` and `message` are what the client is told; `detail` is for
    the program's author: the exception's own words and where it was raised. `tenant` is the account that submitted it,
    when its message is erased and nothing else of it is kept."""

    code: int
    type: str
    message: str
    detail: str = ""
    seconds: float = 0.0
    held: Held | UnsetType = UNSET
    tenant: str | UnsetType = UNSET


class TaskDuplicate(Payload, frozen=True, kw_only=True):
    """The task is another one again: the same program and key. Its result is the result of task `of`."""

    of: str
    key: str


class TaskDeadLettered(Payload, frozen=True, kw_only=True):
    """The task was set aside after `attempts` attempts, none of which came to an end."""

    attempts: int
    reason: str


class TaskForgotten(Payload, frozen=True, kw_only=True):
    """Somebody had what a task holds forgotten: its keys are destroyed, and the objects that only it names."""

    task: str
    actor: str
    reason: str = ""


class TaskCancelled(Payload, frozen=True, kw_only=True):
    """Somebody asked that the task end without an output: `reason` in their words, `by` the name they gave."""

    reason: str = ""
    by: str = ""


class TaskResubmitted(Payload, frozen=True, kw_only=True):
    """A task that had ended without an output was submitted again on somebody's word, as task `successor`; `key` is the
    key of that. It goes on with what was recorded, unless `clean`; `changed` names what was set otherwise."""

    successor: str
    key: str
    actor: str = ""
    clean: bool = False
    changed: list[str] = field(default_factory=list)


class TaskDropped(Payload, frozen=True, kw_only=True):
    """Somebody will have no more done about a task that ended without an output, and says why."""

    actor: str
    why: str


class KeyBound(Payload, frozen=True, kw_only=True):
    """A key belongs to a task for good."""

    key: str
    task: str


class ProgramRegistered(Payload, frozen=True, kw_only=True):
    """A program got its doors. `app` is where its class was found; `fingerprint` is of its name and schemas."""

    program: str
    fingerprint: str
    doc: str
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]
    variables: dict[str, Any]
    app: str = ""


class ProgramScaled(Payload, frozen=True, kw_only=True):
    """A supervisor is to have so many agents of a program from now on, and between `least` and `most` of them when the
    number follows the load. `by` is claimed, not proven; `why` is in words."""

    program: str
    supervisor: str
    agents: int
    least: int
    most: int
    by: str = ""
    why: str = ""


class ProgramReloaded(Payload, frozen=True, kw_only=True):
    """All agents of a program under a supervisor take their tasks with the code version `code` from now on; before that
    it was `was`."""

    program: str
    supervisor: str
    code: str
    was: str = ""
    agents: int = 0
    by: str = ""


class AssignmentProposed(Payload, frozen=True, kw_only=True):
    """Somebody wants these values to be known: tasks may run on them from now on. `assignment` is the hash of `values`,
    one for every active variable; `who` is claimed, not proven, and `why` is in words."""

    assignment: str
    values: dict[str, bool | int | float | str | None]
    who: str = ""
    why: str = ""


class LimitSet(Payload, frozen=True, kw_only=True):
    """The limits of a scope are these from now on, and no others: `{"rate": "20/s", "usd": "5/day"}`. `who` is claimed,
    not proven."""

    scope: str
    limits: dict[str, str]
    who: str = ""
    why: str = ""


class LimitCleared(Payload, frozen=True, kw_only=True):
    """A scope has no limits any more."""

    scope: str
    who: str = ""
    why: str = ""


class LimitReached(Payload, frozen=True, kw_only=True):
    """So much of a limit is used in a window: told once for each of 80 and 100 percent. `limit` is its name (`usd`)."""

    scope: str
    limit: str
    percent: int
    used: float
    of: float
    window: str


class BudgetLeased(Payload, frozen=True, kw_only=True):
    """A process may spend `amount` more of a budget (`resource`) in a window under a lease. `of` is the budget then;
    `overrun` says that it is spent already, because effects cost more than they had said."""

    scope: str
    resource: str
    window: str
    lease: str
    holder: str
    amount: float
    of: float
    overrun: bool = False


class BudgetSettled(Payload, frozen=True, kw_only=True):
    """A lease is over: so much of it was used, the rest is everybody's again. `assumed`: its holder is gone and may
    have spent all of it."""

    scope: str
    resource: str
    window: str
    lease: str
    used: float
    assumed: bool = False


class AgentStarted(Payload, frozen=True, kw_only=True):
    """A process began to serve. `restarts` counts its predecessors under the same name."""

    pid: int
    role: str
    program: str | None = None
    restarts: int = 0


class AgentStopped(Payload, frozen=True, kw_only=True):
    """A process ended on purpose, having finished or handed back what it held."""

    pid: int
    reason: str


class AgentCrashed(Payload, frozen=True, kw_only=True):
    """A process died; `reason` names the signal or the exit status."""

    pid: int
    reason: str


class AgentGaveUp(Payload, frozen=True, kw_only=True):
    """A process will not be started again, after so many `restarts`; `reason` says why."""

    reason: str
    restarts: int = 0


class Permit(Struct, frozen=True):
    """A trial call of `holder`, which counts as lost at `until` (seconds since the epoch)."""

    holder: str
    until: float


class BreakerOpened(Payload, frozen=True, kw_only=True):
    """An effect is not called until `due` (seconds since the epoch): of the `calls` in `window` so many failed
    (`reason` "failures"), were slow ("slow"), or its trial calls did no better ("trial"). `since` is when that was."""

    reason: str
    calls: int
    failures: int
    slow: int
    window: str
    since: float
    due: float


class BreakerHalfOpened(Payload, frozen=True, kw_only=True):
    """A trial call of an effect that was not called began or ended: `permits` are those under way, `calls`, `failures`
    and `slow` those that ended; `since` is when the breaker opened."""

    calls: int = 0
    failures: int = 0
    slow: int = 0
    permits: list[Permit] = field(default_factory=list)
    since: float = 0.0


class BreakerClosed(Payload, frozen=True, kw_only=True):
    """An effect is called again: its trial calls went well (`reason` "trial"), or somebody said so ("reset", `by`)."""

    reason: str
    calls: int = 0
    failures: int = 0
    slow: int = 0
    by: str = ""


class DoorsClosed(Payload, frozen=True, kw_only=True):
    """No new task of `program` ("" of any) is stored for now: `reason` ("room" or "open") and `message` say why. `used`
    is the measure that is out of bounds and `limit` its bound, both in bytes or in tasks."""

    reason: str
    message: str
    program: str = ""
    used: int = 0
    limit: int = 0


class DoorsOpened(Payload, frozen=True, kw_only=True):
    """New tasks are stored again. `used` is the measure as it is now, `limit` what it had to fall to."""

    program: str = ""
    used: int = 0
    limit: int = 0


class UnknownEvent(Payload, frozen=True, kw_only=True):
    """An event of a type that this version does not know; kept as it is, never dropped."""

    type: str
    data: Raw


PAYLOADS: dict[str, type[Payload]] = {
    kind.__name__: kind
    for kind in (
        TaskSubmitted, OutcomeReported, SignalSent, SignalReceived, TaskForked, TaskClaimed, AttemptDied,
        EffectRecorded, EffectRetried, EffectsInterrupted, TaskSleeping, TaskRetried, TaskCompleted, TaskFailed,
        TaskDuplicate, TaskDeadLettered, TaskCancelled, TaskResubmitted, TaskDropped, KeyBound, ProgramRegistered,
        AssignmentProposed, InputSealed, TaskForgotten, AgentStarted, AgentStopped, AgentCrashed, BreakerOpened,
        BreakerHalfOpened, BreakerClosed, DoorsClosed, DoorsOpened, AgentGaveUp, LimitSet, LimitCleared, LimitReached,
        BudgetLeased, BudgetSettled, ProgramScaled, ProgramReloaded,
    )
}  # fmt: skip


class Event(Struct, frozen=True, gc=False):
    """One event. `version` counts within the aggregate, from 1; a door message's own event has version 0.

    `time` is RFC 3339 in UTC; `source` is who wrote it; `correlation` and `causation` are log positions or ids.
    """

    aggregate: str
    version: int
    time: str
    source: str
    correlation: str
    causation: str
    data: Payload
    position: int = 0

    @property
    def id(self) -> str:
        return f"{self.aggregate}/{self.version}"

    @property
    def type(self) -> str:
        data = self.data
        return data.type if isinstance(data, UnknownEvent) else type(data).__name__
