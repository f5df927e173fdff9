"""What is private: which fields, what an event shows of them, and that it comes back only with its key, in its place."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, Raw
from pydantic import BaseModel
from tests.core.test_codec import raw, seconds, text

from dspex import Private, Schema, Secret
from dspex.core.codec import decode_commit, encode_commit, events_of, sealed_body, sealed_in
from dspex.core.errors import InvalidInput, LogCorrupt
from dspex.core.events import (
    EffectRecorded,
    Event,
    Payload,
    SignalReceived,
    TaskCompleted,
    TaskFailed,
    TaskRetried,
    TaskSubmitted,
)
from dspex.core.ports import Entry
from dspex.core.sealing import Guard, guard_of, hidden, open_part, opened, place_of, seal, unseal
from dspex.core.subjects import Subjects

KEY, OTHER = b"k" * 32, b"o" * 32
GUARD = Guard(frozenset({"ssn"}), frozenset({"verdict"}))

payloads: st.SearchStrategy[Payload] = st.one_of(
    st.builds(EffectRecorded, key=text, name=text, digest=text, result=raw, error=text, arguments=st.lists(text, max_size=2), seconds=seconds),
    st.builds(TaskCompleted, output=raw, seconds=seconds),
    st.builds(TaskFailed, code=st.integers(400, 599), type=text, message=text, detail=text, seconds=seconds),
    st.builds(TaskRetried, retry=st.integers(1, 9), type=text, message=text, until=seconds, clean=st.booleans()),
    st.builds(SignalReceived, name=text, position=st.integers(1, 2**53), value=raw),
)  # fmt: skip


class Address(BaseModel):
    street: Private[str]
    town: str


class Takes(Schema):
    ssn: Private[str]
    many: list[Address] = []
    maybe: Private[int | None] = None
    town: str = ""
    token: Secret | None = None


def test_a_field_is_private_as_a_whole_when_anything_in_it_is() -> None:
    guard = guard_of(Takes.model_json_schema(), {})
    assert guard == Guard(frozenset({"ssn", "many", "maybe"}), frozenset(), secret=True)
    assert guard_of({}, {}) == Guard()
    assert (guard.private, guard.guarded, Guard(secret=True).private, Guard().guarded) == (True, True, False, False)


def test_a_schema_that_holds_itself_is_looked_at_once() -> None:
    class Tree(BaseModel):
        below: list[Tree] = []
        secret: Private[str] = ""

    class Wood(Schema):
        tree: Tree
        name: str = ""

    assert guard_of(Wood.model_json_schema(), {}).input == {"tree"}


@pytest.mark.parametrize("body", [
    b'{"ssn": 12345678901}', b'{"ssn": "a", "many": [{"street": {"12345678901": 1}, "town": ""}]}',
    b'{"ssn": "a", "maybe": "12345678901"}',
])  # fmt: skip
def test_a_refusal_says_nothing_of_a_private_value(body: bytes) -> None:
    with pytest.raises(InvalidInput, match="what came is private and not shown") as error:
        Takes.decode(body)
    assert "12345678901" not in str(error.value)


def test_a_refusal_of_an_open_field_says_what_came() -> None:
    with pytest.raises(InvalidInput, match="town: a string is due, 7 came"):
        Takes.decode(b'{"ssn": "a", "town": 7}')


@given(payloads)
def test_what_is_sealed_comes_back_as_it_was(payload: Payload) -> None:
    parts = hidden(payload, GUARD)
    assert parts is not None
    shown, plain = parts
    place = place_of("vetting", payload)
    sealed = seal(KEY, plain, place)
    assert seal(KEY, plain, place) == sealed, "the same bytes again"
    assert place_of("vetting", shown) == place, "the place can be told from what is shown"
    back = opened(shown, unseal(KEY, sealed, place_of("vetting", shown)))
    assert msgspec.json.encode(back) == msgspec.json.encode(payload)
    for key, where in ((OTHER, place), (KEY, place + "x"), (KEY, place.replace("vetting", "other"))):
        with pytest.raises(LogCorrupt, match="does not open with its key"):
            unseal(key, sealed, where)


@given(st.binary(max_size=200), st.integers(0, 10_000))
def test_a_changed_bit_does_not_open(plain: bytes, where: int) -> None:
    sealed = bytearray(seal(KEY, plain, "p/input"))
    sealed[where % len(sealed)] ^= 1
    with pytest.raises(LogCorrupt):
        unseal(KEY, bytes(sealed), "p/input")


@given(st.dictionaries(st.sampled_from(["ssn", "verdict", "town", "size"]), text, max_size=4))
def test_the_open_part_has_everything_but_what_is_private(value: dict[str, str]) -> None:
    shown = msgspec.json.decode(open_part(msgspec.json.encode(value), GUARD.input))
    assert shown == {name: each for name, each in value.items() if name != "ssn"}
    assert list(shown) == [name for name in value if name != "ssn"]


@pytest.mark.parametrize("body", [b"", b"[1]", b"\xff", b"nonsense", b'"text"', b"[" * 100_000])
def test_what_is_no_object_has_no_open_part(body: bytes) -> None:
    assert bytes(open_part(body, GUARD.input)) == b"null"


def entry(body: bytes, **headers: str) -> Entry:
    return Entry(position=7, time=1.0, subject="dspex.task.vetting", body=body, headers=headers)


def test_only_the_header_makes_a_body_sealed() -> None:
    """A user's value may look as ours do; it is taken for what it is."""
    body = sealed_body(Raw(b'{"town":"x"}'), "AAAA")
    [open_one] = events_of(entry(body), Subjects())
    assert isinstance(open_one.data, TaskSubmitted)
    assert (bytes(open_one.data.input), open_one.data.held) == (body, UNSET)
    [sealed] = events_of(entry(body, **{"dspex-sealed": "k"}), Subjects())
    assert isinstance(sealed.data, TaskSubmitted)
    assert bytes(sealed.data.input) == b'{"town":"x"}'
    assert sealed.data.held is not UNSET
    assert (sealed.data.held.key, sealed.data.held.sealed) == ("k", "AAAA")


@pytest.mark.parametrize("body", [b"", b"[]", b'{"open": {}}', b"\xff\xfe", b'{"open": 1, "sealed": 2}'])
def test_a_body_that_is_not_sealed_although_it_says_so_shows_as_nothing(body: bytes) -> None:
    [event] = events_of(entry(body, **{"Dspex-Sealed": "k"}), Subjects())
    assert isinstance(event.data, TaskSubmitted)
    assert bytes(event.data.input) == b"null"
    assert sealed_in(body) == ""


def test_an_event_without_anything_elsewhere_is_stored_as_ever() -> None:
    event = Event("task.qabot.42", 1, "2026-11-23T10:00:00Z", "a", "42", "42", TaskCompleted(output=Raw(b"{}")))
    body = encode_commit([event])
    assert b"held" not in body
    assert encode_commit(decode_commit(body)) == body
