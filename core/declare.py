"""From a declaration to a variable: what a single `variable(...)` must pass when its class is defined."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal
from difflib import get_close_matches
from typing import NoReturn

from dspex.core.errors import DefinitionError
from dspex.core.kinds import (
    Boolean,
    Choice,
    Float,
    Integer,
    JsonScalar,
    Module,
    Text,
    Variable,
    as_python,
    encodable,
    finite,
    same,
)
from dspex.core.variables import Declaration


def shown_name(cls: type) -> str:
    """A class as people write it: `QABot.Input`, without the function it was defined in."""
    return cls.__qualname__.rpartition("<locals>.")[2]


def did_you_mean(name: str, known: Iterator[str] | list[str]) -> str:
    """Words that help somebody who misspelt a name; known names when none is near."""
    names = sorted(known)
    if near := get_close_matches(name, names, n=1, cutoff=0.5):
        return f"did you mean {near[0]}?"
    listed = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
    return f"there is {listed}" if names else "there is none"


def is_program(value: object) -> bool:
    """Whether a value is a Program class. By its mark, because Program itself is built on this module."""
    return isinstance(value, type) and hasattr(value, "__definition__")


class _Field:
    """The place a declaration stands in, which every refusal names."""

    def __init__(self, owner: str, name: str) -> None:
        self.owner, self.name = owner, name

    def refuse(self, value: object, problem: str, remedy: str) -> NoReturn:
        raise self.error(value, problem, remedy)

    def error(self, value: object, problem: str, remedy: str) -> DefinitionError:
        return DefinitionError(self.owner, self.name, value, problem, remedy)


def build(owner: str, name: str, declared: Declaration) -> Variable:
    """The variable that a declaration means, without its conditions; raises DefinitionError."""
    field = _Field(owner, name)
    default = declared.default
    if isinstance(default, Declaration):
        field.refuse(name, "the default is itself a variable", "give it a plain default")
    if declared.choices is not None:
        _no_bounds(field, declared, "choices")
        if declared.text:
            field.refuse(default, "free text has no choices", "drop text=True or the choices")
        if is_program(default) or any(map(is_program, declared.choices)):
            return _module(field, declared)
        return _choice(field, declared)
    if declared.ordered:
        field.refuse(default, "ordered is for choices", "add choices=[...] or drop ordered")
    if is_program(default):
        field.refuse(
            default, "a program as the default needs choices", "add choices=[...] of Program classes"
        )
    default = _scalar(field, default, "the default")
    if isinstance(default, str):
        return _text(field, declared, default)
    if declared.text:
        field.refuse(default, "text=True needs a default that is a string", "write the default in quotes")
    if isinstance(default, bool):
        _no_bounds(field, declared, "a boolean")
        return Boolean(default=default, doc=declared.doc)
    if isinstance(default, int):
        return _integer(field, declared, default)
    if isinstance(default, float):
        return _float(field, declared, default)
    problem, remedy = "no kind of variable has this default", "use a bool, int, float or str, or add choices"
    raise field.error(default, problem, remedy)


def _text(field: _Field, declared: Declaration, default: str) -> Text:
    _no_bounds(field, declared, "text")
    variable = Text(default=default, doc=declared.doc)
    _check_default(field, variable, default)
    return variable


def _choice(field: _Field, declared: Declaration) -> Choice:
    choices = tuple(_scalar(field, choice, "a choice") for choice in declared.choices or ())
    _check_choices(field, choices)
    default = _scalar(field, declared.default, "the default")
    variable = Choice(default=default, choices=choices, ordered=declared.ordered, doc=declared.doc)
    normal = _check_default(field, variable, default, "add it to the choices or choose another default")
    return Choice(default=normal, choices=choices, ordered=declared.ordered, doc=declared.doc)


def _module(field: _Field, declared: Declaration) -> Module:
    if declared.ordered:
        field.refuse(True, "programs have no order", "drop ordered")
    programs: list[type] = []
    for choice in declared.choices or ():
        if not isinstance(choice, type) or not is_program(choice):
            field.refuse(
                choice,
                "this choice is not a Program class",
                "give Program classes only, without calling them",
            )
        if getattr(choice, "__definition__", None) is None:
            field.refuse(
                choice, "this choice is abstract", "give it Input, Output and predict, or choose a subclass"
            )
        programs.append(choice)
    names = tuple(str(getattr(program, "name", "")) for program in programs)
    for name in names:
        if names.count(name) > 1 and len(set(programs)) == len(programs):
            field.refuse(
                name, "two choices have the same program name", 'give one of them another name = "…"'
            )
    _check_choices(field, names)
    if declared.default not in programs:
        shown = declared.default
        field.refuse(
            shown, "the default is not among the choices", "add it to the choices or choose another default"
        )
    default = names[programs.index(declared.default)]
    return Module(default=default, choices=names, programs=tuple(programs), doc=declared.doc)


def _integer(field: _Field, declared: Declaration, default: int) -> Integer:
    low, high = _bounds(field, declared)
    step = 1 if declared.step is None else as_python(declared.step)
    for word, number in (("low", low), ("high", high), ("step", step)):
        if not isinstance(number, int):
            remedy = f"write whole numbers, or the default as {float(default)}"
            field.refuse(number, f"the default {default} is an integer, {word} is not", remedy)
    assert isinstance(low, int) and isinstance(high, int) and isinstance(step, int)
    _check_range(field, low, high, declared.log)
    _check_step(field, low, high, None if declared.step is None else step, declared.log)
    variable = Integer(default=default, low=low, high=high, step=step, log=declared.log, doc=declared.doc)
    _check_default(field, variable, default, "move the default or the bounds")
    return variable


def _float(field: _Field, declared: Declaration, default: float) -> Float:
    if not finite(default):
        field.refuse(default, "the default is not finite", "choose a finite number")
    low, high = map(float, _bounds(field, declared))
    step = None if declared.step is None else float(declared.step)
    _check_range(field, low, high, declared.log)
    _check_step(field, low, high, step, declared.log)
    variable = Float(default=default, low=low, high=high, step=step, log=declared.log, doc=declared.doc)
    normal = _check_default(field, variable, default, "move the default or the bounds")
    assert isinstance(normal, float)
    return Float(default=normal, low=low, high=high, step=step, log=declared.log, doc=declared.doc)


def _bounds(field: _Field, declared: Declaration) -> tuple[float, float]:
    found = []
    for word, bound in (("low", declared.low), ("high", declared.high)):
        if bound is None:
            remedy = f"write low=… and high=…, for example variable({declared.default!r}, low=…, high=…)"
            field.refuse(declared.default, f"a number needs bounds, {word} is missing", remedy)
        number = as_python(bound)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not finite(number):
            field.refuse(bound, f"{word} is not a finite number", f"give a number for {word}")
        found.append(number)
    return found[0], found[1]


def _check_range(field: _Field, low: float, high: float, log: bool) -> None:
    if low > high:
        field.refuse(low, f"low is above high, which is {high}", "swap low and high")
    if log and low <= 0:
        field.refuse(low, "a log scale needs low above 0", "raise low or drop log=True")


def _check_step(field: _Field, low: float, high: float, step: float | None, log: bool) -> None:
    if step is None:
        return
    if log:
        field.refuse(step, "a log scale has no step", "drop step or log=True")
    if not finite(step) or step <= 0:
        field.refuse(step, "a step is a number above 0", "give a positive step")
    span = Decimal(repr(high)) - Decimal(repr(low))
    if span % Decimal(repr(step)):
        fitting = Decimal(repr(low)) + (span // Decimal(repr(step))) * Decimal(repr(step))
        field.refuse(
            step, f"from {low} to {high} is not a whole number of steps", f"change step, or high to {fitting}"
        )


def _check_choices(field: _Field, choices: tuple[JsonScalar, ...]) -> None:
    if not choices:
        field.refuse([], "the list of choices is empty", "give at least one choice")
    for index, choice in enumerate(choices):
        if any(same(choice, other) for other in choices[:index]):
            field.refuse(choice, "this choice stands twice in the choices", "remove one of them")


def _check_default(
    field: _Field, variable: Variable, default: object, remedy: str = "choose another default"
) -> JsonScalar:
    try:
        return variable.validate(default)
    except ValueError as error:
        field.refuse(default, f"the default does not fit: {error}", remedy)


def _scalar(field: _Field, value: object, what: str) -> JsonScalar:
    remedy = "use null, true or false, a finite number or a string"
    try:
        plain = as_python(value)
    except ValueError:
        field.refuse(value, f"{what} is not a JSON scalar", remedy)
    # Exact types: an enum member is an int or a str too, but would come back from JSON as another value.
    if plain is None or type(plain) in (bool, int):
        return plain  # type: ignore[return-value]  # by its exact type
    if isinstance(plain, float) and type(plain) is float and finite(plain):
        return plain
    if isinstance(plain, str) and type(plain) is str and encodable(plain):
        return plain
    raise field.error(value, f"{what} is not a JSON scalar", remedy)


def _no_bounds(field: _Field, declared: Declaration, what: str) -> None:
    for word, value in (("low", declared.low), ("high", declared.high), ("step", declared.step)):
        if value is not None:
            field.refuse(value, f"{word} is for numbers, not for {what}", f"drop {word}")
    if declared.log:
        field.refuse(True, f"log is for numbers, not for {what}", "drop log")
