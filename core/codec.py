"""Events to bytes and back: a commit is a CloudEvents JSON Batch, a door message is an event as it stands.

Our profile of CloudEvents 1.0 (JSON Batch Format): ids are strings, `aggregate`, `version`, `causationid` and
`correlationid` are extensions, `dataschema` is `urn:dspex:<Type>:<schema>`. Older schemas pass through `UPCASTERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any, cast

import msgspec
from msgspec import Raw, Struct

from dspex.core.errors import LogCorrupt
from dspex.core.events import (
    PAYLOADS, Event, OutcomeReported, Payload, SignalSent, TaskSubmitted, UnknownEvent,
)
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects

__all__ = ["UPCASTERS", "decode_commit", "encode_commit", "events_of", "rfc3339", "to_cloudevent"]

UPCASTERS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From (type, schema) as stored to the data of schema + 1."""


class _CloudEvent(Struct, kw_only=True):
    specversion: str = "1.0"
    id: str
    source: str
    type: str
    time: str
    aggregate: str
    version: int
    correlationid: str
    causationid: str
    dataschema: str
    data: Any


class _Stored(Struct, kw_only=True):
    type: str
    source: str
    time: str
    aggregate: str
    version: int
    correlationid: str
    causationid: str
    dataschema: str
    data: Raw


_SCHEMA = {kind: f"urn:dspex:{name}:{kind.schema}" for name, kind in PAYLOADS.items()}
_encoder = msgspec.json.Encoder()
_batch = msgspec.json.Decoder(list[_Stored])
_payload_decoders = {name: msgspec.json.Decoder(kind) for name, kind in PAYLOADS.items()}


def rfc3339(seconds: float) -> str:
    """Seconds since the epoch as an RFC 3339 time in UTC, to the microsecond."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


def to_cloudevent(event: Event) -> Struct:
    """The event in the form that travels; msgspec encodes it to JSON."""
    data = event.data
    name, schema, body = event.type, "", cast(object, data)
    if isinstance(data, UnknownEvent):
        schema, body = f"urn:dspex:{name}:0", data.data
    else:
        schema = _SCHEMA[type(data)]
    return _CloudEvent(
        id=event.id, source=event.source, type=name, time=event.time, aggregate=event.aggregate,
        version=event.version, correlationid=event.correlation, causationid=event.causation, dataschema=schema,
        data=body,
    )  # fmt: skip


def encode_commit(events: Sequence[Event]) -> bytes:
    """One commit's bytes: a JSON array of CloudEvents."""
    return _encoder.encode([to_cloudevent(event) for event in events])


def decode_commit(body: bytes, position: int = 0) -> list[Event]:
    """The events of a commit, upcast to today's schemas. Raises LogCorrupt when the bytes are no commit."""
    try:
        return [_event(stored, position) for stored in _batch.decode(body)]
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LogCorrupt(f"position {position} holds no commit: {error}") from error


def _event(stored: _Stored, position: int) -> Event:
    return Event(
        aggregate=stored.aggregate, version=stored.version, time=stored.time, source=stored.source,
        correlation=stored.correlationid, causation=stored.causationid, position=position,
        data=_payload(stored.type, stored.dataschema, stored.data),
    )  # fmt: skip


def _payload(name: str, dataschema: str, raw: Raw) -> Payload:
    kind = PAYLOADS.get(name)
    if kind is None:
        return UnknownEvent(type=name, data=raw)
    schema = int(dataschema.rpartition(":")[2] or 0)
    if schema == kind.schema:
        return _payload_decoders[name].decode(raw)
    data = msgspec.json.decode(raw)
    for number in range(schema, kind.schema):
        data = UPCASTERS[name, number](data)
    return msgspec.convert(data, kind)


def events_of(entry: Entry, subjects: Subjects) -> list[Event]:
    """The events of one log entry: those of its commit, or the one that a door message is.

    A door message's event has version 0, its time and position are those of storing, its correlation is its own
    position unless a header gave another.
    """
    door = subjects.door_of(entry.subject)
    if door is None:
        return decode_commit(entry.body, entry.position)
    kind, program = door
    body = _json_or_null(entry.body)
    data: Payload
    if kind == "task":
        shown = {name: value for name, value in entry.headers.items() if name.startswith(("Dspex-", "traceparent"))}
        data = TaskSubmitted(program=program, input=body, headers=shown)
    elif kind == "outcome":
        data = OutcomeReported(program=program, outcome=body)
    else:
        data = SignalSent(program=program, signal=body)
    position = str(entry.position)
    return [
        Event(
            aggregate=f"{kind}.{program}.{position}", version=0, time=rfc3339(entry.time),
            source=entry.headers.get("Dspex-Actor", "door"), position=entry.position,
            correlation=entry.headers.get("Dspex-Correlation", position),
            causation=entry.headers.get("Dspex-Causation", position), data=data,
        )
    ]  # fmt: skip


def _json_or_null(body: bytes) -> Raw:
    try:
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return Raw(b"null")
    return Raw(body)
