"""What an effect is asked: its hash, which tells two requests apart, and its arguments, for whoever reads the log."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from pydantic_core import to_json

from dspex.core.errors import DefinitionError
from dspex.core.events import EffectRecorded

__all__ = ["MAX_REQUEST", "as_code", "places_of", "request_of", "shown_request"]

MAX_REQUEST = 16 << 10
"""Bytes of a request that are recorded; of a larger one only the hash is."""
HIDDEN = "…"
"""What is recorded in place of an argument that is not."""


def request_of(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Sequence[tuple[int, str]] = ()
) -> tuple[str, bytes]:
    """What is asked, whatever the place: its hash, 16 hex digits, and the arguments in JSON, without the `hidden` ones
    (their places and names); null when they are large or have no such form."""
    try:
        body = to_json([args, dict(sorted(kwargs.items())) if kwargs else kwargs], fallback=_opaque)
    except Exception:
        return hashlib.sha256(name.encode()).hexdigest()[:16], b"null"
    digest = hashlib.sha256(_quoted(name) + body[1:]).hexdigest()[:16]
    if hidden:
        given, named = msgspec.json.decode(body)
        for place, parameter in hidden:
            given[place : place + 1] = [HIDDEN] * len(given[place : place + 1])
            named |= {parameter: HIDDEN} if parameter in named else {}
        body = msgspec.json.encode([given, named])
    return digest, body if len(body) <= MAX_REQUEST else b"null"


@functools.lru_cache(maxsize=256)
def _quoted(name: str) -> bytes:
    """The beginning of what is hashed: a list that begins with the effect's name."""
    return b"[%b," % to_json(name)


def places_of(function: Callable[..., Any], names: Sequence[str]) -> list[tuple[int, str]]:
    """Where a function's parameters of these names stand. Raises DefinitionError for one that it has not."""
    parameters = list(inspect.signature(function).parameters) if names else []
    for name in names:
        if name not in parameters:
            have = f"hide one of {', '.join(parameters)}" if parameters else "it takes nothing that could be hidden"
            raise DefinitionError(function.__qualname__, "hidden", name, "is no parameter of the effect", have)
    return [(parameters.index(name), name) for name in names]


def shown_request(record: EffectRecorded) -> str:
    """A recorded request as code would write it, in a line; with its hash when the arguments are not recorded."""
    asked = msgspec.json.decode(record.request)
    if asked is None:
        return record.name if record.digest in ("", record.name) else f"{record.name} {record.digest}"
    return as_code(record.name, *asked)


def as_code(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """A call as code would write it, in a line."""
    words = [_short(value) for value in args] + [f"{key}={_short(value)}" for key, value in kwargs.items()]
    return f"{name}({', '.join(words)})"


def _short(value: object) -> str:
    """A value's own words, of bounded length, whatever its `__repr__` does."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 60 else f"{text[:59]}…"


def _opaque(value: object) -> str:
    """What stands in the hash for an object without a form in JSON: only its type, for its address changes."""
    return f"<{type(value).__module__}.{type(value).__qualname__}>"
