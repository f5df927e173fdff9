"""Events to bytes and back: a commit is a CloudEvents JSON Batch, a door message is an event as it stands.

Our profile of CloudEvents 1.0 (JSON Batch Format): ids are strings, `aggregate`, `version`, `causationid` and
`correlationid` are extensions, `dataschema` is `urn:dspex:<Type>:<schema>`. Older schemas pass through `UPCASTERS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, ClassVar, Generic, TypeVar, Union

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from dspex.core.errors import LogCorrupt
from dspex.core.events import (
    PAYLOADS,
    Event,
    Held,
    OutcomeReported,
    Payload,
    SignalSent,
    TaskSubmitted,
    UnknownEvent,
)
from dspex.core.headers import SEALED
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects

__all__ = [
    "NOT_JSON", "UPCASTERS", "Page", "decode_commit", "decode_page", "encode_commit", "encode_event", "events_of",
    "rfc3339", "sealed_body", "sealed_in",
]  # fmt: skip

E = TypeVar("E")

UPCASTERS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From (type, schema) as stored to the data of schema + 1."""


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
    position: int = 0


NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What decoding raises on bytes from strangers."""
NOT_TODAYS = (msgspec.MsgspecError, *NOT_JSON)


class _Envelope(Struct, kw_only=True, gc=False):
    """An event of today's schema, as it is stored; `data` is added for each type."""

    source: str
    time: str
    aggregate: str
    version: int
    correlationid: str
    causationid: str
    dataschema: str
    position: int = 0
    current: ClassVar[str] = ""
    data: ClassVar[Payload]


_TIME = re.compile(r"[0-9T:.Z+-]{1,40}")
_encode = msgspec.json.Encoder().encode
_quoted = lru_cache(maxsize=1024)(_encode)


def _kind(name: str, schema: int) -> bytes:
    """A type's name and, behind it, its dataschema."""
    return b'%b,"dataschema":%b' % (_encode(name), _encode(f"urn:dspex:{name}:{schema}"))


_KINDS = {kind: _kind(name, kind.schema) for name, kind in PAYLOADS.items()}
_batch = msgspec.json.Decoder(list[_Stored])
_ENVELOPES = tuple(
    msgspec.defstruct(
        f"_{name}", [("data", kind)], bases=(_Envelope,), tag_field="type", tag=name, kw_only=True, gc=False,
        namespace={"current": f"urn:dspex:{name}:{kind.schema}"},
    )
    for name, kind in PAYLOADS.items()
)  # fmt: skip
_today: msgspec.json.Decoder[list[_Envelope]] = msgspec.json.Decoder(list[Union[_ENVELOPES]])  # type: ignore[valid-type]  # noqa: UP007
"""All of a commit at once, payloads included, when every event in it is of a known type and of today's schema."""


class Page(Struct, Generic[E]):
    """What `dspex.log.read` answers."""

    epoch: str
    events: list[E]
    next: int
    head: int


_today_page: msgspec.json.Decoder[Page[_Envelope]] = msgspec.json.Decoder(Page[Union[_ENVELOPES]])  # type: ignore[valid-type]  # noqa: UP007
_any_page = msgspec.json.Decoder(Page[_Stored])
_payload_decoders = {name: msgspec.json.Decoder(kind) for name, kind in PAYLOADS.items()}


def rfc3339(seconds: float) -> str:
    """Seconds since the epoch as an RFC 3339 time in UTC, to the microsecond."""
    second, micros = divmod(round(seconds * 1e6), 1_000_000)
    return f"{_to_the_second(second)}.{micros:06d}Z"


@lru_cache(maxsize=64)
def _to_the_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).isoformat()[:19]


def encode_event(event: Event) -> bytes:
    """The event as it travels and is stored: one CloudEvent in JSON."""
    return _encoded(event, *_shared(event))


def encode_commit(events: Sequence[Event]) -> bytes:
    """One commit's bytes: a JSON array of CloudEvents."""
    first = events[0]
    before, between = _shared(first)
    parts = [
        _encoded(event, before, between) if _alike(event, first) else encode_event(event)  # never so for our commits
        for event in events
    ]
    return b"[%b]" % b",".join(parts)


# Put together by hand because it is on the path of every task; what may need escaping goes through the encoder.


def _alike(event: Event, first: Event) -> bool:
    """Whether two events of a commit differ in nothing but version and data."""
    return event is first or (
        event.time == first.time and event.aggregate == first.aggregate and event.source == first.source
        and event.correlation == first.correlation and event.causation == first.causation
    )  # fmt: skip


def _shared(event: Event) -> tuple[bytes, bytes]:
    """What an event has in common with the others of its commit: up to the version in the id, and behind the type."""
    name = event.aggregate.encode()
    between = b',"source":%b,"time":"%b","aggregate":"%b","correlationid":%b,"causationid":%b,"version":' % (
        _quoted(event.source), event.time.encode(), name, _quoted(event.correlation), _quoted(event.causation),
    )  # fmt: skip
    return b'{"specversion":"1.0","id":"%b/' % name, between


def _encoded(event: Event, before: bytes, between: bytes) -> bytes:
    data = event.data
    if isinstance(data, UnknownEvent):
        kind, body = _kind(data.type, 0), bytes(data.data)
    else:
        kind, body = _KINDS[type(data)], _encode(data)
    version = event.version
    return b'%b%d","type":%b%b%d,"data":%b}' % (before, version, kind, between, version, body)


def decode_commit(body: bytes, position: int = 0) -> list[Event]:
    """The events of a commit, upcast to today's schemas. Raises LogCorrupt when the bytes are no commit."""
    try:
        stored = _today.decode(body)
    except NOT_TODAYS:
        return _decode_any(body, position)
    events = []
    for one in stored:
        if one.dataschema != one.current:
            return _decode_any(body, position)
        events.append(
            Event(
                one.aggregate, one.version, one.time, one.source, one.correlationid, one.causationid, one.data, position
            )
        )
    return events


def decode_page(body: bytes) -> Page[Event]:
    """A page as `dspex.log.read` gives it. Raises LogCorrupt when the bytes are none."""
    try:
        try:
            page = _today_page.decode(body)
            if all(one.dataschema == one.current for one in page.events):
                events = [
                    Event(
                        one.aggregate, one.version, one.time, one.source, one.correlationid, one.causationid, one.data,
                        one.position,
                    )
                    for one in page.events
                ]  # fmt: skip
                return Page(page.epoch, events, page.next, page.head)
        except NOT_TODAYS:
            pass
        any_page = _any_page.decode(body)
        events = [_event(one, one.position) for one in any_page.events]
        return Page(any_page.epoch, events, any_page.next, any_page.head)
    except (msgspec.MsgspecError, ValueError, KeyError, RecursionError) as error:
        raise LogCorrupt(f"what the log's reader gave is no page of events: {error}") from error


def _decode_any(body: bytes, position: int) -> list[Event]:
    """Like `decode_commit`, event by event: for types that are not known, and schemas that are not today's."""
    try:
        return [_event(stored, position) for stored in _batch.decode(body)]
    except (msgspec.MsgspecError, ValueError, KeyError, RecursionError) as error:
        raise LogCorrupt(f"position {position} holds no commit: {error}") from error


def _event(stored: _Stored, position: int) -> Event:
    return Event(
        aggregate=stored.aggregate, version=stored.version, time=stored.time, source=stored.source,
        correlation=stored.correlationid, causation=stored.causationid, position=position,
        data=_payload(stored.type, stored.dataschema, stored.data),
    )  # fmt: skip


def _payload(name: str, dataschema: str, raw: Raw) -> Payload:
    kind = PAYLOADS.get(name)
    schema = int(dataschema.rpartition(":")[2] or 0)
    if kind is None or schema > kind.schema:
        return UnknownEvent(type=name, data=raw)
    if schema == kind.schema:
        return _payload_decoders[name].decode(raw)
    data = msgspec.json.decode(raw)
    for number in range(schema, kind.schema):
        data = UPCASTERS[name, number](data)
    return msgspec.convert(data, kind)


def events_of(entry: Entry, subjects: Subjects) -> list[Event]:
    """The events of one log entry: those of its commit, or the one that a door message is.

    A door message's event has version 0, its time and position are those of storing, its correlation is its own
    position unless a header gave another. Raises LogCorrupt.
    """
    door = subjects.door_of(entry.subject)
    if door is None:
        events = decode_commit(entry.body, entry.position)
        name = subjects.aggregate_of(entry.subject)
        checked = ""
        for event in events:
            if event.aggregate != name or (event.time != checked and not _TIME.fullmatch(event.time)):
                raise LogCorrupt(f"position {entry.position} holds a commit of another aggregate than {name}")
            checked = event.time  # that of the others, nearly always
        return events
    kind, program = door
    body = _json_or_null(entry.body)
    headers = _ours(entry.headers) if entry.headers else {}
    data: Payload
    held: Held | UnsetType = UNSET
    if SEALED in headers and kind != "outcome":
        body, held = _sealed(entry.body, headers[SEALED])
    if kind == "task":
        data = TaskSubmitted(program=program, input=body, headers=headers, held=held)
    elif kind == "outcome":
        data = OutcomeReported(program=program, outcome=body)
    else:
        data = SignalSent(program=program, signal=body, held=held)
    position = str(entry.position)
    return [
        Event(
            aggregate=f"{kind}.{program}.{position}", version=0, time=rfc3339(entry.time),
            source=headers.get("Dspex-Actor", "door"), position=entry.position,
            correlation=headers.get("Dspex-Correlation", position),
            causation=headers.get("Dspex-Causation", position), data=data,
        )
    ]  # fmt: skip


def _ours(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that mean something to us, in the case we write them in: some clients change it."""
    named = ((name.lower(), value) for name, value in headers.items())
    ours = ((name, value) for name, value in named if name.startswith(("dspex-", "trace")))
    return {name.title() if name.startswith("dspex-") else name: value for name, value in ours}


class _SealedBody(Struct):
    """A door message's body that is sealed with the key that its header `Dspex-Sealed` names."""

    open: Raw
    sealed: str


def sealed_body(value: Raw, sealed: str) -> bytes:
    """The body of a door message that is sealed: what is open of it, and the rest."""
    return _encode(_SealedBody(value, sealed))


def sealed_in(body: bytes) -> str:
    """The sealed part of a door message's body, in base64; "" when the body is not of that form."""
    return _sealed(body, "")[1].sealed


def _sealed(body: bytes, key: str) -> tuple[Raw, Held]:
    """What is open of a sealed body, and the rest. One that is none, whatever its header says, shows as null and opens
    with no key."""
    try:
        found = msgspec.json.decode(body, type=_SealedBody)
        return _json_or_null(bytes(found.open)), Held(key=key, sealed=found.sealed)
    except NOT_JSON:
        return Raw(b"null"), Held(key=key)


def _json_or_null(body: bytes) -> Raw:
    try:
        msgspec.json.decode(body)  # whole: to skim it would let numbers pass that nobody can read
    except NOT_JSON:
        return Raw(b"null")
    return Raw(body)
