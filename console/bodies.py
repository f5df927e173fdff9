"""What a person types as a body: fields, JSON, a file, or the input; and a body made up from a JSON Schema."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import click

__all__ = ["BODY_HELP", "body_of", "example_of", "is_id", "lines_of", "loosely", "request_headers"]

BODY_HELP = """\b
The body is one of
  fields       question="What is a log?" passages=3 code='"42"'
               (a value that is JSON counts as it: "42" in quotes is text)
  JSON         '{"question": "What is a log?"}'
  a file       @question.json
  the input    -
"""

_FIELD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)


def body_of(arguments: tuple[str, ...]) -> bytes:
    """The body that the arguments stand for. What comes from a file or the input is sent as it is: the door judges."""
    if not arguments:
        return b"{}"
    if len(arguments) == 1:
        (text,) = arguments
        if text == "-":
            return sys.stdin.buffer.read()
        if text.startswith("@"):
            return _read(text[1:])
        if loosely(text) is not text:
            return text.encode()
    fields: dict[str, Any] = {}
    for text in arguments:
        match = _FIELD.fullmatch(text)
        if match is None:
            raise click.UsageError(
                f'{text!r} is neither JSON nor a field; write question="…", or \'{{"question": "…"}}\''
            )
        if match[1] in fields:
            raise click.UsageError(f"the field {match[1]} was given twice")
        fields[match[1]] = loosely(match[2])
    return json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogateescape")


def loosely(text: str) -> Any:
    """`text` as JSON, or itself when it is none."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return text


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def request_headers(key: str | None, deadline: str | None) -> dict[str, str]:
    from dspex.core import headers as h
    from dspex.core.errors import InvalidInput

    named = {h.KEY: key, h.DEADLINE: deadline}
    headers = {name: value for name, value in named.items() if value is not None}
    try:
        h.key_of(headers)
        h.deadline_of(headers, 0.0)
    except InvalidInput as error:
        raise click.UsageError(f"`--key` or `--deadline` cannot be used: {error}") from None
    return headers


def _read(name: str) -> bytes:
    try:
        return sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise click.UsageError(f"{name} cannot be read: {error.strerror}") from None


def lines_of(file: str) -> list[bytes]:
    """The tasks in a file. All of them are looked at before one is sent."""
    bodies = []
    for number, line in enumerate(_read(file).splitlines(), 1):
        if not line.strip():
            continue
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            raise click.UsageError(f"{file}:{number} is not JSON; nothing was submitted") from None
        bodies.append(line)
    if not bodies:
        raise click.UsageError(f"{file} holds no task; a line of JSON each is due")
    return bodies


def is_id(task: str) -> bool:
    return task.isascii() and task.isdecimal()


def example_of(schema: dict[str, Any]) -> dict[str, Any]:
    """The smallest body that a program's input schema admits, as far as a schema tells: its required fields."""
    value = _example(schema, schema.get("$defs", {}), "")
    return value if isinstance(value, dict) else {}


_FORMATS = {
    "date-time": "2026-11-23T10:00:00Z",
    "date": "2026-11-23",
    "time": "10:00:00Z",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "email": "ada@example.org",
    "uri": "https://example.org",
}
_WORDS = {"question": "What is a commit?", "text": "Hello", "message": "Hello", "query": "event log", "name": "Ada"}


def _example(schema: dict[str, Any], definitions: dict[str, Any], name: str) -> Any:
    for known in ("examples", "enum"):
        if schema.get(known):
            return schema[known][0]
    for known in ("const", "default"):
        if known in schema:
            return schema[known]
    if "$ref" in schema:
        return _example(definitions.get(schema["$ref"].rpartition("/")[2], {}), definitions, name)
    for several in ("anyOf", "oneOf", "allOf"):
        if schema.get(several):
            return _example(schema[several][0], definitions, name)
    match schema.get("type"):
        case "object":
            fields = schema.get("properties", {})
            return {field: _example(fields.get(field, {}), definitions, field) for field in schema.get("required", [])}
        case "array":
            item = schema.get("items") or {}
            first = [_example(part, definitions, name) for part in schema.get("prefixItems", [])]
            return first + [_example(item, definitions, name)] * max(schema.get("minItems", 0) - len(first), 0)
        case "string":
            text = _FORMATS.get(schema.get("format", "")) or _WORDS.get(name, "…")
            return text.ljust(schema.get("minLength", 0), "…")[: schema.get("maxLength")]
        case "integer" | "number":
            return _number(schema)
        case "boolean":
            return True
        case _:
            return None


def _number(schema: dict[str, Any]) -> float:
    whole = schema["type"] == "integer"
    if "minimum" in schema:
        value = schema["minimum"]
    elif "exclusiveMinimum" in schema:
        above = schema["exclusiveMinimum"]
        value = above + 1 if whole else (above + schema.get("maximum", schema.get("exclusiveMaximum", above + 2))) / 2
    else:
        value = min(1, schema.get("maximum", 1))
    return int(value) if whole or value == int(value) else value
