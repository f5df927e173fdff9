"""What differs between two values, and between two tasks: by path, event by event."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import msgspec

from dspex.core.events import Event

__all__ = ["ABSENT", "Change", "Row", "changes", "compare", "visible"]


class _Absent:
    """What stands for a value that is not there, which null would not say."""

    def __repr__(self) -> str:
        return "nothing"


ABSENT = _Absent()
PASSING = frozenset({"attempt", "agent", "seconds", "until", "position", "retry"})
"""Fields that tell two runs of the same thing apart: who, when, how often, how long."""
OF_TIME = frozenset({"now", "new_id"})
"""Effects whose result is another one in every run."""


class Change(NamedTuple):
    """One place at which two values differ; ABSENT stands for a value that is not there."""

    path: str
    left: Any
    right: Any


class Row(NamedTuple):
    """Two events beside each other, either of which may be missing, and where they differ."""

    left: Event | None
    right: Event | None
    changes: list[Change]

    @property
    def same(self) -> bool:
        return self.left is not None and self.right is not None and not self.changes


def changes(left: Any, right: Any, path: str = "") -> Iterator[Change]:
    """Every place, by path, at which two JSON values differ, in the order of their names."""
    if isinstance(left, dict) and isinstance(right, dict):
        for name in sorted(left.keys() | right.keys()):
            yield from changes(left.get(name, ABSENT), right.get(name, ABSENT), f"{path}.{name}" if path else name)
    elif isinstance(left, list) and isinstance(right, list):
        for number in range(max(len(left), len(right))):
            one = left[number] if number < len(left) else ABSENT
            other = right[number] if number < len(right) else ABSENT
            yield from changes(one, other, f"{path}[{number}]")
    elif type(left) is not type(right) or left != right:
        yield Change(path, left, right)


def visible(event: Event, everything: bool = False) -> dict[str, Any]:
    """What an event says, as JSON has it; without what is another in every run, unless `everything`."""
    said: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(event.data))
    if everything:
        return {"time": event.time, "source": event.source, "position": event.position, **said}
    if event.type == "EffectRecorded" and said.get("name") in OF_TIME:
        said.pop("result", None)
    return {name: value for name, value in said.items() if name not in PASSING}


def compare(left: Sequence[Event], right: Sequence[Event], *, everything: bool = False) -> list[Row]:
    """Two histories side by side: events that are the same kind of thing at the same place face each other.

    Ids, times, attempts and durations are left out, unless `everything`.
    """
    rows: list[Row] = []
    matcher = SequenceMatcher(None, [_kind(event) for event in left], [_kind(event) for event in right], autojunk=False)
    for tag, i, j, k, m in matcher.get_opcodes():
        if tag == "equal":
            rows += [_row(one, other, everything) for one, other in zip(left[i:j], right[k:m], strict=True)]
        else:
            rows += _uneven(left[i:j], right[k:m])
    return rows


def _uneven(left: Iterable[Event], right: Iterable[Event]) -> list[Row]:
    return [Row(event, None, []) for event in left] + [Row(None, event, []) for event in right]


def _row(left: Event, right: Event, everything: bool) -> Row:
    found = list(changes(visible(left, everything), visible(right, everything)))
    if any(change.path.startswith("request") for change in found):  # then its hash says nothing more
        found = [change for change in found if change.path != "digest"]
    return Row(left, right, found)


def _kind(event: Event) -> tuple[str, str]:
    """What makes two events comparable: the type, and for those of a place, the place."""
    return event.type, str(getattr(event.data, "key", ""))
