"""Values that are not stored in the open: which ones, how they are sealed, and what stands in an event in their place.

Pure: bytes in, bytes out. A value is sealed with AES-256-GCM. The nonce is made of the key and the text (as a synthetic
initialization vector, RFC 5297 section 1.3, is), so that the same value sealed again gives the same bytes: an append
that is tried again stays the same append, and an archive can be compared with its log. It tells only whether two values
of one task at one place are equal.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from dspex.core.errors import LogCorrupt
from dspex.core.events import (
    EffectRecorded,
    Held,
    InputSealed,
    Payload,
    SignalReceived,
    SignalSent,
    TaskCompleted,
    TaskFailed,
    TaskRetried,
    TaskSubmitted,
)

__all__ = [
    "INLINE", "KEY", "PRIVATE", "Guard", "guard_of", "hidden", "open_part", "opened", "place_of",
    "seal", "secret_pattern", "text_of", "unseal", "value_of", "with_value",
]  # fmt: skip

PRIVATE = "x-dspex-private"
"""The mark of a private field in its JSON Schema."""
_SECRET_PATTERN = re.compile(r"\^\(env\|file(\|[a-z0-9_]+)*\):\.\+\$")
INLINE = 256 << 10
"""Bytes of a value that an event holds itself; more go to the object store."""
KEY = 32
_NONCE = 12
_NULL = Raw(b"null")
_HIDDEN = "its words are sealed, for the program is private"


@dataclass(frozen=True)
class Guard:
    """Which fields of a program are private, and whether its Input has a Secret: then no body of it that came in the
    open may be kept in the open."""

    input: frozenset[str] = frozenset()
    output: frozenset[str] = frozenset()
    secret: bool = False

    @property
    def private(self) -> bool:
        """Whether what the program records is sealed: all of it, for it may hold what its private fields held."""
        return bool(self.input or self.output)

    @property
    def guarded(self) -> bool:
        """Whether a body at a stored door must not be kept as it came."""
        return self.private or self.secret


def guard_of(input_schema: Mapping[str, Any], output_schema: Mapping[str, Any]) -> Guard:
    """What a program's JSON Schemas mark as private. A field counts as a whole when anything in it is marked."""
    return Guard(
        _fields(input_schema, _is_private), _fields(output_schema, _is_private),
        bool(_fields(input_schema, _is_secret)),
    )  # fmt: skip


def _is_private(schema: Mapping[str, Any]) -> bool:
    return schema.get(PRIVATE) is True


def _is_secret(schema: Mapping[str, Any]) -> bool:
    return _SECRET_PATTERN.fullmatch(str(schema.get("pattern", ""))) is not None


def secret_pattern(schemes: Iterable[str]) -> str:
    """The pattern of a Secret in its JSON Schema: a reference, never the value."""
    return f"^({'|'.join(sorted(schemes, key=lambda name: (name not in ('env', 'file'), name)))}):.+$"


def _fields(schema: Mapping[str, Any], marked: Any) -> frozenset[str]:
    properties: Mapping[str, Any] = schema.get("properties") or {}
    if "$ref" in schema and not properties:  # a recursive model stands among its own definitions
        name = str(schema["$ref"]).rpartition("/")[2]
        properties = schema.get("$defs", {}).get(name, {}).get("properties") or {}
    definitions = schema.get("$defs") or {}
    return frozenset(name for name, part in properties.items() if _holds(part, definitions, marked, set()))


def _holds(part: object, definitions: Mapping[str, Any], marked: Any, seen: set[str]) -> bool:
    if isinstance(part, list):
        return any(_holds(each, definitions, marked, seen) for each in part)
    if not isinstance(part, Mapping):
        return False
    if marked(part):
        return True
    name = str(part.get("$ref", "")).rpartition("/")[2]
    if name and name not in seen:
        seen.add(name)
        if _holds(definitions.get(name), definitions, marked, seen):
            return True
    return any(_holds(each, definitions, marked, seen) for each in part.values())


# -- bytes


def _cipher(key: bytes) -> Any:
    # Here and not above: most processes never seal anything.
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    return AESGCM(key)


def seal(key: bytes, text: bytes, about: str) -> bytes:
    """Nonce and ciphertext of `text`, bound to what it is `about`. The key has 32 bytes."""
    bound = about.encode()
    nonce = hmac.digest(key, b"nonce\0" + len(bound).to_bytes(4, "big") + bound + text, hashlib.sha256)[:_NONCE]
    sealed: bytes = _cipher(key).encrypt(nonce, text, bound)
    return nonce + sealed


def unseal(key: bytes, sealed: bytes, about: str) -> bytes:
    """What was sealed. Raises LogCorrupt when it was not sealed with this key, or is about something else."""
    from cryptography.exceptions import InvalidTag

    try:
        text: bytes = _cipher(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], about.encode())
        return text
    except (InvalidTag, ValueError):
        raise LogCorrupt(f"a sealed value of {about.partition('/')[0]} does not open with its key") from None


def text_of(sealed: str) -> bytes:
    """The bytes in the `sealed` of a Held. Raises LogCorrupt."""
    try:
        return base64.b64decode(sealed, validate=True)
    except (binascii.Error, ValueError):
        raise LogCorrupt("a sealed value is no base64") from None


def place_of(program: str, payload: Payload) -> str:
    """What a payload's sealed value is about, so that it opens nowhere else. A task's id is no part of it: a sealed
    submission is made before it has one, and an effect's record stands for the same effect in a fork."""
    match payload:
        case TaskSubmitted() | InputSealed():
            return f"{program}/input"
        case SignalSent():
            return f"{program}/signal"
        case EffectRecorded(key=key):
            return f"{program}/effect/{key}"
    return f"{program}/{type(payload).__name__}"


# -- what an event shows of a value that is sealed, and back


def open_part(body: bytes, fields: frozenset[str]) -> Raw:
    """An object without its private fields; null when it is none."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _NULL
    if not isinstance(value, dict):
        return _NULL
    part = Raw(msgspec.json.encode({name: each for name, each in value.items() if name not in fields}))
    return part if len(bytes(part)) <= INLINE else _NULL


def value_of(payload: Payload) -> Raw | None:
    """The value of a payload that may be large."""
    match payload:
        case TaskCompleted(output=value) | EffectRecorded(result=value) | SignalReceived(value=value):
            return value
    return None


def with_value(payload: Payload, value: Raw, held: Held | None = None) -> Payload:
    """The payload with this value in its place."""
    name = "output" if isinstance(payload, TaskCompleted) else "value"
    name = "result" if isinstance(payload, EffectRecorded) else name
    fields: dict[str, Any] = {name: value, "held": UNSET if held is None else held}
    return msgspec.structs.replace(payload, **fields)


def hidden(payload: Payload, guard: Guard) -> tuple[Payload, bytes] | None:
    """The payload without what is private in it, and the text to be sealed; None when it holds nothing private."""
    found: Payload
    match payload:
        case EffectRecorded():  # a digest of few possible requests would tell which one it was
            found = msgspec.structs.replace(payload, digest="", request=_NULL, result=_NULL, arguments=[])
        case TaskCompleted(output=output):
            found = msgspec.structs.replace(payload, output=open_part(bytes(output), guard.output))
        case TaskFailed():
            found = msgspec.structs.replace(payload, message=_HIDDEN, detail="")
        case TaskRetried():
            found = msgspec.structs.replace(payload, message=_HIDDEN)
        case SignalReceived():
            found = msgspec.structs.replace(payload, value=_NULL)
        case _:
            return None
    return found, msgspec.json.encode(payload)


def opened(payload: Payload, text: bytes) -> Payload:
    """The payload as it was, from the text that was sealed. Raises LogCorrupt."""
    match payload:
        case TaskSubmitted():
            return msgspec.structs.replace(payload, input=Raw(text), held=UNSET)
        case InputSealed():
            return msgspec.structs.replace(payload, input=Raw(text), held=Held())
        case SignalSent():
            return msgspec.structs.replace(payload, signal=Raw(text), held=UNSET)
    try:
        return msgspec.json.decode(text, type=type(payload))
    except msgspec.MsgspecError as error:
        raise LogCorrupt(f"a sealed {type(payload).__name__} holds something else: {error}") from None
