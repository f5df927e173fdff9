"""Forks, decided in pure functions: what a new task shares with its parent, and what is set in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from dspex.core.errors import InvalidInput
from dspex.core.events import EffectRecorded, Event, TaskForked
from dspex.core.history import remembered

__all__ = ["Shared", "separated", "shared", "with_input"]

INPUT = "input."


class Shared(NamedTuple):
    """What a fork begins with, and the parent's events whose records it copies, in their order."""

    forked: TaskForked
    records: list[Event]


def shared(events: Iterable[Event], parent: str, at: int, *, retry: bool = False) -> Shared:
    """What a fork of `parent` shares, whose events these are, up to version `at`: what an attempt that began there
    would remember. A `retry` does again what failed, under the parent's idempotency keys. Raises InvalidInput for a
    version that the parent does not have."""
    known = [event for event in events if event.version]
    last = known[-1].version if known else 0
    if not 0 <= at <= last:
        raise InvalidInput(f"task {parent} has versions 0 to {last}, there is no {at} to fork it at")
    upto = [event for event in known if event.version <= at]
    memory = remembered(upto)
    records = {
        event.data.key: event
        for event in upto
        if isinstance(event.data, EffectRecorded) and memory.records.get(event.data.key) is event.data
        and not (retry and event.data.error)
    }
    waits = {key: until for key, until in memory.until.items() if key not in records}
    forked = TaskForked(
        parent=parent, at=at, seed=memory.seed or parent, life=memory.life, records=len(records), waits=waits,
        keys=(memory.keys or parent) if retry else UNSET,
    )  # fmt: skip
    return Shared(forked, list(records.values()))


def separated(settings: Mapping[str, Any], fields: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings as they are given to a fork, apart: `input.<field>` sets a field of the input, everything else a
    variable. A field that is a variable too is set in the input, which counts before the variable. Raises InvalidInput
    for a field that the input does not have; `fields` are those it has."""
    have = set(fields)
    inputs: dict[str, Any] = {}
    variables: dict[str, Any] = {}
    for name, value in settings.items():
        if not name.startswith(INPUT):
            variables[name] = value
            continue
        path = name[len(INPUT) :]
        if path.partition(".")[0] not in have:
            raise InvalidInput(f"the input has no field {path.partition('.')[0]!r}; it has {', '.join(sorted(have))}")
        inputs[path] = value
    return inputs, variables


def with_input(body: bytes, inputs: Mapping[str, Any]) -> bytes:
    """A body of JSON with values set by path: `{"question": "…"}`, `{"user.name": "Ada"}`. The same bytes when nothing
    is set. Raises InvalidInput when the body, or something on the way, is no object."""
    if not inputs:
        return body
    value = msgspec.json.decode(body)
    for path, new in inputs.items():
        place = value
        *way, last = path.split(".")
        for name in way:
            if isinstance(place, dict):
                place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise InvalidInput(f"input.{path} cannot be set: what stands above it is no object")
        place[last] = new
    return msgspec.json.encode(value)
