"""What the log says, indexed by somebody who knows only its format (docs/protocol.md) and none of its code."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["TERMINAL", "Door", "Event", "Row", "Told", "same"]

TERMINAL = {"TaskCompleted", "TaskFailed", "TaskDuplicate", "TaskDeadLettered", "TaskCancelled"}


class Row(NamedTuple):
    """One message of the log. `time` is when it was stored, in seconds since the epoch."""

    position: int
    time: float
    subject: str
    headers: dict[str, str]
    body: bytes


class Door(NamedTuple):
    """A door message. `headers` are ours, in the case we write them in; `json` is None when the body is not JSON."""

    position: int
    time: float
    door: str
    program: str
    headers: dict[str, str]
    json: Any

    @property
    def key(self) -> str:
        return self.headers.get("Dspex-Key", "")

    @property
    def garbled(self) -> bool:
        """Whether the key was sent in bytes that are no text, which every reader shows in a way of its own."""
        return not self.key.isascii() or "\\x" in self.key

    @property
    def names(self) -> int:
        """The task that a signal or an outcome is for; 0 when it names none by its id."""
        task = str(self.json.get("task", "")) if isinstance(self.json, dict) else ""
        return int(task) if task.isascii() and task.isdecimal() and len(task) < 19 else 0

    @property
    def cancels(self) -> bool:
        return self.door == "signal" and isinstance(self.json, dict) and self.json.get("name") == "cancel"


class Event(NamedTuple):
    """One event of a commit; `position` and `time` are the commit's."""

    position: int
    time: float
    id: str
    type: str
    aggregate: str
    version: int
    source: str
    data: dict[str, Any]


@dataclass
class Told:
    """`doors` by position, `aggregates` by name with their events in order, and rows that are neither."""

    rows: list[Row]
    prefix: str = "dspex"
    doors: dict[int, Door] = field(default_factory=dict)
    aggregates: dict[str, list[Event]] = field(default_factory=dict)
    strange: list[Row] = field(default_factory=list)

    def __init__(self, rows: Iterable[Row], prefix: str = "dspex") -> None:
        self.rows, self.prefix = sorted(rows), prefix
        self.doors, self.strange = {}, []
        found: dict[str, list[Event]] = defaultdict(list)
        for row in self.rows:
            _, _, rest = row.subject.partition(f"{prefix}.")
            kind, _, name = rest.partition(".")
            if kind in ("task", "outcome", "signal"):
                self.doors[row.position] = _door(row, kind, name)
            elif kind == "event" and (events := _events(row, name)):
                found[name] += events
            elif row.subject:  # an empty one is a gap, which has a name of its own
                self.strange.append(row)
        self.aggregates = dict(found)

    def tasks(self) -> Iterable[Door]:
        """The submissions, in order."""
        return (door for door in self.doors.values() if door.door == "task")

    def events(self, task: int) -> list[Event]:
        """The events of a task."""
        door = self.doors.get(task)
        return self.aggregates.get(f"task.{door.program}.{task}", []) if door else []

    def ending(self, task: int) -> Event | None:
        """How a task ended: the first terminal event that it has."""
        return next((event for event in self.events(task) if event.type in TERMINAL), None)

    def original(self, task: int) -> int:
        """The task itself, or the one that it is a duplicate of."""
        ending = self.ending(task)
        return int(ending.data["of"]) if ending and ending.type == "TaskDuplicate" else task


def same(one: Any, other: Any) -> bool:
    """Whether two values are the same JSON: 1 and 1.0 are, true and 1 are not."""
    return json.dumps(_plain(one), sort_keys=True) == json.dumps(_plain(other), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _door(row: Row, kind: str, name: str) -> Door:
    headers = {key.title(): value for key, value in row.headers.items()}
    try:
        body = json.loads(row.body)
    except (ValueError, RecursionError):
        body = None
    return Door(row.position, row.time, kind, name.partition(".")[0], headers, body)


def _events(row: Row, aggregate: str) -> list[Event]:
    """The events of a commit; none when it is no commit of this aggregate."""
    try:
        batch = json.loads(row.body)
        if any(each["aggregate"] != aggregate or not isinstance(each["data"], dict) for each in batch):
            return []
        return [
            Event(row.position, row.time, each["id"], each["type"], each["aggregate"], each["version"], each["source"],
                  each["data"])
            for each in batch
        ]  # fmt: skip
    except (ValueError, KeyError, TypeError, RecursionError):
        return []
