"""Snapshots: a state is the same whether it was folded from the beginning or from one that was kept."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw, structs
from tests.store.histories import SUBJECTS, commit, door, history

from dspex.core.aggregates import FOLDS
from dspex.core.codec import events_of
from dspex.core.errors import InvalidInput, NotFound
from dspex.core.events import Event, SignalReceived, TaskClaimed, TaskSleeping
from dspex.core.fold import Fold
from dspex.core.ports import Entry
from dspex.core.task import TaskState
from dspex.store import snapshots
from dspex.store.archive import Archive
from dspex.store.projections import Views
from dspex.store.reading import connect
from dspex.store.snapshots import SNAPSHOTS, state_of

NAME = "task.shop.1"
Place = tuple[Views, sqlite3.Connection, list[Event]]


def long_task(count: int) -> list[Entry]:
    """A task that slept often: two events a commit."""
    entries = [door(1, "task", "shop", {"n": 1})]
    for number in range(count):
        claim = TaskClaimed(attempt=number + 1, agent=f"a-{number}", assignment="x")
        entries.append(commit(number + 2, NAME, 2 * number, claim, TaskSleeping(key=f"~/s#{number}", until=1.0)))
    return entries


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(snapshots, "EVERY", 10)
    entries = long_task(60)
    entries.append(commit(62, "inbox.shop.1", 0, SignalReceived(name="go", position=7, value=Raw(b"1"))))
    archive = await Archive.open(tmp_path / "archive.db", epoch="e")
    await archive.add(entries)
    await archive.close()
    views = Views(tmp_path / "views.db", [SNAPSHOTS], epoch="e")
    views.advance([], 62, "mark")
    events = [event for entry in entries[:-1] for event in events_of(entry, SUBJECTS)]
    return views, connect(tmp_path / "archive.db", readonly=True), events


def kept(views: Views) -> list[int]:
    return [row[0] for row in views.run.execute("SELECT version FROM snapshots ORDER BY version")]


async def test_every_version_is_the_fold_of_its_events(place: Place) -> None:
    views, rows, events = place
    fold = FOLDS["task"]
    for again in (False, True):
        for version in range(len(events)):
            folded = state_of(views, rows, SUBJECTS, NAME, version)
            assert folded.state == fold(event for event in events if event.version <= version)
            assert (folded.head.version, folded.aggregate) == (version, NAME)
        assert kept(views) == list(range(10, 121, 10)), again
    for event in events:
        assert state_of(views, rows, SUBJECTS, NAME, None, event.time).state == fold(
            one for one in events if one.time <= event.time
        )


async def test_one_begins_at_the_nearest(place: Place) -> None:
    views, rows, _ = place
    state_of(views, rows, SUBJECTS, NAME)
    rows.close()
    rows = sqlite3.connect(":memory:")
    rows.execute("CREATE TABLE log (position, time, subject, headers, body, chain)")
    assert state_of(views, rows, SUBJECTS, NAME, 50).head.version == 50, "no event was needed"
    with pytest.raises(NotFound):
        state_of(views, rows, SUBJECTS, NAME, 9)


async def test_those_of_another_fold_are_not_used_and_made_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    views, rows, _ = place
    state_of(views, rows, SUBJECTS, NAME)
    old = FOLDS["task"]

    def evolve(state: TaskState, event: Event) -> TaskState:
        state = old.evolve(state, event)
        return structs.replace(state, message="of the new fold")

    new: Fold[TaskState] = replace(old, version=old.version + 1, evolve=evolve)
    monkeypatch.setitem(FOLDS, "task", new)
    assert state_of(views, rows, SUBJECTS, NAME, 15).state.message == "of the new fold"
    assert views.run.execute("SELECT DISTINCT fold FROM snapshots").fetchall() == [(new.version,)]


async def test_none_is_made_of_what_the_views_do_not_know(place: Place) -> None:
    views, rows, _ = place
    views.rebuild("snapshots")
    state_of(views, rows, SUBJECTS, NAME)
    assert kept(views) == []


async def test_a_large_state_is_not_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    views, rows, events = place
    monkeypatch.setattr(snapshots, "MAX_STATE", 40)
    assert state_of(views, rows, SUBJECTS, NAME).state == FOLDS["task"](events)
    assert kept(views) == []


async def test_other_kinds_and_nothing(place: Place) -> None:
    views, rows, _ = place
    inbox = state_of(views, rows, SUBJECTS, "inbox.shop.1")
    assert (inbox.state.signals, inbox.state.last, inbox.head.version) == ({"go": 1}, 7, 1)
    with pytest.raises(NotFound, match=r"nothing of task\.shop\.9"):
        state_of(views, rows, SUBJECTS, "task.shop.9")
    with pytest.raises(InvalidInput, match="have no state"):
        state_of(views, rows, SUBJECTS, "cheese.shop.9")
    with pytest.raises(InvalidInput, match="not an aggregate"):
        state_of(views, rows, SUBJECTS, "task.shop")


@given(seed=st.integers(0, 10**9))
def test_a_state_survives_being_kept(seed: int) -> None:
    for name, events in _by_aggregate(history(seed, 6)):
        fold = FOLDS[name.partition(".")[0]]
        for cut in range(len(events) + 1):
            state = fold(events[:cut])
            assert fold.load(fold.dump(state)) == state
            assert fold(events[cut:], fold.load(fold.dump(state))) == fold(events)


def _by_aggregate(entries: list[Entry]) -> Iterator[tuple[str, list[Event]]]:
    found: dict[str, list[Event]] = {}
    for entry in entries:
        for event in events_of(entry, SUBJECTS):
            found.setdefault(event.aggregate, []).append(event)
    yield from ((name, events) for name, events in found.items() if name.startswith("task."))
