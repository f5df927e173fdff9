"""One plain sentence for what pydantic found wrong: which field, what is due, what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, PydanticUserError, ValidationError

from dspex.core.sealing import guard_of

MAX_FIELDS = 3
MAX_ECHO = 80

_DUE: dict[str, str] = {
    "string_type": "a string",
    "string_sub_type": "a string",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "none_required": "null",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "dataclass_type": "an object",
}
_BOUNDS: dict[str, tuple[str, str]] = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("more than", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("less than", "lt"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
_LENGTHS: dict[str, tuple[str, str, str]] = {
    "string_too_short": ("at least", "min_length", "characters"),
    "string_too_long": ("at most", "max_length", "characters"),
    "too_short": ("at least", "min_length", "items"),
    "too_long": ("at most", "max_length", "items"),
}
_TYPES: dict[object, str] = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}

Came = Callable[[object], str]


def explain(error: ValidationError, model: type[BaseModel], *, texts: bool = True) -> str:
    """What is wrong in at most three fields, e.g. `question: a string is due, 5 came`.

    At most 80 characters of a value are shown, of a secret none, and with `texts=False` no text either.
    """
    problems = error.errors(include_url=False)
    private = _private(model)
    # A union reports one problem per branch, so a refused secret may also stand in a neighbour's problem.
    hidden = [problem["input"] for problem in problems if problem["type"] == "secret"]

    def came(value: object) -> str:
        # By equality, because every problem carries a copy of its own.
        return "a hidden value" if any(value == secret for secret in hidden) else shown(value, texts=texts)

    sentences = [_sentence(dict(problem), model, came, private) for problem in problems[:MAX_FIELDS]]
    if len(problems) > MAX_FIELDS:
        sentences.append(f"and {len(problems) - MAX_FIELDS} more")
    return "; ".join(sentences)


def shown(value: object, *, texts: bool = True) -> str:
    """A value in at most 80 characters: numbers and short texts as they are, the rest by kind and size."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity"
    if isinstance(value, (str, bytes)) and not texts:
        return f"a text of {len(value)} characters"
    if isinstance(value, Mapping):
        return f"an object with {len(value)} fields"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    if isinstance(value, (str, bytes, int, float)):
        # Slicing first keeps the cost small; an int is bounded in bits, for its text can be very long.
        if isinstance(value, int) and value.bit_length() > 256:
            return "a very large integer"
        return cut(repr(value[: MAX_ECHO + 1]) if isinstance(value, (str, bytes)) else repr(value))
    kind = type(value).__name__
    return cut(f"{'an' if kind[:1].lower() in 'aeiou' else 'a'} {kind}")


def cut(text: str, limit: int = MAX_ECHO) -> str:
    """A text of at most `limit` characters, with an ellipsis where it was cut."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _private(model: type[BaseModel]) -> frozenset[str]:
    """The private fields of a model. One that has no JSON Schema (yet) has none that anybody could store."""
    try:
        return guard_of(model.model_json_schema(), {}).input
    except (PydanticUserError, AttributeError, KeyError):
        return frozenset()


def _sentence(problem: dict[str, Any], model: type[BaseModel], came: Came, private: frozenset[str]) -> str:
    location: Sequence[str | int] = problem["loc"]
    if private and not location and problem["type"] != "model_type":
        return "the fields do not fit together; some are private, so no more is said"
    if location and location[0] in private and problem["type"] != "missing":
        # Nothing of the value, and no keys inside of it either. What is due is the type's own.
        due = _DUE.get(problem["type"]) if len(location) == 1 else None
        return f"{location[0]}: {due or 'another value'} is due; what came is private and not shown"
    # A branch of a union that is a function has a name like `function-plain[check()]`, which says nothing.
    place = cut(".".join(str(part) for part in location if "(" not in str(part)))
    phrase = _phrase(problem, model, came)
    return f"{place}: {phrase}" if place else phrase


def _phrase(problem: dict[str, Any], model: type[BaseModel], came: Came) -> str:
    kind, context, value = problem["type"], problem.get("ctx") or {}, problem["input"]
    if kind == "missing":
        return f"{_due_by(problem['loc'], model)} is due, nothing came"
    if kind == "extra_forbidden":
        return _unknown(problem["loc"], model)
    if kind in _DUE:
        return f"{_DUE[kind]} is due, {came(value)} came"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{words} {context[key]}, {came(value)} came"
    if kind in _LENGTHS:
        words, key, unit = _LENGTHS[kind]
        # pydantic knows the actual length of a collection only when it is not still reading it
        length = context.get("actual_length") or (len(value) if hasattr(value, "__len__") else "more")
        return f"{words} {context[key]} {unit}, {length} came"
    if kind in ("literal_error", "enum"):
        return f"one of {context['expected']} is due, {came(value)} came"
    if kind == "string_pattern_mismatch":
        return f"a string matching {cut(str(context['pattern']))} is due, {came(value)} came"
    if kind in ("value_error", "assertion_error"):
        return cut(str(context.get("error") or "not accepted"), 2 * MAX_ECHO)
    return cut(_plain_words(problem["msg"]), 2 * MAX_ECHO)


def _plain_words(message: str) -> str:
    return message.replace("Input should be", "should be", 1)


def _due_by(location: Sequence[str | int], model: type[BaseModel]) -> str:
    field = model.model_fields.get(str(location[0])) if len(location) == 1 else None
    return _TYPES.get(field.annotation, "a value") if field else "a value"


def _unknown(location: Sequence[str | int], model: type[BaseModel]) -> str:
    if len(location) > 1:
        return "no such field"
    names = list(model.model_fields)
    known = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"no such field, there is {known}" if names else "no such field, there is none"
