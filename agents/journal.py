"""Writing to an aggregate that several processes may write to: read its head, append, try again on a conflict."""

from __future__ import annotations

from collections.abc import Sequence

from dspex.agents import logtime
from dspex.core.codec import decode_commit, rfc3339
from dspex.core.errors import LogError
from dspex.core.events import Event, Head, Payload
from dspex.core.ports import Appended, Log

__all__ = ["events_for", "head_of", "record"]

TRIES = 20


def events_for(
    aggregate: str, head: Head, payloads: Sequence[Payload], *, source: str, correlation: str = "", causation: str = ""
) -> list[Event]:
    """Payloads as the next events of an aggregate that stands at `head`, stamped with the time now."""
    now = rfc3339(logtime.now())
    return [
        Event(aggregate, version, now, source, correlation, causation, payload)
        for version, payload in enumerate(payloads, head.version + 1)
    ]


async def head_of(log: Log, aggregate: str) -> Head:
    """Where an aggregate stands now."""
    entry = await log.last(aggregate)
    if entry is None:
        return Head()
    return Head(decode_commit(entry.body, entry.position)[-1].version, entry.position)


async def record(
    log: Log, aggregate: str, payloads: Sequence[Payload], *, source: str, causation: str = ""
) -> Head:
    """Append facts that are true whatever else was written meanwhile; return the new head. Raises LogError."""
    head = await head_of(log, aggregate)
    for _ in range(TRIES):
        events = events_for(aggregate, head, payloads, source=source, causation=causation)
        result = await log.append(aggregate, events, head)
        head = result.head
        if isinstance(result, Appended):
            return head
    raise LogError(f"{aggregate} changed {TRIES} times while one event was being added to it")
