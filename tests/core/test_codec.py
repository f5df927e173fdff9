"""Events to bytes and back: round trips, what is unknown is kept, what is old is upcast, what is rubbish is said."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from dspex.core import codec
from dspex.core.codec import decode_commit, encode_commit, encode_event, events_of, rfc3339
from dspex.core.errors import LogCorrupt
from dspex.core.events import (
    PAYLOADS,
    AgentCrashed,
    AgentGaveUp,
    AgentStarted,
    AgentStopped,
    AssignmentProposed,
    AttemptDied,
    BreakerClosed,
    BreakerHalfOpened,
    BreakerOpened,
    BudgetLeased,
    BudgetSettled,
    DoorsClosed,
    DoorsOpened,
    EffectRecorded,
    EffectRetried,
    EffectsInterrupted,
    Event,
    Held,
    InputSealed,
    Interrupted,
    KeyBound,
    LimitCleared,
    LimitReached,
    LimitSet,
    OutcomeReported,
    Payload,
    Permit,
    ProgramRegistered,
    ProgramReloaded,
    ProgramScaled,
    SignalReceived,
    SignalSent,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskDropped,
    TaskDuplicate,
    TaskFailed,
    TaskForgotten,
    TaskForked,
    TaskResubmitted,
    TaskRetried,
    TaskSleeping,
    TaskSubmitted,
    UnknownEvent,
    Usage,
)  # fmt: skip
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
number = st.integers(0, 2**53)
seconds = st.floats(0, 1e6)
anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8,
)  # fmt: skip
raw = anything.map(lambda value: Raw(msgspec.json.encode(value)))
table = st.dictionaries(text, anything, max_size=3)

held = st.builds(Held, key=text, sealed=text, blob=text, size=number)
maybe = st.just(UNSET) | held
ONE_OF_EACH: dict[type[Payload], st.SearchStrategy[Any]] = {
    TaskSubmitted: st.builds(TaskSubmitted, program=text, input=raw, headers=st.dictionaries(text, text, max_size=3)),
    OutcomeReported: st.builds(OutcomeReported, program=text, outcome=raw),
    SignalSent: st.builds(SignalSent, program=text, signal=raw),
    SignalReceived: st.builds(SignalReceived, name=text, position=number, value=raw, held=maybe),
    TaskClaimed: st.builds(TaskClaimed, attempt=number, agent=text, assignment=text, code=text,
        alone=st.just(UNSET) | st.booleans()),
    EffectRetried: st.builds(EffectRetried, key=text, name=text, retry=number, type=text, until=seconds,
        usage=st.just(UNSET)),
    EffectsInterrupted: st.builds(EffectsInterrupted, attempt=number, agent=text, effects=st.lists(
        st.builds(Interrupted, key=text, name=text, idempotency_key=text), max_size=2)),
    TaskResubmitted: st.builds(TaskResubmitted, successor=text, key=text, actor=text, clean=st.booleans(),
        changed=st.lists(text, max_size=3)),
    TaskDropped: st.builds(TaskDropped, actor=text, why=text),
    AttemptDied: st.builds(AttemptDied, attempt=number, agent=text, reason=text, alone=st.booleans()),
    EffectRecorded: st.builds(
        EffectRecorded, key=text, name=text, digest=text, result=raw, error=text, seconds=seconds,
        arguments=st.lists(text | number | st.none() | st.booleans(), max_size=3), held=maybe,
        usage=st.just(UNSET) | st.builds(Usage, usd=seconds, tokens=number, calls=number, model=st.just(UNSET) | text),
    ),
    TaskForked: st.builds(
        TaskForked, parent=text, at=number, seed=text, life=number, records=number,
        waits=st.dictionaries(text, st.none() | seconds, max_size=3),
    ),
    AssignmentProposed: st.builds(
        AssignmentProposed, assignment=text, who=text, why=text,
        values=st.dictionaries(text, st.none() | st.booleans() | number | seconds | text, max_size=3),
    ),
    TaskSleeping: st.builds(TaskSleeping, key=text, until=st.none() | seconds, signal=text),
    TaskRetried: st.builds(TaskRetried, retry=number, type=text, message=text, until=seconds, clean=st.booleans(), held=maybe),
    TaskCompleted: st.builds(TaskCompleted, output=raw, seconds=seconds, held=maybe),
    TaskFailed: st.builds(
        TaskFailed, code=number, type=text, message=text, detail=text, seconds=seconds, held=maybe,
        tenant=st.just(UNSET) | text,
    ),
    TaskDuplicate: st.builds(TaskDuplicate, of=text, key=text),
    TaskDeadLettered: st.builds(TaskDeadLettered, attempts=number, reason=text),
    InputSealed: st.builds(InputSealed, input=raw, held=held, stored=seconds, headers=st.dictionaries(text, text, max_size=2)),
    TaskForgotten: st.builds(TaskForgotten, task=text, actor=text, reason=text),
    TaskCancelled: st.builds(TaskCancelled, reason=text, by=text),
    KeyBound: st.builds(KeyBound, key=text, task=text),
    ProgramRegistered: st.builds(
        ProgramRegistered, program=text, fingerprint=text, doc=text, input_schema=table, output_schema=table,
        variables=table, app=text,
    ),
    LimitSet: st.builds(LimitSet, scope=text, limits=st.dictionaries(text, text, max_size=3), who=text, why=text),
    LimitCleared: st.builds(LimitCleared, scope=text, who=text, why=text),
    LimitReached: st.builds(LimitReached, scope=text, limit=text, percent=number, used=seconds, of=seconds, window=text),
    BudgetLeased: st.builds(
        BudgetLeased, scope=text, resource=text, window=text, lease=text, holder=text, amount=seconds, of=seconds,
        overrun=st.booleans(),
    ),
    BudgetSettled: st.builds(
        BudgetSettled, scope=text, resource=text, window=text, lease=text, used=seconds, assumed=st.booleans()
    ),
    AgentStarted: st.builds(AgentStarted, pid=number, role=text, program=st.none() | text, restarts=number),
    AgentStopped: st.builds(AgentStopped, pid=number, reason=text),
    ProgramScaled: st.builds(
        ProgramScaled, program=text, supervisor=text, agents=number, least=number, most=number, by=text, why=text
    ),
    ProgramReloaded: st.builds(
        ProgramReloaded, program=text, supervisor=text, code=text, was=text, agents=number, by=text
    ),
    AgentGaveUp: st.builds(AgentGaveUp, reason=text, restarts=number),
    AgentCrashed: st.builds(AgentCrashed, pid=number, reason=text),
    BreakerOpened: st.builds(
        BreakerOpened, reason=text, calls=number, failures=number, slow=number, window=text, since=seconds, due=seconds
    ),
    BreakerHalfOpened: st.builds(
        BreakerHalfOpened, calls=number, failures=number, slow=number, since=seconds,
        permits=st.lists(st.builds(Permit, holder=text, until=seconds), max_size=3),
    ),
    BreakerClosed: st.builds(BreakerClosed, reason=text, calls=number, failures=number, slow=number, by=text),
    DoorsClosed: st.builds(DoorsClosed, reason=text, message=text, program=text, used=number, limit=number),
    DoorsOpened: st.builds(DoorsOpened, program=text, used=number, limit=number),
}  # fmt: skip
unknown = st.builds(UnknownEvent, type=st.from_regex(r"[A-Z][a-zA-Z]{0,20}New", fullmatch=True), data=raw)


@st.composite
def commits(draw: st.DrawFn) -> list[Event]:
    """A commit as a writer makes it, or with what differs between its events."""
    start, alike = draw(st.integers(1, 1000)), draw(st.booleans())
    about = {"time": rfc3339(draw(st.floats(0, 4e9))), "source": draw(text), "correlation": draw(text), "causation": draw(text)}
    found = []
    for offset in range(draw(st.integers(1, 4))):
        if not alike:
            about = {**about, "source": draw(text), "causation": draw(text)}
        data = draw(st.one_of(*ONE_OF_EACH.values(), unknown))
        found.append(Event(aggregate="task.qabot.42", version=start + offset, data=data, **about))
    return found


def plain(event: Event) -> dict[str, Any]:
    """An event as JSON says it, to compare by."""
    return json.loads(encode_event(event))  # type: ignore[no-any-return]


def test_every_payload_has_a_strategy_here() -> None:
    assert set(ONE_OF_EACH) == set(PAYLOADS.values())


@given(commits())
def test_a_commit_comes_back_as_it_was(events: list[Event]) -> None:
    body = encode_commit(events)
    back = decode_commit(body, position=7)
    assert [event.type for event in back] == [event.type for event in events]
    assert [plain(event) for event in back] == [plain(event) for event in events]
    assert {event.position for event in back} == {7}


@given(commits())
def test_encoding_what_was_decoded_gives_the_same_bytes(events: list[Event]) -> None:
    """So that an append can be recognised by its bytes, and a log copied without a change."""
    body = encode_commit(events)
    assert encode_commit(decode_commit(body)) == body


@given(commits())
def test_a_commit_is_a_cloudevents_batch(events: list[Event]) -> None:
    for event, shown in zip(events, json.loads(encode_commit(events)), strict=True):
        assert shown["specversion"] == "1.0"
        assert shown["id"] == f"{event.aggregate}/{event.version}"
        assert (shown["type"], shown["source"]) == (event.type, event.source)
        assert (shown["correlationid"], shown["causationid"]) == (event.correlation, event.causation)
        assert shown["dataschema"].startswith(f"urn:dspex:{event.type}:")
        assert datetime.fromisoformat(shown["time"]).tzinfo is UTC


def stored(**changes: object) -> bytes:
    event = {
        "type": "AgentStopped", "source": "/x", "time": "2026-11-23T10:00:00Z", "aggregate": "agent.qabot.a", "version": 1,
        "correlationid": "1", "causationid": "1", "dataschema": "urn:dspex:AgentStopped:1",
        "data": {"pid": 1, "reason": "told to"},
    } | changes  # fmt: skip
    return json.dumps([event]).encode()


def test_an_event_of_an_unknown_type_is_kept_as_it_is() -> None:
    (event,) = decode_commit(stored(type="AgentPainted", dataschema="urn:dspex:AgentPainted:3", data={"colour": ["red"]}))
    assert isinstance(event.data, UnknownEvent) and event.type == "AgentPainted"
    assert json.loads(bytes(event.data.data)) == {"colour": ["red"]}
    assert plain(event)["data"] == {"colour": ["red"]}


def test_a_newer_shape_of_a_known_type_is_kept_as_it_is() -> None:
    """Written by a later version: what it says is not lost by reading it with this one."""
    (event,) = decode_commit(stored(dataschema="urn:dspex:AgentStopped:9", data={"pids": [1, 2]}))
    assert event.type == "AgentStopped" and json.loads(bytes(event.data.data)) == {"pids": [1, 2]}  # type: ignore[attr-defined]


def test_a_field_that_is_not_known_is_passed_over() -> None:
    (event,) = decode_commit(stored(data={"pid": 1, "reason": "told to", "mood": "good"}, colour="red"))
    assert event.data == AgentStopped(pid=1, reason="told to")


def test_an_older_shape_passes_through_every_upcaster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AgentStopped, "schema", 3)
    monkeypatch.setitem(codec.UPCASTERS, ("AgentStopped", 1), lambda old: {"pid": old["process"], "why": old["why"]})
    monkeypatch.setitem(codec.UPCASTERS, ("AgentStopped", 2), lambda old: {"pid": old["pid"], "reason": old["why"] + "!"})
    for schema, data in ((1, {"process": 5, "why": "told to"}), (2, {"pid": 5, "why": "told to"})):
        (event,) = decode_commit(stored(dataschema=f"urn:dspex:AgentStopped:{schema}", data=data))
        assert event.data == AgentStopped(pid=5, reason="told to!")


def test_an_older_shape_without_an_upcaster_is_corrupt() -> None:
    with pytest.raises(LogCorrupt):
        decode_commit(stored(dataschema="urn:dspex:AgentStopped:0"))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"null", b"[1]", b"rubbish", b"\xff\xfe", b"[" * 100_000, b'[{"type": "x"}]',
        stored(data={}), stored(data=5), stored(version="1"), stored(dataschema="urn:dspex:AgentStopped:x"),
        stored(time=5), stored()[:-1], stored() + b"x",
    ],
)  # fmt: skip
def test_what_is_no_commit_is_corrupt_and_says_where(body: bytes) -> None:
    with pytest.raises(LogCorrupt, match="position 9"):
        decode_commit(body, position=9)


def test_no_events_are_a_commit_of_none() -> None:
    assert decode_commit(b"[]") == []


@given(st.binary(max_size=200))
def test_bytes_from_strangers_are_events_or_corrupt(body: bytes) -> None:
    with contextlib.suppress(LogCorrupt):
        decode_commit(body)


# -- door messages


def entry(subject: str, body: bytes = b"{}", headers: dict[str, str] | None = None) -> Entry:
    return Entry(position=42, time=1.5, subject=subject, body=body, headers=headers or {})


def test_a_submission_is_an_event_of_its_own() -> None:
    (event,) = events_of(entry("dspex.task.qabot", b'{"a": 1}', {"Dspex-Key": "k", "Other": "x", "traceparent": "t"}), Subjects())
    assert (event.type, event.aggregate, event.version, event.position) == ("TaskSubmitted", "task.qabot.42", 0, 42)
    assert (event.source, event.correlation, event.causation) == ("door", "42", "42")
    assert event.time == "1970-01-01T00:00:01.500000Z"
    assert plain(event)["data"] == {"program": "qabot", "input": {"a": 1}, "headers": {"Dspex-Key": "k", "traceparent": "t"}}


def test_headers_say_who_and_why_whatever_their_case() -> None:
    headers = {"DSPEX-ACTOR": "me", "dspex-correlation": "7", "Dspex-Causation": "8"}
    (event,) = events_of(entry("dspex.task.qabot", headers=headers), Subjects())
    assert (event.source, event.correlation, event.causation) == ("me", "7", "8")


@pytest.mark.parametrize(("door", "type"), [("outcome", "OutcomeReported"), ("signal", "SignalSent")])
def test_the_other_doors_are_events_too(door: str, type: str) -> None:
    (event,) = events_of(entry(f"dspex.{door}.qabot", b'{"task": 1}'), Subjects())
    assert event.type == type and plain(event)["data"][door] == {"task": 1}


@pytest.mark.parametrize("body", [b"", b"rubbish", b"\xff", b"[" * 100_000, b'{"a": NaN}', b"\xef\xbb\xbf{}", b'"\xff"'])
def test_a_body_that_is_not_json_shows_as_null(body: bytes) -> None:
    (event,) = events_of(entry("dspex.task.qabot", body), Subjects())
    assert plain(event)["data"]["input"] is None


@given(st.binary(max_size=100))
def test_a_body_from_strangers_always_shows(body: bytes) -> None:
    (event,) = events_of(entry("dspex.task.qabot", body), Subjects())
    plain(event)


def test_a_commit_under_the_subject_of_another_aggregate_is_corrupt() -> None:
    good = entry("dspex.event.agent.qabot.a", stored())
    assert events_of(good, Subjects())[0].aggregate == "agent.qabot.a"
    with pytest.raises(LogCorrupt, match="another aggregate"):
        events_of(entry("dspex.event.agent.qabot.b", stored()), Subjects())
    with pytest.raises(LogCorrupt):
        events_of(entry("dspex.event.agent.qabot.a", stored(time='2026"')), Subjects())


@given(st.floats(0, 4e9))
def test_a_time_is_rfc3339_to_the_microsecond(when: float) -> None:
    text = rfc3339(when)
    assert len(text) == 27 and text.endswith("Z")
    assert abs(datetime.fromisoformat(text).timestamp() - when) <= 1e-6


def test_times_are_rounded_and_carried() -> None:
    assert rfc3339(0.9999996) == "1970-01-01T00:00:01.000000Z"
    assert rfc3339(59.9999999) == "1970-01-01T00:01:00.000000Z"
