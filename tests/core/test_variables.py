"""What each kind of variable takes, and the normal form it gives."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspex.core.declare import build
from dspex.core.errors import DefinitionError
from dspex.core.variables import Boolean, Choice, Declaration, Float, Integer, Text, Variable, variable


def kind(declared: object) -> Variable:
    assert isinstance(declared, Declaration)
    return build("Program", "field", declared)


def test_the_default_decides_the_kind() -> None:
    assert kind(variable(True)) == Boolean(default=True)
    assert kind(variable(4, low=1, high=20)) == Integer(default=4, low=1, high=20)
    assert kind(variable(0.5, low=0, high=1)) == Float(default=0.5, low=0.0, high=1.0)
    assert kind(variable("a")) == Text(default="a")
    assert kind(variable("a", choices=["a", "b"])) == Choice(default="a", choices=("a", "b"))
    assert kind(variable(8, choices=[8, 16], ordered=True)) == Choice(
        default=8, choices=(8, 16), ordered=True
    )


@pytest.mark.parametrize(
    ("declared", "given_value", "normal"),
    [
        (variable(True), np.bool_(False), False),
        (variable(4, low=1, high=20), 5.0, 5),
        (variable(4, low=1, high=20), np.int64(5), 5),
        (variable(0.5, low=0, high=1), 1, 1.0),
        (variable(0.5, low=0, high=1), np.float32(0.25), 0.25),
        (variable(0.5, low=-1, high=1), -0.0, 0.0),
        (variable(0.1, low=0.1, high=0.9, step=0.1), 0.1 + 0.1 + 0.1, 0.3),
        (variable("a", choices=["a", "b"]), np.str_("b"), "b"),
        (variable(1, choices=[1, 2]), 2.0, 2),
    ],
)
def test_a_value_gets_its_normal_form(declared: object, given_value: object, normal: object) -> None:
    found = kind(declared).validate(given_value)
    assert json.dumps(found) == json.dumps(normal) and type(found) is type(normal)


@pytest.mark.parametrize(
    ("declared", "value", "phrase"),
    [
        (variable(True), 1, "true or false is due"),
        (variable(4, low=1, high=20), True, "an integer is due"),
        (variable(4, low=1, high=20), 4.5, "an integer is due"),
        (variable(4, low=1, high=20), float("inf"), "an integer is due"),
        (variable(4, low=1, high=20), "4", "an integer is due"),
        (variable(4, low=1, high=20), 21, "it must be from 1 to 20"),
        (variable(4, low=0, high=20, step=2), 5, "it must be 0 plus a multiple of 2"),
        (variable(0.5, low=0, high=1), float("nan"), "a finite number is due"),
        (variable(0.5, low=0, high=1), 10**400, "a finite number is due"),
        (variable(0.5, low=0, high=1), 1.5, "it must be from 0 to 1"),
        (variable(0.5, low=0, high=1, step=0.25), 0.3, "it must be 0 plus a multiple of 0.25"),
        (variable(0.5, low=0, high=1), np.ones(2), "a single value is due, several came"),
        (variable("a", choices=["a", "b"]), "c", "it must be one of 'a', 'b'"),
        (variable(1, choices=[1, 0]), True, "it must be one of 1, 0"),
        (variable("a"), 3, "a string is due"),
        (variable("a"), "\ud800", "valid Unicode"),
    ],
)
def test_a_wrong_value_is_refused_with_a_plain_phrase(declared: object, value: object, phrase: str) -> None:
    with pytest.raises(ValueError, match=phrase.replace("(", "\\(")):
        kind(declared).validate(value)


@given(st.integers(-50, 50), st.integers(1, 9), st.integers(1, 40), st.data())
def test_every_point_of_a_grid_is_its_own_normal_form(
    low: int, step: int, count: int, data: st.DataObject
) -> None:
    low_f, step_f = low / 10, step / 10
    high_f = (low + step * count) / 10
    grid = kind(variable(low_f, low=low_f, high=high_f, step=step_f))
    point = (low + step * data.draw(st.integers(0, count))) / 10
    assert grid.validate(point) == point
    assert grid.validate(grid.validate(point)) == grid.validate(point)


def test_a_kind_describes_itself_as_json() -> None:
    described = kind(variable(4, low=1, high=20, log=True, doc="how many")).to_json()
    assert json.loads(json.dumps(described)) == {
        "kind": "integer",
        "default": 4,
        "low": 1,
        "high": 20,
        "step": 1,
        "log": True,
        "when": [],
        "doc": "how many",
    }


@pytest.mark.parametrize(
    ("declared", "value", "remedy"),
    [
        (variable(21, low=1, high=20), "21", "move the default or the bounds"),
        (variable(1.5, low=0, high=1), "1.5", "move the default or the bounds"),
        (variable(4), "4", "low=…, high=…"),
        (variable(4, low=1), "4", "low=…, high=…"),
        (variable(4, low=20, high=1), "20", "swap low and high"),
        (variable(4, low=1.5, high=20), "1.5", "write whole numbers"),
        (variable(4, low=float("nan"), high=20), "nan", "give a number for low"),
        (variable(4, low=0, high=20, log=True), "0", "raise low or drop log=True"),
        (variable(4, low=1, high=20, log=True, step=2), "2", "drop step or log=True"),
        (variable(4, low=1, high=20, step=0), "0", "give a positive step"),
        (variable(4, low=1, high=20, step=2), "2", "change step, or high to 19"),
        (variable(0.5, low=0, high=1, step=0.3), "0.3", "change step, or high to 0.9"),
        (variable(4, low=1, high=21, step=4), "4", "move the default or the bounds"),
        (variable("c", choices=["a", "b"]), "'c'", "add it to the choices"),
        (variable("a", choices=["a", "b", "a"]), "'a'", "remove one of them"),
        (variable("a", choices=[]), "[]", "give at least one choice"),
        (variable("a", choices=["a", ("b",)]), "('b',)", "use null, true or false"),
        (variable("a", choices=["a", "b"], low=1), "1", "drop low"),
        (variable("a", choices=["a"], text=True), "'a'", "drop text=True"),
        (variable("a", ordered=True), "'a'", "add choices"),
        (variable("a", log=True), "True", "drop log"),
        (variable(True, low=0), "0", "drop low"),
        (variable(3, low=1, high=4, text=True), "3", "in quotes"),
        (variable(None), "None", "use a bool, int, float or str, or add choices"),
        (variable([1]), "[1]", "use null, true or false"),
        (variable(float("nan"), low=0, high=1), "nan", "a finite number"),
    ],
)
def test_a_mistake_names_class_field_value_and_remedy(declared: object, value: str, remedy: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        kind(declared)
    message = str(caught.value)
    assert message.startswith(f"Program.field = {value}:") and remedy in message
