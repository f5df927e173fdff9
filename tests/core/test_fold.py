"""Folds: every kind of aggregate has one, a state survives being kept, and where it was cut makes no difference."""

from __future__ import annotations

import pytest
from msgspec import Raw

from dspex.core.aggregates import (
    FOLDS,
    AgentState,
    FleetState,
    InboxState,
    KeyState,
    LetterState,
    ProgramState,
    VariablesState,
)  # fmt: skip
from dspex.core.breaker import BreakerState
from dspex.core.doors import DoorsState
from dspex.core.events import (
    AgentCrashed,
    AgentGaveUp,
    AgentStarted,
    AgentStopped,
    AssignmentProposed,
    BreakerClosed,
    BreakerHalfOpened,
    BreakerOpened,
    BudgetLeased,
    BudgetSettled,
    DoorsClosed,
    DoorsOpened,
    Event,
    KeyBound,
    LimitCleared,
    LimitReached,
    LimitSet,
    Payload,
    Permit,
    ProgramRegistered,
    ProgramReloaded,
    ProgramScaled,
    SignalReceived,
    TaskClaimed,
    TaskCompleted,
    TaskDropped,
    TaskResubmitted,
    TaskSleeping,
    TaskSubmitted,
    UnknownEvent,
)
from dspex.core.leases import BudgetState, LimitsState


def registered(fingerprint: str) -> Payload:
    return ProgramRegistered(
        program="p", fingerprint=fingerprint, doc="d", input_schema={"a": 1}, output_schema={}, variables={}, app="p.py"
    )


def leased(lease: str, amount: float) -> Payload:
    return BudgetLeased(scope="p", resource="usd", window="20261123", lease=lease, holder="h", amount=amount, of=5.0)


def settled(lease: str, used: float, assumed: bool = False) -> Payload:
    return BudgetSettled(scope="p", resource="usd", window="20261123", lease=lease, used=used, assumed=assumed)


LIVES: dict[str, list[Payload]] = {
    "task": [
        TaskSubmitted(program="p", input=Raw(b"null")), TaskClaimed(attempt=1, agent="a", assignment="x"),
        TaskSleeping(key="k", until=1.5), TaskClaimed(attempt=2, agent="b", assignment="x"),
        TaskCompleted(output=Raw(b'{"a":[1,2]}'), seconds=0.5),
    ],
    "inbox": [SignalReceived(name=name, position=at, value=Raw(b"1")) for name, at in (("a", 3), ("b", 4), ("a", 9))],
    "key": [KeyBound(key="k", task="1"), KeyBound(key="k", task="2")],
    "dlq": [
        TaskResubmitted(successor="2", key="a"), TaskResubmitted(successor="3", key="b", clean=True),
        TaskDropped(actor="me", why="enough"),
    ],
    "program": [registered("one"), registered("two")],
    "fleet": [
        ProgramScaled(program="p", supervisor="s", agents=2, least=1, most=8, by="me", why="I want it"),
        ProgramReloaded(program="p", supervisor="s", code="c0de", was="01d", agents=2),
        ProgramScaled(program="p", supervisor="s", agents=3, least=1, most=8, by="load", why="3 tasks wait"),
    ],
    "agent": [
        AgentStarted(pid=1, role="agent", program="p"), AgentCrashed(pid=1, reason="killed"),
        AgentStarted(pid=2, role="agent", program="p", restarts=1), AgentStopped(pid=2, reason="told to"),
        AgentGaveUp(reason="no luck", restarts=2),
    ],
    "limits": [
        LimitSet(scope="p", limits={"rate": "20/s"}, who="me"), LimitCleared(scope="p"),
        LimitSet(scope="p", limits={"usd": "5/day"}, who="you", why="dear"),
    ],
    "budget": [
        leased("a", 2.0), leased("b", 1.0), leased("a", 1.5), LimitReached(
            scope="p", limit="usd", percent=80, used=4.0, of=5.0, window="20261123"),
        settled("a", 3.0), settled("a", 3.0), settled("c", 1.0), leased("d", 0.5), settled("d", 0.5, assumed=True),
    ],
    "breaker": [
        BreakerOpened(reason="failures", calls=9, failures=8, slow=1, window="10 s", since=1.0, due=2.0),
        BreakerHalfOpened(permits=[Permit("a", 4.0)], since=1.0), BreakerHalfOpened(calls=1, since=1.0),
        BreakerClosed(reason="trial", calls=3),
    ],
    "doors": [
        DoorsClosed(reason="open", message="m", program="p", used=9, limit=5), DoorsOpened(program="p"),
        DoorsClosed(reason="room", message="m", used=9, limit=5),
    ],
    "variables": [AssignmentProposed(assignment=name, values={"n": 1, "s": "x"}, who="me") for name in ("one", "two")],
}  # fmt: skip
ENDS = {
    "inbox": InboxState({"a": 2, "b": 1}, 9),
    "key": KeyState("k", "1"),
    "dlq": LetterState("3", {"a": "2", "b": "3"}, "me", "enough"),
    "program": ProgramState("two", "d", "p.py", {"a": 1}, {}, {}, 2),
    "fleet": FleetState(3, 1, 8, "load", "3 tasks wait", "c0de", 1),
    "agent": AgentState("gave up", 2, "agent", "p", 2, 1, "no luck"),
    "limits": LimitsState("p", {"usd": "5/day"}, "you", "dear", "2026-11-23T10:00:00.000000Z"),
    "budget": BudgetState({"b": 1.0}, {"b": "h"}, 3.5, 0.5, [80]),
    "breaker": BreakerState("closed", calls=3, reason="trial", version=4),
    "doors": DoorsState(DoorsClosed(reason="room", message="m", used=9, limit=5)),
    "variables": VariablesState(2, "two", {"n": 1, "s": "x"}, "me"),
}


def events(kind: str) -> list[Event]:
    first = 0 if kind == "task" else 1
    payloads = [*LIVES[kind], UnknownEvent(type="Later", data=Raw(b"{}"))]
    return [
        Event(f"{kind}.p.1", version, "2026-11-23T10:00:00.000000Z", "tests", "1", "1", payload, 10 + version)
        for version, payload in enumerate(payloads, first)
    ]


def test_every_kind_has_a_life_here() -> None:
    assert FOLDS.keys() == LIVES.keys()
    assert all(FOLDS[kind].kind == kind for kind in FOLDS)


@pytest.mark.parametrize("kind", LIVES)
def test_a_state_survives_being_kept_wherever_it_is_cut(kind: str) -> None:
    fold, all_of_it = FOLDS[kind], events(kind)
    end = fold(all_of_it)
    for cut in range(len(all_of_it) + 1):
        state = fold(all_of_it[:cut])
        kept = fold.load(fold.dump(state))
        assert kept == state
        assert fold(all_of_it[cut:], kept) == end


@pytest.mark.parametrize("kind", ENDS)
def test_what_they_add_up_to(kind: str) -> None:
    assert FOLDS[kind](events(kind)) == ENDS[kind]
