"""Views: exact after any crash, made again when they should be, and the tasks that they find."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw
from tests.store.histories import ALL, SUBJECTS, WORDS, apply, commit, door, dump, history

from dspex.core.codec import events_of
from dspex.core.errors import InvalidInput, Unavailable
from dspex.core.events import AttemptDied, Event, Payload, TaskClaimed, TaskCompleted, TaskSleeping
from dspex.core.find import TaskQuery, TaskRow
from dspex.core.ports import Entry
from dspex.core.task import TaskState, fold
from dspex.store.due import DUE, WOKEN_FOR, overdue
from dspex.store.finding import find, mentions_of
from dspex.store.projections import DROPPED, Views
from dspex.store.tasks import MAX_WORDS, Tasks, words_of

ROOT = Path(__file__).resolve().parents[2]


def fresh(entries: list[Entry], group: int = 100) -> Views:
    views = Views(None, ALL, epoch="e")
    apply(views, entries, group)
    return views


def ids(views: Views, **query: object) -> list[str]:
    return [row.task for row in find(views, TaskQuery(**query)).tasks]  # type: ignore[arg-type]


# -- what they say


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), group=st.integers(1, 40))
def test_a_row_says_what_the_fold_of_its_task_says(seed: int, group: int) -> None:
    entries = history(seed, 12)
    states: dict[str, TaskState] = {}
    for entry in entries:
        for event in events_of(entry, SUBJECTS):
            if event.aggregate.startswith("task."):
                states[event.aggregate] = fold([event], states.get(event.aggregate))
    with fresh(entries, group) as views:
        rows = {f"task.{row.program}.{row.task}": row for row in find(views, TaskQuery(limit=200)).tasks}
    assert rows.keys() == states.keys()
    for name, state in states.items():
        row = rows[name]
        assert (row.state, row.attempts, row.retries, row.version) == (
            state.status, state.attempts, state.retries, state.head.version
        )  # fmt: skip
        assert (row.agent or "", row.assignment or "", row.of or "") == (state.agent, state.assignment, state.of)
        assert (row.error or {}).get("type", "") == state.error
        assert (bytes(row.input) if row.input is not None else None) == (bytes(state.input) if state.input else None)
        assert (bytes(row.output) if row.output is not None else None) == (bytes(state.output) if state.output else None)
        assert (row.ended is not None) == state.ended


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**9), group=st.integers(1, 40))
def test_groups_make_no_difference(seed: int, group: int) -> None:
    entries = history(seed, 40)
    with fresh(entries, 1) as one, fresh(entries, group) as other:
        assert dump(one) == dump(other)


def test_the_newest_score_counts_whoever_came_first() -> None:
    entries = [
        door(1, "outcome", "shop", {"task": "k", "score": 0.125}),
        door(2, "task", "shop", {}, {"Dspex-Key": "k"}),
        door(3, "task", "bakery", {}, {"Dspex-Key": "k"}),
        door(4, "outcome", "shop", {"task": 2, "score": 0.5}),
        door(5, "outcome", "bakery", {"task": 2, "score": 0.75}),  # a task of another program
        door(6, "signal", "shop", {"task": 2, "name": "go"}),
        door(7, "outcome", "shop", {"task": 2, "score": 10**400}),
    ]
    for group in (1, 7):
        with fresh(entries, group) as views:
            rows = find(views, TaskQuery()).tasks
            assert [(row.score, row.scores) for row in rows] == [(0.5, 2), (None, 0)]
            assert mentions_of(views, "shop", 2) == ([4, 6, 7], 7)
            assert ids(views, score=">= 0.5") == ["2"]
            assert ids(views, score="<0.5") == []


def test_tasks_are_found_by_what_is_known_of_them() -> None:
    entries = [
        door(1, "task", "shop", {"wants": "black tea", "n": 7}),
        commit(2, "task.shop.1", 0, TaskClaimed(attempt=1, agent="a", assignment="x"), completed(b'{"said": "milk"}')),
        door(3, "task", "shop", {"wants": "tea black"}, {"Dspex-Key": "mine"}),
        door(4, "task", "bakery", {"wants": "Stra\u00dfe"}, {"Dspex-Parent": "1"}),
        commit(5, "task.bakery.4", 0, TaskClaimed(attempt=1, agent="a", assignment="x")),
    ]
    with fresh(entries) as views:
        assert ids(views) == ["1", "3", "4"]
        assert ids(views, program="shop") == ["1", "3"]
        assert ids(views, state=["completed", "running"]) == ["1", "4"]
        assert ids(views, key="mine") == ["3"]
        assert ids(views, parent="1") == ["4"]
        assert ids(views, text="black tea") == ["1", "3"]
        assert ids(views, text='"black tea"') == ["1"]
        assert ids(views, text="tea milk") == ["1"], "one word in the input, one in the output"
        assert ids(views, text="BLA* 7") == ["1"]
        assert ids(views, text="stra\u00dfe") == ["4"]
        assert ids(views, text='NEAR( OR "') == []
        times = [row.submitted for row in find(views, TaskQuery()).tasks]
        assert ids(views, since=times[1]) == ["3", "4"]
        assert ids(views, until=times[1]) == ["1"]
        assert ids(views, limit=1) == ["4"]
        assert ids(views, limit=1, before=4) == ["3"]
        assert ids(views, limit=2, after=1) == ["3", "4"]
        assert find(views, TaskQuery(limit=1)).more
        assert not find(views, TaskQuery(limit=3)).more
        [row] = find(views, TaskQuery(key="mine", brief=True)).tasks
        assert row.input is None


def completed(output: bytes) -> TaskCompleted:
    from msgspec import Raw

    return TaskCompleted(output=Raw(output), seconds=0.5)


@pytest.mark.parametrize(
    ("query", "said"),
    [
        (TaskQuery(state=["gone"]), "no state of a task"),
        (TaskQuery(since="yesterday"), "no time"),
        (TaskQuery(score="good"), "no condition on a score"),
        (TaskQuery(limit=0), "1 to 200"),
        (TaskQuery(text="--"), "no word in it"),
        (TaskQuery(text="a" * 300), "at most 256"),
    ],
)
def test_a_query_that_makes_no_sense_is_refused(query: TaskQuery, said: str) -> None:
    with Views(None, ALL, epoch="e") as views, pytest.raises(InvalidInput, match=said):
        find(views, query)


def test_words_are_bounded_and_in_order() -> None:
    assert words_of({"a": ["x", 1, {"b": 2.5}], "c": True, "d": None, "e": "y"}) == "x 1 2.5 y"
    assert len(words_of(["w" * 100] * 1000)) <= MAX_WORDS
    assert len(words_of("w" * 10**6)) == MAX_WORDS


# -- when they begin anew


def test_they_go_on_where_they_were(tmp_path: Path) -> None:
    entries = history(1, 20)
    with Views(tmp_path / "views.db", ALL, epoch="e") as views:
        apply(views, entries[:30], 10)
    with Views(tmp_path / "views.db", ALL, epoch="e") as views:
        views.fit(lambda position: f"mark {position}")
        assert views.position == 30
        apply(views, entries[30:], 10)
        with fresh(entries) as expected:
            assert dump(views) == dump(expected)


class Changed(Tasks):
    version = 99


@pytest.mark.parametrize("what", ["version", "epoch", "archive"])
def test_they_begin_anew_when_what_they_were_made_of_is_another(tmp_path: Path, what: str) -> None:
    entries = history(1, 20)
    with Views(tmp_path / "views.db", ALL, epoch="e") as views:
        apply(views, entries, 10)
    projections = (Changed(), *ALL[1:]) if what == "version" else ALL
    with Views(tmp_path / "views.db", projections, epoch="other" if what == "epoch" else "e") as views:
        views.fit(lambda position: "another" if what == "archive" else f"mark {position}")
        top = entries[-1].position
        at = {view.name: view.position for view in views.described()}
        assert at == {"tasks": 0, "text": top if what == "version" else 0, "bodies": top if what == "version" else 0}
        assert views.run.execute("SELECT COUNT(*) FROM tasks").fetchone() == (0,)
        while (until := views.until()) is not None or views.position < top:
            rest = [entry for entry in entries if views.position < entry.position <= (until or top)]
            apply(views, rest, 10)
        with fresh(entries) as expected:
            assert dump(views) == dump(expected)


def test_one_that_was_dropped_stays_so_until_it_is_rebuilt(tmp_path: Path) -> None:
    entries = history(1, 20)
    with Views(tmp_path / "views.db", ALL, epoch="e") as views:
        apply(views, entries, 10)
        views.drop("text")
        assert views.at("text") == DROPPED
        assert views.position == entries[-1].position, "the others go on"
    with Views(tmp_path / "views.db", ALL, epoch="e") as views:
        assert views.at("text") == DROPPED
        with pytest.raises(Unavailable, match="dspex views rebuild text"):
            find(views, TaskQuery(text="tea"))
        views.rebuild("text")
        assert (views.position, views.until()) == (0, entries[-1].position)
        apply(views, entries, 10)
        with fresh(entries) as expected:
            assert dump(views) == dump(expected)
        with pytest.raises(InvalidInput, match="there is no view 'nothing'"):
            views.rebuild("nothing")


def test_a_view_of_an_older_version_is_removed(tmp_path: Path) -> None:
    with Views(tmp_path / "views.db", ALL, epoch="e") as views:
        apply(views, history(1, 5), 10)
    with Views(tmp_path / "views.db", ALL[:1], epoch="e") as views:
        assert [view.name for view in views.described()] == ["tasks"]
        tables = {name for (name,) in views.run.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        assert not tables & {"texts", "bodies"}


@pytest.mark.parametrize("how", ["garbage", "page"])
def test_a_damaged_file_is_made_again(tmp_path: Path, how: str) -> None:
    file = tmp_path / "views.db"
    with Views(file, ALL, epoch="e") as views:
        apply(views, history(1, 20), 10)
    data = bytearray(file.read_bytes())
    data[0:100] = b"x" * 100 if how == "garbage" else data[0:100]
    if how == "page":
        data[100:4096] = bytes(3996)
    file.write_bytes(data)
    with Views(file, ALL, epoch="e") as views:
        assert views.position == 0
        apply(views, history(1, 20), 10)


class Stubborn:
    """Cannot take in one of the events."""

    name, version = "stubborn", 1
    tables: Mapping[str, Sequence[str]] = {"stubborns": ("CREATE TABLE stubborns (position INTEGER PRIMARY KEY)",)}

    def apply(self, run: sqlite3.Connection, events: Sequence[Event]) -> None:
        for event in events:
            run.execute("INSERT OR IGNORE INTO stubborns VALUES (?)", (event.position,))
            if event.position == 25:
                raise KeyError("a mistake in a projection")


def test_a_projection_that_fails_stops_and_the_others_go_on(tmp_path: Path) -> None:
    entries = history(1, 20)
    with Views(tmp_path / "views.db", (*ALL, Stubborn()), epoch="e") as views:
        apply(views, entries, 10)
        with fresh(entries) as expected:
            assert dump(views) == dump(expected)
        assert views.at("stubborn") == 20
        assert "KeyError" in next(view.trouble for view in views.described() if view.name == "stubborn")
        assert views.run.execute("SELECT MAX(position) FROM stubborns").fetchone() == (20,), "nothing half done"


# -- crashes


def test_they_are_exact_whenever_the_process_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "views.db"
    entries = history(7, 400)
    seen = set()
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.store.histories", str(file)], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert process.stdout
        assert process.stdout.readline()
        time.sleep(random.uniform(0.0, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        with Views(file, ALL, epoch="e", readonly=True) as views:
            for view in views.described():
                seen.add(view.position)
                with Views(None, ALL, epoch="e") as expected:
                    apply(expected, [entry for entry in entries if entry.position <= view.position], 50)
                    table = {"tasks": "tasks", "text": "texts", "bodies": "bodies"}[view.name]
                    assert dump(views)[table] == dump(expected)[table], view
    assert len(seen) > 2, "it was killed at different places"


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "views.db"
    entries = history(3, 200)
    with Views(file, ALL, epoch="e") as views:
        apply(views, entries[:50], 10)
        before = dump(views)
        views.run.execute(f"PRAGMA max_page_count = {views.run.execute('PRAGMA page_count').fetchone()[0] + 1}")
        with pytest.raises(sqlite3.OperationalError, match="full"):
            apply(views, entries[50:], 10_000)
        assert (dump(views), views.position) == (before, 50)
        views.run.execute("PRAGMA max_page_count = 1073741823")
        apply(views, entries[50:], 10_000)
        with fresh(entries) as expected:
            assert dump(views) == dump(expected)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_search_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspex.store.finding.PATIENCE", -1.0)
    monkeypatch.setattr("dspex.store.finding.STEPS", 1)
    with fresh(history(1, 50)) as views, pytest.raises(Unavailable, match="took longer"):
        find(views, TaskQuery(text=WORDS[0]))


def test_what_is_known_of_a_task_has_no_more_fields_than_its_page_says() -> None:
    page = (ROOT / "docs" / "protocol.md").read_text()
    assert [name for name in TaskRow.__struct_fields__ if f"`{name}`" not in page] == []


def test_a_task_that_was_woken_is_due_until_it_ends_or_sleeps_again() -> None:
    claim = TaskClaimed(attempt=2, agent="p-1", assignment="x", wake=9)
    first = TaskClaimed(attempt=1, agent="p-1", assignment="x")
    sleeping, died = TaskSleeping(key="k", until=5.0), AttemptDied(attempt=2, agent="p-1", reason="SIGKILL")
    far = time.time() + 10 * WOKEN_FOR

    def due(*events: Payload) -> tuple[bool, bool]:
        with Views(None, [DUE], epoch="e") as views:
            apply(views, [commit(8 + n, "task.p.7", n, event) for n, event in enumerate(events)], 1)
            asleep, woken = (overdue(views, far, 10, claimed=claimed) for claimed in (False, True))
            assert all(found in ({}, {"p": ["7"]}) for found in (asleep, woken))
            return bool(asleep), bool(woken)

    assert due(first) == (False, False), "its submission brings it back"
    assert due(first, sleeping) == (True, False)
    assert due(first, sleeping, claim) == (False, True)
    assert due(first, sleeping, claim, died) == (False, True), "whoever wrote that may die before the claim"
    assert due(first, sleeping, claim, sleeping) == (True, False)
    assert due(first, sleeping, claim, TaskCompleted(output=Raw(b"1"), seconds=1.0)) == (False, False)
