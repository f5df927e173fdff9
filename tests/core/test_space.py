"""Spaces and assignments: any valid values round-trip, hashes depend on content only, inactive values go."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspex.core.errors import InvalidAssignment
from dspex.core.program import Program
from dspex.core.schema import Schema
from dspex.core.space import Assignment, Cycle, Space, ordered
from dspex.core.types import Probability
from dspex.core.variables import (
    Boolean,
    Choice,
    Float,
    Integer,
    Module,
    Text,
    Variable,
    computed,
    constraint,
    variable,
)


class Retriever(Program):
    """What the two retrievers share."""


class BM25(Retriever):
    class Input(Schema):
        query: str

    class Output(Schema):
        hits: list[str]

    k1 = variable(1.5, low=0.5, high=3.0, step=0.25)
    stem = variable(True)
    language = variable("en", choices=["en", "de"], when={"stem": True})

    def predict(self, input: Input) -> Output:
        return self.Output(hits=[input.query])


class Embedder(Retriever):
    class Input(Schema):
        query: str

    class Output(Schema):
        hits: list[str]

    dimension = variable(64, low=8, high=512, log=True)
    half = computed(lambda dimension: dimension // 2)

    def predict(self, input: Input) -> Output:
        return self.Output(hits=[])


class QABot(Program):
    class Input(Schema):
        question: str
        temperature: Probability = variable(0.7)

    class Output(Schema):
        answer: str

    style = variable("terse", choices=["terse", "full", "wild"])
    length = variable(100, low=10, high=1000, when={"style": ["full", "wild"]})
    tone = variable("plain", when={"length": 500})
    retriever = variable(BM25, choices=[BM25, Embedder])
    reader = Embedder(dimension=32)
    low = variable(2, low=0, high=20)
    high = variable(10, low=0, high=20)
    span = computed(lambda low, high: high - low)
    double = computed(lambda span: 2 * span)
    rule = constraint(lambda low, high: low <= high, "low must stay under high")

    def predict(self, input: Input) -> Output:
        return self.Output(answer="")


SPACE = QABot.space()


def values_of(kind: Variable) -> st.SearchStrategy[object]:
    if isinstance(kind, Boolean):
        return st.booleans()
    if isinstance(kind, Integer):
        return st.integers(0, (kind.high - kind.low) // kind.step).map(lambda n: kind.low + n * kind.step)
    if isinstance(kind, Float):
        if kind.step is not None:
            low, step, count = kind.low, kind.step, round((kind.high - kind.low) / kind.step)
            return st.integers(0, count).map(lambda n: low + n * step)
        return st.floats(kind.low, kind.high)
    if isinstance(kind, (Choice, Module)):
        return st.sampled_from(list(kind.choices))
    assert isinstance(kind, Text)
    return st.text(st.characters(exclude_categories=["Cs"]))


@st.composite
def wanted(draw: st.DrawFn) -> dict[str, object]:
    """Valid values for some paths, active or not, that keep the constraint."""
    paths = draw(st.lists(st.sampled_from(list(SPACE.variables)), unique=True))
    found = {path: draw(values_of(SPACE.variables[path])) for path in paths}
    low, high = found.get("low", 2), found.get("high", 10)
    assert isinstance(low, int) and isinstance(high, int)
    if low > high:
        found["low"], found["high"] = high, low
    return found


def active_part(values: dict[str, object]) -> dict[str, object]:
    return {path: value for path, value in values.items() if path in SPACE.active(values)}


@given(wanted())
def test_assigned_values_are_kept_completed_and_survive_the_wire(values: dict[str, object]) -> None:
    values = active_part(values)
    assignment = SPACE.assign(values)
    assert set(assignment) == SPACE.active(values)
    assert all(assignment[path] == SPACE.variables[path].validate(value) for path, value in values.items())
    wire = json.loads(json.dumps(assignment.to_json()))
    again = Assignment.from_json(wire)
    assert again == assignment and again.hash == assignment.hash and len(again.hash) == 32
    assert SPACE.assign({}, base=again) == assignment
    assert pickle.loads(pickle.dumps(assignment)) == assignment


@given(wanted(), st.randoms())
def test_the_hash_does_not_depend_on_the_order(values: dict[str, object], random: object) -> None:
    values = active_part(values)
    items = list(values.items())
    random.shuffle(items)  # type: ignore[attr-defined]
    assert SPACE.assign(dict(items)).hash == SPACE.assign(values).hash
    assignment = SPACE.assign(values)
    assert Assignment(dict(reversed(list(assignment.items())))) == assignment


@given(wanted(), wanted())
def test_what_becomes_inactive_is_dropped(first: dict[str, object], second: dict[str, object]) -> None:
    base = SPACE.assign(active_part(first))
    merged = active_part({**base.values, **second})
    second = {path: value for path, value in second.items() if path in merged}
    low, high = merged["low"], merged["high"]
    assert isinstance(low, int) and isinstance(high, int)
    if low > high:
        with pytest.raises(InvalidAssignment, match="low must stay under high"):
            SPACE.assign(second, base=base)
        return
    found = SPACE.assign(second, base=base)
    assert set(found) == SPACE.active(found.values)
    assert all(found[path] == base[path] for path in found if path in base and path not in second)


@given(wanted())
def test_an_instance_has_the_values_of_its_assignment(values: dict[str, object]) -> None:
    assignment = SPACE.assign(active_part(values))
    bot = QABot(assignment=assignment)
    assert bot.assignment == assignment
    assert (bot.low, bot.high, bot.span, bot.double) == (
        assignment["low"],
        assignment["high"],
        bot.high - bot.low,
        2 * (bot.high - bot.low),
    )
    assert bot.reader.dimension == assignment["reader.dimension"]
    assert type(bot.retriever).name == assignment["retriever"]
    prefix = f"retriever.{type(bot.retriever).name}."
    assert bot.retriever.assignment == assignment.part(prefix)


def test_the_paths_of_a_program() -> None:
    assert set(SPACE.variables) == {
        "style",
        "length",
        "tone",
        "retriever",
        "retriever.bm25.k1",
        "retriever.bm25.stem",
        "retriever.bm25.language",
        "retriever.embedder.dimension",
        "reader.dimension",
        "low",
        "high",
        "input.temperature",
    }
    assert SPACE.default().to_json() == {
        "style": "terse",
        "retriever": "bm25",
        "retriever.bm25.k1": 1.5,
        "retriever.bm25.stem": True,
        "retriever.bm25.language": "en",
        "reader.dimension": 32,
        "low": 2,
        "high": 10,
        "input.temperature": 0.7,
    }


def test_a_chain_of_conditions_activates_link_by_link() -> None:
    assert "tone" not in SPACE.assign({"style": "full"})
    assert SPACE.assign({"style": "full", "length": 500})["tone"] == "plain"
    assert "length" not in SPACE.assign(
        {"style": "terse"}, base=SPACE.assign({"style": "full", "length": 500})
    )
    deep = SPACE.assign({"retriever.bm25.stem": False})
    assert "retriever.bm25.language" not in deep


def test_a_chosen_module_activates_its_own_variables() -> None:
    found = SPACE.assign({"retriever": Embedder})
    assert found["retriever"] == "embedder" and found["retriever.embedder.dimension"] == 64
    assert not [path for path in found if path.startswith("retriever.bm25")]


def test_resolving_adds_what_is_computed_of_active_values() -> None:
    resolved = SPACE.resolve(SPACE.default())
    assert (resolved["span"], resolved["double"], resolved["reader.half"]) == (8, 16, 16)
    assert "retriever.embedder.half" not in resolved


def test_equal_numbers_have_equal_hashes() -> None:
    assert (
        SPACE.assign({"low": 3.0, "input.temperature": 1}).hash
        == SPACE.assign({"low": 3, "input.temperature": 1.0}).hash
    )


@pytest.mark.parametrize(
    ("values", "path", "problem"),
    [
        ({"stile": "full"}, "stile", "did you mean style?"),
        ({"temperature": 0.1}, "temperature", "did you mean input.temperature?"),
        ({"style": "loud"}, "style", "it must be one of 'terse', 'full', 'wild'"),
        ({"low": 21}, "low", "it must be from 0 to 20"),
        ({"length": 50}, "length", "it is not active: it needs style = 'full' or 'wild'"),
        ({"retriever.embedder.dimension": 9}, "retriever.embedder.dimension", "needs retriever = 'embedder'"),
        ({"low": 11}, "low, high", "low must stay under high"),
        ({"span": 3}, "span", "it is computed, set low, high"),
    ],
)
def test_a_refusal_names_path_value_and_problem(values: dict[str, object], path: str, problem: str) -> None:
    with pytest.raises(InvalidAssignment) as caught:
        SPACE.assign(values)
    assert caught.value.path == path and problem in str(caught.value)
    assert repr(next(iter(values.values()))) in str(caught.value)


def test_a_rule_that_raises_is_a_refusal() -> None:
    class Ratio(QABot):
        ratio = computed(lambda high, low: high // (low - 5))

    with pytest.raises(InvalidAssignment, match=r"ratio.*ZeroDivisionError"):
        Ratio.space().assign({"low": 5})


def test_an_assignment_reads_like_a_mapping_and_does_not_change() -> None:
    assignment = SPACE.default()
    assert dict(assignment) == dict(assignment.values) and len(assignment) == len(assignment.values)
    assert assignment.get("nothing", 3) == 3 and "low" in assignment and hash(assignment) == hash(assignment)
    with pytest.raises(AttributeError, match="immutable"):
        assignment.low = 3
    with pytest.raises(TypeError):
        assignment.values["low"] = 3  # type: ignore[index]
    with pytest.raises(InvalidAssignment, match=r"a\.b"):
        Assignment.from_json({"a.b": [1]})


def test_a_space_describes_itself_and_its_fingerprint_follows() -> None:
    described = json.loads(json.dumps(SPACE.to_json()))
    assert described["variables"]["length"]["when"] == [{"path": "style", "values": ["full", "wild"]}]
    assert described["computed"]["double"] == ["span"]
    assert described["constraints"] == [{"paths": ["low", "high"], "message": "low must stay under high"}]
    assert SPACE.fingerprint == Space(SPACE.variables, SPACE.computed, SPACE.constraints).fingerprint
    assert SPACE.fingerprint != BM25.space().fingerprint


def test_an_order_has_parents_first_and_names_a_cycle() -> None:
    assert ordered({"c": ["a"], "b": [], "a": ["b"]}) == ["b", "a", "c"]
    with pytest.raises(Cycle, match="a -> b -> a"):
        ordered({"a": ["b"], "b": ["a"]})
