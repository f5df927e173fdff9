"""The projection of sleeping tasks: until when each of them sleeps, at the latest."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

from dspex.core.events import Event, TaskRetried, TaskSleeping
from dspex.core.subjects import parse_aggregate
from dspex.store.projections import DROPPED, Views

__all__ = ["DUE", "overdue"]

_SLEEPS = (
    "INSERT INTO due VALUES (?, ?, ?) ON CONFLICT (task) DO UPDATE SET at = MIN(at, excluded.at)"
)
_OTHERWISE = frozenset({"EffectRecorded", "TaskSleeping"})
"""Events of a task that do not wake it."""


class Due:
    """One row for each task that sleeps until a time; any other event of it takes the row away."""

    name, version = "due", 1
    tables: Mapping[str, Sequence[str]] = {
        "due": (
            "CREATE TABLE due (task INTEGER PRIMARY KEY, program TEXT NOT NULL, at REAL NOT NULL)",
            "CREATE INDEX due_at ON due (at)",
        )
    }

    def apply(self, run: sqlite3.Connection, events: Sequence[Event]) -> None:
        for event in events:
            if not event.aggregate.startswith("task.") or not event.version:
                continue
            _, program, task = parse_aggregate(event.aggregate)
            match event.data:
                case TaskSleeping(until=float() as until) | TaskRetried(until=float() as until):
                    run.execute(_SLEEPS, (int(task), program, until))
                case data if type(data).__name__ not in _OTHERWISE:
                    run.execute("DELETE FROM due WHERE task = ?", (int(task),))


DUE = Due()


def overdue(views: Views, before: float, limit: int) -> dict[str, list[str]]:
    """Up to `limit` tasks that should have been woken before a time, in seconds since the epoch; by program."""
    found: dict[str, list[str]] = {}
    if views.at(DUE.name) != DROPPED:
        rows = views.run.execute("SELECT program, task FROM due WHERE at < ? ORDER BY at LIMIT ?", (before, limit))
        for program, task in rows:
            found.setdefault(program, []).append(str(task))
    return found
