"""Headers with a meaning: keys, deadlines, waits."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspex.core import headers as h
from dspex.core.errors import InvalidInput


def deadline(text: str, stored_at: float = 1000.0) -> float | None:
    return h.deadline_of({h.DEADLINE: text}, stored_at)


def test_without_headers_there_is_no_key_and_no_deadline_and_the_default_wait() -> None:
    assert h.key_of({}) is None
    assert h.deadline_of({}, 1000.0) is None
    assert h.wait_of({}) == 25.0


@pytest.mark.parametrize("key", ["k", "k" * 256, "a b", "ü€"])
def test_a_key_is_any_text_of_1_to_256_characters(key: str) -> None:
    assert h.key_of({h.KEY: key}) == key


@pytest.mark.parametrize("key", ["", "k" * 257])
def test_another_key_is_refused(key: str) -> None:
    with pytest.raises(InvalidInput, match="Dspex-Key"):
        h.key_of({h.KEY: key})


@pytest.mark.parametrize(("text", "left"), [("2.5", 2.5), ("0", 0.0), ("60", 60.0), (" 3 ", 3.0), ("1e3", 1000.0)])
def test_a_number_counts_from_when_the_message_was_stored(text: str, left: float) -> None:
    assert deadline(text) == 1000.0 + left


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1970-01-01T00:20:00Z", 1200.0), ("1970-01-01T00:20:00.5+00:00", 1200.5), ("1970-01-01T02:20:00+02:00", 1200.0),
        ("1970-01-01T00:20:00", 1200.0), ("2020-02-29T00:00:00Z", 1582934400.0),
    ],
)  # fmt: skip
def test_a_time_is_a_time_and_without_a_zone_in_utc(text: str, seconds: float) -> None:
    assert deadline(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "-0.001", "nan", "inf", "-inf", "1e9", "1e999", "2021-02-29T00:00:00Z", "12:00"])
def test_another_deadline_is_refused_in_words_that_name_it(text: str) -> None:
    with pytest.raises(InvalidInput, match="Dspex-Deadline") as refused:
        deadline(text)
    assert "2.5" in str(refused.value) or "seconds" in str(refused.value)


@given(st.text(max_size=40))
def test_a_deadline_from_strangers_is_a_time_or_refused(text: str) -> None:
    try:
        found = deadline(text)
    except InvalidInput:
        return
    assert found is not None and found == found


@given(st.datetimes(timezones=st.just(UTC)), st.integers(-23, 23))
def test_every_time_can_be_said_in_every_zone(when: datetime, hours: int) -> None:
    from datetime import timezone

    try:
        there = when.astimezone(timezone(timedelta(hours=hours)))
    except OverflowError:
        return
    assert deadline(there.isoformat()) == when.timestamp()


@pytest.mark.parametrize(("text", "seconds"), [("0", 0.0), ("3", 3.0), ("3s", 3.0), ("0.25", 0.25), ("60", 25.0), ("1e8", 25.0)])
def test_a_wait_is_seconds_and_at_most_25(text: str, seconds: float) -> None:
    assert h.wait_of({h.WAIT: text}) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-1", "nan", "inf", "s", "1m"])
def test_another_wait_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="Dspex-Wait"):
        h.wait_of({h.WAIT: text})


@pytest.mark.parametrize(("text", "seconds"), [("2.5", 2.5), ("0", 0.0), ("", None), ("soon", None), ("-1", None), ("nan", None)])
def test_a_time_to_try_again_is_seconds_or_nothing(text: str, seconds: float | None) -> None:
    assert h.retry_after_of({h.RETRY_AFTER: text}) == seconds
    assert h.retry_after_of({}) is None
