"""When the stored doors close and open again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspex.core.doors import DoorsState, Level, Marks, closed_doors, doors_aggregate, fold, over_marks, over_open
from dspex.core.events import DoorsClosed, DoorsOpened, Event
from dspex.core.subjects import parse_aggregate

GIB = 1 << 30


def test_the_log_may_have_a_share_of_what_it_could_have() -> None:
    marks = Marks(high_water=0.8, low_water=0.7)
    assert over_marks(marks, Level(7 * GIB, 3 * GIB, 100 * GIB), closed=False) is None
    why = over_marks(marks, Level(9 * GIB, 1 * GIB, 100 * GIB), closed=False)
    assert why and why.reason == "room" and why.program == ""
    assert "9.0 GiB of the 10.0 GiB" in why.message and "80%" in why.message
    assert over_marks(marks, Level(75 * GIB // 10, 25 * GIB // 10, 100 * GIB), closed=True), "not below the low mark yet"
    assert over_marks(marks, Level(6 * GIB, 4 * GIB, 100 * GIB), closed=True) is None


def test_some_of_the_disk_stays_free_whatever_the_log_has() -> None:
    marks = Marks(room=256 << 20)
    assert over_marks(marks, Level(0, 255 << 20, 100 * GIB), closed=False)
    assert over_marks(marks, Level(0, 257 << 20, 100 * GIB), closed=False) is None
    assert over_marks(marks, Level(0, 257 << 20, 100 * GIB), closed=True)
    assert over_marks(marks, Level(0, 321 << 20, 100 * GIB), closed=True) is None
    small = Level(0, 5 << 20, 40 << 20)  # a tenth of a small disk
    assert over_marks(marks, small, closed=False) is None
    assert over_marks(marks, Level(0, 3 << 20, 40 << 20), closed=False)


def test_a_bound_in_bytes_counts_where_nobody_sees_the_disk() -> None:
    marks = Marks(max_bytes=GIB)
    assert over_marks(marks, Level(GIB), closed=False)
    assert over_marks(marks, Level(GIB // 2), closed=False) is None
    assert over_marks(Marks(), Level(1 << 60), closed=False) is None


@settings(deadline=None)
@given(st.integers(0, 1 << 40), st.integers(0, 1 << 40), st.integers(1, 1 << 41))
def test_what_closes_the_doors_keeps_them_closed(used: int, free: int, total: int) -> None:
    level = Level(used, free, total)
    if over_marks(Marks(), level, closed=False):
        assert over_marks(Marks(), level, closed=True), "they would open and close in turn"


@settings(deadline=None)
@given(st.integers(0, 100), st.integers(1, 50))
def test_tasks_of_one_program_close_its_own_door(tasks: int, most: int) -> None:
    marks = Marks(max_open=most)
    closes = over_open(marks, "p", tasks, closed=False)
    assert (closes is not None) == (tasks > most)
    if closes:
        assert over_open(marks, "p", tasks, closed=True) and closes.program == "p"
    assert over_open(Marks(max_open=None), "p", tasks, closed=False) is None


def test_signals_always_come_through() -> None:
    why = DoorsClosed(reason="room", message="m")
    assert closed_doors({}, ["a", "b"]) == frozenset()
    assert closed_doors({"a": why}, ["a", "b"]) == {("task", "a")}
    everything = closed_doors({"": why}, ["a", "b"])
    assert everything == {("task", "a"), ("outcome", "a"), ("task", "b"), ("outcome", "b")}


def test_the_fold_knows_whether_doors_are_closed() -> None:
    closed = DoorsClosed(reason="open", message="m", program="p", used=9, limit=5)
    events = [Event("doors.p.0", 1, "", "", "", "", closed), Event("doors.p.0", 2, "", "", "", "", DoorsOpened())]
    assert fold(events[:1]) == DoorsState(closed)
    assert fold(events) == DoorsState()
    assert fold.load(fold.dump(DoorsState(closed))) == DoorsState(closed)
    assert parse_aggregate(doors_aggregate("")).name == "ALL"


@pytest.mark.parametrize("wrong", [{"high_water": 0.5}, {"low_water": 0.0}, {"high_water": 1.2}], ids=str)
def test_marks_that_make_no_sense_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="low_water"):
        Marks(**wrong)  # type: ignore[arg-type]
