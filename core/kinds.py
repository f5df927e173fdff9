"""The kinds of tunable values: frozen records that validate a value and describe themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import ClassVar

import msgspec

JsonScalar = bool | int | float | str | None


class Condition(msgspec.Struct, frozen=True):
    """The variable at `path` is active and has one of `values`."""

    path: str
    values: tuple[JsonScalar, ...]

    def holds(self, values: Mapping[str, JsonScalar]) -> bool:
        """Whether it does, where `values` has the active variables only."""
        return self.path in values and any(same(values[self.path], value) for value in self.values)

    def to_json(self) -> dict[str, object]:
        """As plain JSON."""
        return {"path": self.path, "values": list(self.values)}

    def __str__(self) -> str:
        return f"{self.path} = {' or '.join(repr(value) for value in self.values)}"


class Variable(msgspec.Struct, frozen=True, kw_only=True):
    """What all kinds share: a default, the conditions that must all hold for it to be active, and words."""

    kind: ClassVar[str] = ""

    default: JsonScalar
    when: tuple[Condition, ...] = ()
    doc: str = ""

    def validate(self, value: object) -> JsonScalar:
        """The value in its normal form; raises ValueError with a plain phrase."""
        raise NotImplementedError

    def to_json(self) -> dict[str, object]:
        """As plain JSON, with `kind` saying which of the kinds it is."""
        return {
            "kind": self.kind,
            "default": self.default,
            **self._limits(),
            "when": [condition.to_json() for condition in self.when],
            "doc": self.doc,
        }

    def _limits(self) -> dict[str, object]:
        return {}


class Boolean(Variable, frozen=True, kw_only=True):
    """True or false."""

    kind: ClassVar[str] = "boolean"

    default: bool

    def validate(self, value: object) -> bool:
        """Raises ValueError for anything but a bool."""
        value = as_python(value)
        if not isinstance(value, bool):
            raise ValueError("true or false is due")
        return value


class Integer(Variable, frozen=True, kw_only=True):
    """A whole number from `low` to `high` inclusive, in steps from `low`; `log` says to search by ratio."""

    kind: ClassVar[str] = "integer"

    default: int
    low: int
    high: int
    step: int = 1
    log: bool = False

    def validate(self, value: object) -> int:
        """An int; a float without a fraction counts as one."""
        value = as_python(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("an integer is due")
        number = int(value)
        if not self.low <= number <= self.high:
            raise ValueError(f"it must be from {self.low} to {self.high}")
        if (number - self.low) % self.step:
            raise ValueError(f"it must be {self.low} plus a multiple of {self.step}")
        return number

    def _limits(self) -> dict[str, object]:
        return {"low": self.low, "high": self.high, "step": self.step, "log": self.log}


class Float(Variable, frozen=True, kw_only=True):
    """A finite number from `low` to `high` inclusive: linear, in steps from `low`, or by ratio (`log`)."""

    kind: ClassVar[str] = "float"

    default: float
    low: float
    high: float
    step: float | None = None
    log: bool = False

    def validate(self, value: object) -> float:
        """A float; with a step it is put exactly on the grid, so that equal values have equal hashes."""
        value = as_python(value)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not finite(value):
            raise ValueError("a finite number is due")
        number = float(value) + 0.0  # minus zero becomes zero: they are equal and must hash alike
        if self.step is not None:
            number = self._on_grid(number)
        if not self.low <= number <= self.high:
            raise ValueError(f"it must be from {self.low:g} to {self.high:g}")
        return number

    def _on_grid(self, number: float) -> float:
        assert self.step is not None
        steps = (number - self.low) / self.step
        if abs(steps - round(steps)) > 1e-9 * max(1.0, abs(steps)):
            raise ValueError(f"it must be {self.low:g} plus a multiple of {self.step:g}")
        # In decimals, because 0.1 + 2 * 0.1 is not the float that people write as 0.3.
        return float(Decimal(repr(self.low)) + round(steps) * Decimal(repr(self.step)))

    def _limits(self) -> dict[str, object]:
        return {"low": self.low, "high": self.high, "step": self.step, "log": self.log}


class Choice(Variable, frozen=True, kw_only=True):
    """One of some JSON scalars; `ordered` says that neighbours in the list are alike."""

    kind: ClassVar[str] = "choice"

    choices: tuple[JsonScalar, ...]
    ordered: bool = False

    def validate(self, value: object) -> JsonScalar:
        """The choice equal to the value, as it was declared."""
        value = as_python(value)
        for choice in self.choices:
            if same(choice, value):
                return choice
        raise ValueError(f"it must be one of {', '.join(repr(choice) for choice in self.choices)}")

    def _limits(self) -> dict[str, object]:
        return {"choices": list(self.choices), "ordered": self.ordered}


class Module(Variable, frozen=True, kw_only=True):
    """The choice of a program: the value is the chosen program's name, its own variables become active."""

    kind: ClassVar[str] = "module"

    default: str
    choices: tuple[str, ...]
    programs: tuple[type, ...]

    def validate(self, value: object) -> str:
        """The program's name, from the name or the class."""
        if isinstance(value, type):
            for name, program in zip(self.choices, self.programs, strict=True):
                if program is value:
                    return name
        text = as_python(value)
        if not isinstance(text, str) or text not in self.choices:
            raise ValueError(f"it must be one of {', '.join(self.choices)}")
        return text

    def program(self, name: str) -> type:
        """The class that has this name."""
        return self.programs[self.choices.index(name)]

    def _limits(self) -> dict[str, object]:
        return {"choices": list(self.choices)}


class Text(Variable, frozen=True, kw_only=True):
    """Free text, such as instructions to a model."""

    kind: ClassVar[str] = "text"

    default: str

    def validate(self, value: object) -> str:
        """A str that can travel as UTF-8."""
        value = as_python(value)
        if not isinstance(value, str):
            raise ValueError("a string is due")
        if not encodable(value):
            raise ValueError("the text has a lone surrogate and is not valid Unicode")
        return value


def same(one: object, other: object) -> bool:
    """Equality of JSON scalars: 1 is 1.0, but true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def finite(number: float) -> bool:
    """Whether a number is a finite double; an int can be too large for one."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


def as_python(value: object) -> object:
    """A scalar of numpy or torch (whatever has `item`) as a Python one; raises ValueError for many."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    item = getattr(value, "item", None)
    if not callable(item):
        return value
    try:
        found: object = item()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError("a single value is due, several came") from None
    return found


def encodable(text: str) -> bool:
    """Whether a text can travel as UTF-8; a lone surrogate cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
