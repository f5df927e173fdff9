"""`variable`, `computed` and `constraint`, which declare in a class body what may be tuned.

A declaration knows neither its class nor its name, so it checks nothing; `dspex.core.declare` makes one of
the kinds (`dspex.core.kinds`, also importable from here) of it when the class is defined and refuses what
cannot work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, overload

from dspex.core.kinds import (
    Boolean,
    Choice,
    Condition,
    Float,
    Integer,
    JsonScalar,
    Module,
    Text,
    Variable,
)

__all__ = [
    "Boolean",
    "Choice",
    "ComputedDeclaration",
    "Condition",
    "ConstraintDeclaration",
    "Declaration",
    "Float",
    "Integer",
    "JsonScalar",
    "Module",
    "Text",
    "Variable",
    "computed",
    "constraint",
    "variable",
]

P = TypeVar("P")
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Declaration:
    """What `variable(...)` was called with."""

    default: object
    low: float | None = None
    high: float | None = None
    step: float | None = None
    log: bool = False
    choices: tuple[object, ...] | None = None
    ordered: bool = False
    when: Mapping[str, object] | None = None
    text: bool = False
    doc: str = ""

    def __get__(self, instance: object, owner: type | None = None) -> Declaration:
        # Instances hold their values in __dict__, which wins over this; only a half-made one comes here.
        if instance is None:
            return self
        raise AttributeError(f"{type(instance).__name__} has no values yet: call super().__init__(...) first")


@dataclass(frozen=True, eq=False)
class ComputedDeclaration:
    """What `computed(...)` was called with."""

    rule: Callable[..., object]


@dataclass(frozen=True, eq=False)
class ConstraintDeclaration:
    """What `constraint(...)` was called with."""

    rule: Callable[..., object]
    message: str


@overload
def variable(
    default: type[P],
    *,
    choices: Sequence[type[P]],
    when: Mapping[str, object] | None = None,
    doc: str = "",
) -> P: ...


@overload
def variable(
    default: T,
    *,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    log: bool = False,
    choices: Sequence[T] | None = None,
    ordered: bool = False,
    when: Mapping[str, object] | None = None,
    text: bool = False,
    doc: str = "",
) -> T: ...


def variable(
    default: object,
    *,
    low: float | None = None,
    high: float | None = None,
    step: float | None = None,
    log: bool = False,
    choices: Sequence[Any] | None = None,
    ordered: bool = False,
    when: Mapping[str, object] | None = None,
    text: bool = False,
    doc: str = "",
) -> Any:
    """Declare a tunable value; an instance has a plain value in its place.

    The default decides the kind: bool, int, float (both with `low` and `high`), str (free text), one of
    `choices` (JSON scalars, `ordered` when neighbours are alike) or one of some Program classes. `log`
    searches by ratio, `step` on a grid from `low`. `when={"style": "full"}` (or a list of values) makes it
    active only while another variable has such a value. Mistakes raise DefinitionError with the class.
    """
    listed = tuple(choices) if choices is not None else None
    return Declaration(default, low, high, step, log, listed, ordered, when, text, doc)


def computed(rule: Callable[..., T]) -> T:
    """Declare a value derived from variables (or other computed values) named by the rule's parameters.

    `a__b` names the variable at path `a.b`. The rule must be pure: equal values give an equal result.
    """
    return ComputedDeclaration(rule)  # type: ignore[return-value]  # instances have the rule's result


def constraint(rule: Callable[..., object], message: str = "") -> ConstraintDeclaration:
    """Declare a rule over variables named by its parameters; `message` says what must hold.

    It counts only while all of them are active. Assign it to any attribute of the class.
    """
    return ConstraintDeclaration(rule, message)
