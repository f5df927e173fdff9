"""Every mistake in a Program class is an error when it is defined, with class, field, value and remedy."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from dspex.core.errors import DefinitionError
from dspex.core.program import Program
from dspex.core.schema import Schema
from dspex.core.variables import computed, constraint, variable


class Good(Program):
    class Input(Schema):
        x: int = 0

    class Output(Schema):
        y: int = 0

    def predict(self, input: Input) -> Output:
        return self.Output()


class Twin(Good):
    name = "good"


class Abstract(Program):
    """Has none of the three."""


class Uncallable(Schema):
    fine: int
    hook: Callable[[], int]


async def streaming(self: Any, input: Good.Input) -> AsyncIterator[Good.Output]:
    yield Good.Output()


def gives_str(self: Any, input: Good.Input) -> str:
    return ""


def gives_anything(self: Any, input: Any) -> Any:
    return None


def gives_none(self: Any, input: Good.Input) -> None:
    return None


def takes_two(self: Any, input: Good.Input, more: int) -> Good.Output:
    return Good.Output()


def takes_none(self: Any) -> Good.Output:
    return Good.Output()


def takes_str(self: Any, input: str) -> Good.Output:
    return Good.Output()


def bad(**body: object) -> type:
    """Define `class Bad(Good)` with this body, as Python itself would."""
    return type("Bad", (Good,), {"__module__": __name__, "__qualname__": "Bad", **body})


ab = ["a", "b"]
CASES: list[tuple[dict[str, object], str, str, str]] = [
    ({"k": variable(9, low=1, high=3)}, "k", "9", "move the default or the bounds"),
    ({"k": variable(2, low=3, high=1)}, "k", "3", "swap low and high"),
    ({"k": variable(2, low=0, high=3, log=True)}, "k", "0", "raise low or drop log=True"),
    ({"k": variable(2, low=0, high=3, step=2)}, "k", "2", "change step, or high to 2"),
    ({"k": variable("c", choices=ab)}, "k", "'c'", "add it to the choices"),
    ({"k": variable("a", choices=["a", "a"])}, "k", "'a'", "remove one of them"),
    ({"k": variable(2)}, "k", "2", "low=…"),
    ({"k": variable("a", choices=["a", {}])}, "k", "{}", "use null, true or false"),
    (
        {"k": variable("a", choices=ab, when={"m": "a"}), "m": variable("a", choices=ab, when={"k": "a"})},
        "k",
        "k -> m -> k",
        "drop one `when`",
    ),
    ({"k": variable("a", choices=ab, when={"k": "a"})}, "k", "k -> k", "drop one `when`"),
    (
        {"k": computed(lambda m: m), "m": computed(lambda k: k)},
        "k",
        "k -> m -> k",
        "compute one of them from variables only",
    ),
    ({"k": computed(lambda nothing: 1)}, "k", "nothing", "name its parameters after variables"),
    ({"k": computed(lambda: 1)}, "k", "lambda", "name variables as its parameters"),
    ({"k": computed(lambda **rest: 1)}, "k", "**rest", "plain parameter"),
    ({"k": constraint(lambda nothing: True)}, "k", "nothing", "name its parameters after variables"),
    ({"k": constraint(lambda: True)}, "k", "lambda", "name variables as its parameters"),
    ({"k": variable(True, when={"nothing": 1})}, "k", "{'nothing': 1}", "name a variable of this program"),
    (
        {"k": variable(True, when={"m": "c"}), "m": variable("a", choices=ab)},
        "k",
        "{'m': 'c'}",
        "name a value that the parent can have",
    ),
    ({"k": variable(True, when={"m": []}), "m": variable(True)}, "k", "{'m': []}", "at least one value"),
    (
        {"k": variable(True, when={"m": 1}), "m": computed(lambda n: n), "n": variable(True)},
        "k",
        "m",
        "not a computed value",
    ),
    (
        {"m": variable(2, low=1, high=3), "k": constraint(lambda m: m > 2, "m above 2")},
        "k",
        "2: the defaults of m do not work: m above 2",
        "change a default or the rule",
    ),
    (
        {"m": variable(0, low=0, high=3), "k": computed(lambda m: 1 // m)},
        "k",
        "ZeroDivisionError",
        "change a default or the rule",
    ),
    ({"timeout": variable(3, low=1, high=4)}, "timeout", "Declaration", "write timeout = 300.0"),
    ({"setup": variable(3, low=1, high=4)}, "setup", "'setup'", "rename the attribute"),
    ({"input": variable(3, low=1, high=4)}, "input", "'input'", "rename the attribute"),
    ({"describe": computed(lambda x: x)}, "describe", "'describe'", "rename the attribute"),
    ({"name": "Not-A-Name"}, "name", "'Not-A-Name'", 'write name = "…"'),
    ({"name": "n" * 65}, "name", "'nnn", 'write name = "…"'),
    ({"name": ""}, "name", "''", 'write name = "…"'),
    ({"Input": int}, "Input", "int", "write class Input(Schema)"),
    ({"Output": dict}, "Output", "dict", "write class Output(Schema)"),
    ({"Output": Uncallable, "predict": gives_anything}, "Output.hook", "Uncallable", "a JSON form"),
    ({"predict": streaming}, "predict", "streaming", "return one Output, drop yield"),
    ({"predict": 3}, "predict", "3", "write def predict(self, input: Input) -> Output"),
    ({"predict": takes_two}, "predict", "more", "write def predict(self, input: Input) -> Output"),
    ({"predict": takes_none}, "predict", "predict(self", "write def predict(self, input: Input) -> Output"),
    ({"predict": takes_str}, "predict", "str", "annotate input: Input"),
    ({"predict": gives_str}, "predict", "str", "annotate -> Output"),
    ({"predict": gives_none}, "predict", "None", "annotate -> Output"),
    ({"k": variable(Good, choices=[Good, Twin])}, "k", "'good'", 'another name = "…"'),
    ({"k": variable(Good, choices=[Good, Good])}, "k", "'good'", "remove one of them"),
    ({"k": variable(Good, choices=[Twin])}, "k", "Good", "add it to the choices"),
    ({"k": variable(Good)}, "k", "Good", "add choices=[...] of Program classes"),
    ({"k": variable(Good, choices=[Good, Abstract])}, "k", "Abstract", "choose a subclass"),
    ({"k": variable(Good, choices=[Good, int])}, "k", "int", "give Program classes only"),
    ({"timeout": 0}, "timeout", "0", "write timeout = 300.0"),
    ({"timeout": float("inf")}, "timeout", "inf", "write timeout = 300.0"),
    ({"attempts": 0}, "attempts", "0", "write attempts = 3"),
    ({"attempts": True}, "attempts", "True", "write attempts = 3"),
    ({"concurrency": -1}, "concurrency", "-1", "write concurrency = 64"),
]


@pytest.mark.parametrize(("body", "field", "value", "remedy"), CASES, ids=[f"{c[1]}-{c[3]}" for c in CASES])
def test_a_mistake_is_refused(body: dict[str, object], field: str, value: str, remedy: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        bad(**body)
    message = str(caught.value)
    assert message.startswith(f"Bad.{field} = ") and value in message and remedy in message
    assert caught.value.program == "Bad" and caught.value.field == field


@pytest.mark.parametrize("missing", ["Input", "Output", "predict"])
def test_a_class_with_only_some_of_the_three_is_refused(missing: str) -> None:
    body = {"Input": Good.Input, "Output": Good.Output, "predict": Good.predict}
    del body[missing]
    with pytest.raises(DefinitionError, match=f"Bad.{missing} = .*define {missing}"):
        type("Bad", (Program,), {"__module__": __name__, "__qualname__": "Bad", **body})


def test_a_string_annotation_that_is_not_the_output_is_refused() -> None:
    with pytest.raises(DefinitionError, match=r"Bad\.predict = .*return Bad\.Other.*annotate -> Output"):

        class Bad(Good):
            class Other(Schema):
                z: int

            def predict(self, input: Good.Input) -> Bad.Other:  # type: ignore[override]
                return self.Other(z=1)


def test_an_annotation_that_cannot_be_known_is_left_alone() -> None:
    class Fine(Good):
        def predict(self, input: Good.Input) -> Later.Output:  # type: ignore[name-defined]  # noqa: F821
            return self.Output()

    assert Fine()().y == 0


def test_a_name_that_is_never_defined_is_refused() -> None:
    class Waiting(Schema):
        x: Nowhere  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(DefinitionError, match=r"Bad\.Input = Waiting.*define the types it names before"):
        bad(Input=Waiting, predict=gives_anything)


def test_a_mistake_in_an_abstract_base_is_refused_there() -> None:
    with pytest.raises(DefinitionError, match=r"Base\.k = 9"):

        class Base(Program):
            k = variable(9, low=1, high=3)
