"""The state of any aggregate, at any version or time, wherever its log is."""

from __future__ import annotations

from typing import Any

import msgspec

from dspex.compose.story import BusSource, Source
from dspex.core.aggregates import FOLDS
from dspex.core.errors import InvalidInput, NotFound, TaskError
from dspex.core.events import Event
from dspex.core.subjects import parse_aggregate

__all__ = ["events_of_aggregate", "query_of", "state_at"]


def query_of(aggregate: str) -> dict[str, str]:
    """What to ask a source for, so that it gives all events of an aggregate: a task's submission is one of them.

    Raises InvalidInput."""
    try:
        kind, _, id = parse_aggregate(aggregate)
    except ValueError as error:
        raise InvalidInput(str(error)) from None
    return {"task": id} if kind == "task" else {"aggregate": aggregate}


async def events_of_aggregate(source: Source, aggregate: str, to: int | None = None, at: str = "") -> list[Event]:
    """Its events up to version `to`, or up to the time `at` (RFC 3339, UTC). Raises NotFound, InvalidInput."""
    events = [event async for page in source.pages(**query_of(aggregate)) for event in page]
    found = [event for event in events if event.aggregate == aggregate]
    if not found:
        raise NotFound(f"the log has nothing of {aggregate}")
    kept = [event for event in found if (to is None or event.version <= to) and (not at or event.time <= at)]
    if not kept or (to is not None and to > found[-1].version):
        first, last = found[0], found[-1]
        raise InvalidInput(
            f"{aggregate} has versions {first.version} to {last.version}, from {first.time} to {last.time}"
        )
    return kept


async def state_at(source: Source, aggregate: str, to: int | None = None, at: str = "") -> dict[str, Any]:
    """`{"aggregate", "version", "position", "time", "fold", "state"}` after version `to`, or at the time `at`, or now.

    A running system's archivist begins at the nearest snapshot; elsewhere all events are folded. Raises NotFound, and
    InvalidInput for a kind of aggregate that has no state.
    """
    kind = aggregate.partition(".")[0]
    query_of(aggregate)
    if kind not in FOLDS:
        raise InvalidInput(f"aggregates of the kind {kind[:40]!r} have no state; {', '.join(FOLDS)} have one")
    if isinstance(source, BusSource):
        wanted = {"aggregate": aggregate, "to": to, "at": at, "position": await source.head()}
        try:
            answer = await source.caller.archive("state", wanted)
            found = msgspec.json.decode(answer, type=dict[str, Any])
            if found.pop("known") >= wanted["position"] and to in (None, found["version"]):
                return found
        except TaskError as error:
            if error.code not in (404, 503):
                raise
        # Without an archivist, or ahead of it: by the log itself.
    events = await events_of_aggregate(source, aggregate, to, at)
    fold, last = FOLDS[kind], events[-1]
    return {
        "aggregate": aggregate, "version": last.version, "position": last.position, "time": last.time,
        "fold": fold.version, "state": msgspec.json.decode(fold.dump(fold(events))),
    }  # fmt: skip
