"""The projection of tasks that nothing but a wake goes on with: until when each sleeps at the latest, or by when one
that was woken should have ended or sleep again."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from datetime import datetime

from dspex.core.events import Event, TaskClaimed, TaskRetried, TaskSleeping
from dspex.core.subjects import parse_aggregate
from dspex.store.projections import DROPPED, Views

__all__ = ["DUE", "overdue"]

_SLEEPS = (
    "INSERT INTO due VALUES (?, ?, ?, 0) ON CONFLICT (task) DO UPDATE"
    " SET at = IIF(claimed, excluded.at, MIN(at, excluded.at)), claimed = 0"
)
_CLAIMED = "INSERT OR REPLACE INTO due VALUES (?, ?, ?, 1)"
WOKEN_FOR = 60.0
"""Seconds after which a task that was woken and has not ended is looked at: its agent may have died with its wake."""
_OTHERWISE = frozenset({"AttemptDied", "EffectRecorded", "EffectRetried", "TaskSleeping"})
"""Events of a task that do not wake it."""


class Due:
    """One row for each task that sleeps until a time, or was claimed with a wake; any other event of it takes the row
    away."""

    name, version = "due", 2
    tables: Mapping[str, Sequence[str]] = {
        "due": (
            "CREATE TABLE due (task INTEGER PRIMARY KEY, program TEXT NOT NULL, at REAL NOT NULL,"
            " claimed INTEGER NOT NULL)",
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
                case TaskClaimed(wake=int() as wake) if wake:
                    by = datetime.fromisoformat(event.time).timestamp() + WOKEN_FOR
                    run.execute(_CLAIMED, (int(task), program, by))
                case data if type(data).__name__ not in _OTHERWISE:
                    run.execute("DELETE FROM due WHERE task = ?", (int(task),))


DUE = Due()


def overdue(views: Views, before: float, limit: int, *, claimed: bool = False) -> dict[str, list[str]]:
    """Up to `limit` sleeping tasks that should have been woken before a time, in seconds since the epoch; by program.
    `claimed`: those that were woken, and should have ended or sleep again."""
    found: dict[str, list[str]] = {}
    if views.at(DUE.name) != DROPPED:
        query = "SELECT program, task FROM due WHERE at < ? AND claimed = ? ORDER BY at LIMIT ?"
        for program, task in views.run.execute(query, (before, claimed, limit)):
            found.setdefault(program, []).append(str(task))
    return found
