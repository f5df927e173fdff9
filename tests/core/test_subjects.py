"""Subjects: built and read in one place, and never with what a subject cannot hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspex.core.subjects import Aggregate, Subjects, aggregate, parse_aggregate, valid_token

token = st.from_regex(r"[A-Za-z0-9_-]{1,20}", fullmatch=True)


@given(token, token, token)
def test_an_aggregate_is_read_as_it_was_built(kind: str, name: str, id: str) -> None:
    assert parse_aggregate(aggregate(kind, name, id)) == Aggregate(kind, name, id)


@given(st.text(max_size=30))
def test_whatever_is_a_token_can_stand_in_a_subject(text: str) -> None:
    if valid_token(text):
        assert text.isascii() and not set(text) & set(". *>\t\r\n") and 1 <= len(text) <= 128
    else:
        with pytest.raises(ValueError, match="cannot be part of a subject"):
            aggregate("task", text, 1)


@pytest.mark.parametrize("text", ["", "a.b", "a.b.c.d", "a.b.", ".b.c", "a.*.c", "a.b.>", "a b.c.d", "ä.b.c", "a.b.c\n", "a" * 129 + ".b.c"])
def test_what_is_no_aggregate_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not an aggregate"):
        parse_aggregate(text)


@pytest.mark.parametrize("prefix", ["", "Dspex", "1a", "a.b", "a b", "a-b", "a" * 33, "é"])
def test_a_prefix_that_cannot_stand_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="prefix"):
        Subjects(prefix)


def test_the_names_of_the_design_page() -> None:
    names = Subjects()
    assert names.stream == "DSPEX" and names.events == "dspex.event.>"
    assert names.doors("qabot") == ("dspex.task.qabot", "dspex.outcome.qabot", "dspex.signal.qabot")
    assert names.door("ask", "qabot") == "dspex.ask.qabot"
    assert names.variables("qabot", "get") == "dspex.variables.qabot.get"
    assert names.log("read") == "dspex.log.read"
    assert names.event("task.qabot.42") == "dspex.event.task.qabot.42"
    assert names.control("a", "drain") == "dspex.control.a.drain"


def test_with_access_rules_each_program_has_timers_of_its_own() -> None:
    assert Subjects().timers("a") == Subjects().timers("b") == "DSPEX_TIMER"
    assert Subjects(tenants=True).timers("a") == "DSPEX_TIMER_a"


def test_installations_share_no_name() -> None:
    one, two = Subjects("one"), Subjects("two")
    for name in ("stream", "lease_stream", "timer_stream", "events"):
        assert getattr(one, name) != getattr(two, name)
    assert two.door_of(one.door("task", "qabot")) is None
    assert two.aggregate_of(one.event("task.qabot.42")) is None


@pytest.mark.parametrize(
    ("subject", "door"),
    [
        ("dspex.task.qabot", ("task", "qabot")), ("dspex.outcome.qabot", ("outcome", "qabot")),
        ("dspex.signal.qabot.tenant", ("signal", "qabot")), ("dspex.ask.qabot", None), ("dspex.event.task.qabot.1", None),
        ("dspex.task", None), ("other.task.qabot", None), ("", None),
    ],
)  # fmt: skip
def test_a_stored_door_is_recognised(subject: str, door: tuple[str, str] | None) -> None:
    assert Subjects().door_of(subject) == door


def test_an_event_subject_is_recognised() -> None:
    assert Subjects().aggregate_of("dspex.event.task.qabot.42") == "task.qabot.42"
    assert Subjects().aggregate_of("dspex.task.qabot") is None
    assert Subjects().aggregate_of("dspex.events.task.qabot.42") is None
