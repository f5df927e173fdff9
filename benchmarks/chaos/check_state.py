"""Is the log whole, and is everything that was computed from it what the log says?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.chaos.evidence import Evidence, Violation
from benchmarks.chaos.told import Event, Told

from dspex.core.aggregates import FOLDS
from dspex.core.audit import audit
from dspex.core.codec import events_of
from dspex.core.errors import LogCorrupt
from dspex.core.events import Event as Stored
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects

__all__ = ["archive", "budgets", "decoded", "folds", "positions", "snapshots", "versions", "views"]

STATUS = {
    "TaskClaimed": "running", "TaskCompleted": "completed", "TaskSleeping": "sleeping", "TaskRetried": "sleeping",
    "TaskFailed": "failed", "TaskDuplicate": "duplicate", "TaskDeadLettered": "dead", "TaskCancelled": "cancelled",
}  # fmt: skip


def positions(seen: Evidence) -> Iterator[Violation]:
    """The log has every position once, apart from those that it names as a gap, and nothing that is no event."""
    due = seen.told.rows[0].position if seen.told.rows else 0
    gaps = dict(seen.archived.gaps) if seen.archived else {}
    for row in seen.told.rows:
        while due in gaps:
            due = gaps[due] + 1
        if row.position != due:
            yield Violation("positions", f"position {row.position} comes where {due} was due", 0, row.position)
        due = row.position + 1
    if not seen.may_forge:
        for row in seen.told.strange:
            yield Violation("positions", f"{row.subject} holds what is no event: {row.body[:60]!r}", 0, row.position)


def versions(seen: Evidence) -> Iterator[Violation]:
    """In every aggregate the versions are 1, 2, 3 …, in the order of the log, and ids say so."""
    for name, events in seen.told.aggregates.items():
        for number, event in enumerate(events, 1):
            if (event.version, event.id) != (number, f"{name}/{number}"):
                what = f"{name} has version {event.version} ({event.id}) where {number} was due"
                yield Violation("versions", what, 0, event.position)
                break


def folds(seen: Evidence) -> Iterator[Violation]:
    """dspex's own fold of each task says what a plain reading of its events says."""
    stored = decoded(seen.told)
    for door in seen.told.tasks():
        events = seen.told.events(door.position)
        if not events:
            continue
        name = f"task.{door.program}.{door.position}"
        state: Any = FOLDS["task"](stored.get(name, []))
        due = _plainly(events)
        found = {"state": state.status, "attempts": state.attempts, "version": state.head.version}
        wrong = {key: value for key, value in found.items() if due[key] != value}
        if wrong:
            yield Violation("folds", f"the fold says {wrong}, the events {due}", door.position)


def views(seen: Evidence) -> Iterator[Violation]:
    """The view `tasks` has a row for every task, which says what a plain reading of its events says."""
    if seen.views is None:
        return
    rows = seen.views.tasks
    for door in seen.told.tasks():
        if door.position > seen.views.position:
            continue
        row = rows.get(door.position)
        if row is None:
            yield Violation("views", "it has no row in the view of tasks", door.position)
            continue
        due = _plainly(seen.told.events(door.position)) | {"program": door.program}
        if not door.garbled:
            due["key"] = door.key or None
        wrong = {key: row[key] for key, value in due.items() if row[key] != value}
        if wrong:
            yield Violation("views", f"the view says {wrong}, the events {due}", door.position)
    for task in rows.keys() - {door.position for door in seen.told.tasks()}:
        yield Violation("views", "a row in the view of tasks, and no task", task)


def snapshots(seen: Evidence) -> Iterator[Violation]:
    """A state that was kept is what the fold makes of the events up to there."""
    stored = decoded(seen.told) if seen.views and seen.views.snapshots else {}
    for kept in seen.views.snapshots if seen.views else ():
        fold: Any = FOLDS[kept.aggregate.partition(".")[0]]
        events = [event for event in stored.get(kept.aggregate, []) if event.version <= kept.version]
        if fold.version == kept.fold and fold.dump(fold(events)) != kept.state:
            yield Violation("snapshots", f"the snapshot of {kept.aggregate} at {kept.version} is another", 0)


def archive(seen: Evidence) -> Iterator[Violation]:
    """The archive is unbroken, has all of the log, and is the same."""
    if seen.archived is None:
        return
    for position, what in seen.archived.faults:
        yield Violation("archive", what, 0, position)
    last = seen.told.rows[-1].position if seen.told.rows else 0
    if seen.archived.position < last:
        yield Violation("archive", f"it ends at {seen.archived.position}, and the log at {last}", 0, last)


def _plainly(events: list[Event]) -> dict[str, Any]:
    """What a reading of a task's events without any of our code makes of them."""
    found: dict[str, Any] = {"state": "submitted", "attempts": 0, "effects": 0, "version": 0, "of": None}
    for event in events:
        found["state"] = STATUS.get(event.type, found["state"])
        found["version"] = event.version
        found["effects"] += event.type == "EffectRecorded"
        if event.type == "TaskClaimed":
            found["attempts"] = event.data["attempt"]
        elif event.type == "TaskDuplicate":
            found["of"] = event.data["of"]
    return found


def budgets(seen: Evidence) -> Iterator[Violation]:
    """What was lent, settled and spent of budgets adds up (`core.audit`)."""
    events = [event for found in decoded(seen.told).values() for event in found]
    for what in audit(sorted(events, key=lambda event: (event.position, event.version))):
        yield Violation("budgets", what)


def decoded(told: Told) -> dict[str, list[Stored]]:
    """The events of every aggregate as dspex reads them, a task's with its submission before them."""
    found: dict[str, list[Stored]] = {}
    subjects = Subjects(told.prefix)
    for row in told.rows:
        entry = Entry(position=row.position, time=row.time, subject=row.subject, body=row.body, headers=row.headers)
        try:
            for event in events_of(entry, subjects):
                found.setdefault(event.aggregate, []).append(event)
        except (LogCorrupt, ValueError):
            continue  # `positions` names it
    return found
