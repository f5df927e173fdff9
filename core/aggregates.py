"""The folds of every kind of aggregate: tasks (in `task`), inboxes, keys, programs, fleets, agents and variables."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from dspex.core.breaker import fold as breaker
from dspex.core.doors import fold as doors
from dspex.core.events import (
    AgentCrashed,
    AgentGaveUp,
    AgentStarted,
    AgentStopped,
    AssignmentProposed,
    Event,
    KeyBound,
    ProgramRegistered,
    ProgramReloaded,
    ProgramScaled,
    SignalReceived,
    TaskDropped,
    TaskResubmitted,
)
from dspex.core.fold import Fold
from dspex.core.leases import budget, limits
from dspex.core.task import fold as task

__all__ = [
    "FOLDS", "AgentState", "FleetState", "InboxState", "KeyState", "LetterState", "ProgramState", "VariablesState",
]  # fmt: skip


class InboxState(Struct, frozen=True, omit_defaults=True):
    """What has reached a task's inbox: how many signals of each name, and where the last one stands in the log."""

    signals: dict[str, int] = {}
    last: int = 0


class KeyState(Struct, frozen=True, omit_defaults=True):
    """A key and the task that it belongs to for good."""

    key: str = ""
    task: str = ""


class LetterState(Struct, frozen=True, omit_defaults=True):
    """What became of a task that ended without an output: the `successor` it was last submitted again as, all of those
    by their keys, and who `dropped` it and why."""

    successor: str = ""
    successors: dict[str, str] = {}
    dropped: str = ""
    why: str = ""


class ProgramState(Struct, frozen=True, omit_defaults=True):
    """A program as it was registered last, and how often it was."""

    fingerprint: str = ""
    doc: str = ""
    app: str = ""
    input_schema: dict[str, Any] = {}
    output_schema: dict[str, Any] = {}
    variables: dict[str, Any] = {}
    registrations: int = 0


class FleetState(Struct, frozen=True, omit_defaults=True):
    """How many agents of a program a supervisor is to have, why, and on which code they are."""

    agents: int = 0
    least: int = 0
    most: int = 0
    by: str = ""
    why: str = ""
    code: str = ""
    reloads: int = 0


class AgentState(Struct, frozen=True, omit_defaults=True):
    """Whether a process serves, and how often processes of its name began and died."""

    status: Literal["", "serving", "stopped", "crashed", "gave up"] = ""
    pid: int = 0
    role: str = ""
    program: str | None = None
    starts: int = 0
    crashes: int = 0
    reason: str = ""


class VariablesState(Struct, frozen=True, omit_defaults=True):
    """How many assignments were proposed for a program, and the last of them."""

    proposals: int = 0
    assignment: str = ""
    values: dict[str, bool | int | float | str | None] = {}
    who: str = ""
    why: str = ""


def _inbox(state: InboxState, event: Event) -> InboxState:
    match event.data:
        case SignalReceived(name=name, position=position):
            return InboxState({**state.signals, name: state.signals.get(name, 0) + 1}, max(state.last, position))
        case _:
            return state


def _key(state: KeyState, event: Event) -> KeyState:
    match event.data:
        case KeyBound(key=key, task=bound) if not state.task:
            return KeyState(key, bound)
        case _:
            return state


def _letter(state: LetterState, event: Event) -> LetterState:
    match event.data:
        case TaskResubmitted(successor=successor, key=key):
            return replace(state, successor=successor, successors={**state.successors, key: successor})
        case TaskDropped(actor=actor, why=why):
            return replace(state, dropped=actor or "somebody", why=why)
        case _:
            return state


def _program(state: ProgramState, event: Event) -> ProgramState:
    match event.data:
        case ProgramRegistered() as data:
            return ProgramState(
                data.fingerprint, data.doc, data.app, data.input_schema, data.output_schema, data.variables,
                state.registrations + 1,
            )  # fmt: skip
        case _:
            return state


def _fleet(state: FleetState, event: Event) -> FleetState:
    match event.data:
        case ProgramScaled(agents=agents, least=least, most=most, by=by, why=why):
            return replace(state, agents=agents, least=least, most=most, by=by, why=why)
        case ProgramReloaded(code=code):
            return replace(state, code=code, reloads=state.reloads + 1)
        case _:
            return state


def _agent(state: AgentState, event: Event) -> AgentState:
    match event.data:
        case AgentStarted(pid=pid, role=role, program=program):
            return AgentState("serving", pid, role, program, state.starts + 1, state.crashes)
        case AgentStopped(reason=reason):
            return replace(state, status="stopped", reason=reason)
        case AgentCrashed(reason=reason):
            return replace(state, status="crashed", reason=reason, crashes=state.crashes + 1)
        case AgentGaveUp(reason=reason):
            return replace(state, status="gave up", reason=reason)
        case _:
            return state


def _variables(state: VariablesState, event: Event) -> VariablesState:
    match event.data:
        case AssignmentProposed(assignment=assignment, values=values, who=who, why=why):
            return VariablesState(state.proposals + 1, assignment, values, who, why)
        case _:
            return state


def _loads(kind: type[Any]) -> Any:
    return msgspec.json.Decoder(kind).decode


FOLDS: dict[str, Fold[Any]] = {
    fold.kind: fold
    for fold in (
        task,
        Fold(kind="inbox", version=1, initial=InboxState(), evolve=_inbox, load=_loads(InboxState)),
        Fold(kind="key", version=1, initial=KeyState(), evolve=_key, load=_loads(KeyState)),
        Fold(kind="dlq", version=1, initial=LetterState(), evolve=_letter, load=_loads(LetterState)),
        Fold(kind="program", version=1, initial=ProgramState(), evolve=_program, load=_loads(ProgramState)),
        Fold(kind="fleet", version=1, initial=FleetState(), evolve=_fleet, load=_loads(FleetState)),
        breaker,
        doors,
        Fold(kind="agent", version=2, initial=AgentState(), evolve=_agent, load=_loads(AgentState)),
        Fold(kind="variables", version=1, initial=VariablesState(), evolve=_variables, load=_loads(VariablesState)),
        limits,
        budget,
    )
}
"""By kind of aggregate."""
