"""Snapshots: states kept on the way, so that folding a long aggregate again begins near where it has to end.

They are made when somebody asks for a state and many events had to be folded for it, never on the path of writing. One
that another version of the fold made is not used, and is made again in the same way.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

import msgspec

from dspex.core.aggregates import FOLDS
from dspex.core.codec import events_of
from dspex.core.errors import InvalidInput, LogCorrupt, NotFound
from dspex.core.events import Event, Head
from dspex.core.fold import Fold, Folded
from dspex.core.subjects import Subjects, parse_aggregate
from dspex.store.chain import Row, entry_of
from dspex.store.projections import Views
from dspex.store.reading import SELECT

__all__ = ["EVERY", "MAX_STATE", "SNAPSHOTS", "fold_of", "state_of"]

EVERY = 1000
"""Events that are folded at most between two snapshots of an aggregate."""
MAX_STATE = 64 << 10
"""Bytes of a state that is kept; a larger one is folded anew each time, or its copies would outgrow the events."""


class Snapshots:
    """The table that they are kept in. It is thrown away with the views, when the archive is another."""

    name, version = "snapshots", 1
    tables: Mapping[str, Sequence[str]] = {
        "snapshots": (
            "CREATE TABLE snapshots (aggregate TEXT NOT NULL, fold INTEGER NOT NULL, version INTEGER NOT NULL,"
            " position INTEGER NOT NULL, time TEXT NOT NULL, state BLOB NOT NULL,"
            " PRIMARY KEY (aggregate, fold, version)) WITHOUT ROWID",
        )
    }

    def apply(self, run: sqlite3.Connection, events: Sequence[Event]) -> None:
        """Nothing: they are made when a state is asked for."""


SNAPSHOTS = Snapshots()


def fold_of(aggregate: str) -> Fold[object]:
    """The fold of an aggregate's kind. Raises InvalidInput when there is none."""
    try:
        kind = parse_aggregate(aggregate).kind
    except ValueError as error:
        raise InvalidInput(str(error)) from None
    if kind not in FOLDS:
        raise InvalidInput(f"aggregates of the kind {kind[:40]!r} have no state; {', '.join(FOLDS)} have one")
    return FOLDS[kind]


def state_of(
    views: Views, rows: sqlite3.Connection, subjects: Subjects, aggregate: str, to: int | None = None, at: str = ""
) -> Folded:
    """The state of an aggregate after version `to`, or at the time `at` (RFC 3339, UTC), or now; `rows` is the archive.

    Raises InvalidInput, and NotFound when the archive has nothing of it up to there.
    """
    fold = fold_of(aggregate)
    found = _nearest(views, aggregate, fold, to, at)
    begun = found is not None
    folded = found or Folded(aggregate=aggregate, state=fold.initial)
    kept = folded.head.version
    for commit in _commits(rows, subjects, aggregate, folded.head.position, whole=not begun):
        inside = [event for event in commit if (to is None or event.version <= to) and (not at or event.time <= at)]
        if inside:
            begun = True
            last = inside[-1]
            head = Head(last.version, last.position)
            folded = Folded(aggregate=aggregate, state=fold(inside, folded.state), head=head, time=last.time)
        if len(inside) < len(commit):
            break
        if folded.head.version - kept >= EVERY and folded.head.position <= views.at(SNAPSHOTS.name):
            _keep(views, fold, folded)
            kept = folded.head.version
    if not begun:
        raise NotFound(f"there is nothing of {aggregate} up to {f'version {to}' if to is not None else at or 'now'}")
    return folded


def _commits(
    rows: sqlite3.Connection, subjects: Subjects, aggregate: str, after: int, *, whole: bool
) -> Iterator[list[Event]]:
    """The commits of an aggregate behind a position; a task's submission before them when it is to be `whole`."""
    kind, name, id = parse_aggregate(aggregate)
    if whole and kind == "task" and id.isdecimal() and len(id) < 19:
        sent = rows.execute(f"{SELECT} WHERE position = ?", (int(id),)).fetchone()
        if sent is not None and subjects.door_of(sent[2]) == ("task", name):
            yield events_of(entry_of(Row._make(sent)), subjects)
    where = "WHERE subject = ? AND position > ? ORDER BY position"
    for values in rows.execute(f"{SELECT} {where}", (subjects.event(aggregate), after)):
        with suppress(LogCorrupt):
            yield events_of(entry_of(Row._make(values)), subjects)


def _nearest(views: Views, aggregate: str, fold: Fold[object], to: int | None, at: str) -> Folded | None:
    """The newest snapshot that is not past what is wanted."""
    where, parameters = "", list[object]()
    if to is not None:
        where, parameters = f"{where} AND version <= ?", [*parameters, to]
    if at:
        where, parameters = f"{where} AND time <= ?", [*parameters, at]
    if views.at(SNAPSHOTS.name) < 0:
        return None
    row = views.run.execute(
        f"SELECT version, position, time, state FROM snapshots WHERE aggregate = ? AND fold = ?{where}"
        " ORDER BY version DESC LIMIT 1",
        (aggregate, fold.version, *parameters),
    ).fetchone()
    if row is None:
        return None
    version, position, time, state = row
    with suppress(msgspec.MsgspecError):
        return Folded(aggregate=aggregate, state=fold.load(state), head=Head(version, position), time=time)
    return None


def _keep(views: Views, fold: Fold[object], folded: Folded) -> None:
    state = fold.dump(folded.state)
    if len(state) > MAX_STATE:
        return
    row = (folded.aggregate, fold.version, folded.head.version, folded.head.position, folded.time, state)
    with suppress(sqlite3.Error):  # it only costs time to go without
        views.run.execute("DELETE FROM snapshots WHERE aggregate = ? AND fold <> ?", (folded.aggregate, fold.version))
        views.run.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?, ?, ?)", row)
