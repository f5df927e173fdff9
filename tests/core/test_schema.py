"""What a Schema decodes and encodes, and the sentence it refuses with."""

from __future__ import annotations

import contextlib
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspex.core.errors import DefinitionError, InvalidInput
from dspex.core.schema import MAX_BODY, Schema, check_depth, field_variables
from dspex.core.types import Probability
from dspex.core.variables import Choice, Float, Integer, variable


class Query(Schema):
    question: str
    passages: int = 4
    temperature: Probability = variable(0.7)
    anything: Any = None


def refusal(body: bytes) -> str:
    with pytest.raises(InvalidInput) as caught:
        Query.decode(body)
    return str(caught.value)


text = st.text(st.characters(exclude_categories=["Cs"]))


@given(text, st.integers(-(2**62), 2**62), st.floats(0, 1))
def test_what_is_encoded_decodes_to_the_same(question: str, passages: int, temperature: float) -> None:
    query = Query(question=question, passages=passages, temperature=temperature)
    assert Query.decode(query.encode()) == query
    assert b"\n" not in query.encode()


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "the body is empty, a JSON object is due"),
        (b"{", "the body is not JSON: EOF while parsing an object at line 1 column 1"),
        (b"[]", "an object is due, a list of 0 came"),
        (b"4", "an object is due, 4 came"),
        (b'{"question": "\xff"}', "the body is not UTF-8 (byte 14)"),
        (b"{}", "question: a string is due, nothing came"),
        (b'{"question": 5}', "question: a string is due, 5 came"),
        (b'{"question": "a", "passages": "4"}', "passages: an integer is due, '4' came"),
        (b'{"question": "a", "passages": true}', "passages: an integer is due, true came"),
        (b'{"question": "a", "passages": null}', "passages: an integer is due, null came"),
        (
            b'{"question": "a", "other": 1}',
            "other: no such field, there is question, passages, temperature, anything",
        ),
        (
            b'{"question": [1], "passages": {}, "temperature": 2, "x": 1}',
            "question: a string is due, a list of 1 came; passages: an integer is due, "
            "an object with 0 fields came; temperature: at most 1.0, 2 came; and 1 more",
        ),
    ],
)
def test_a_refusal_is_one_sentence_with_field_due_and_came(body: bytes, sentence: str) -> None:
    assert refusal(body) == sentence


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity"])
@pytest.mark.parametrize("field", [b"temperature", b"anything"])
def test_what_is_not_a_json_number_is_refused_even_where_any_value_goes(number: bytes, field: bytes) -> None:
    assert "not JSON" in refusal(b'{"question": "a", "%s": %s}' % (field, number))


def test_a_text_may_say_nan() -> None:
    assert Query.decode(b'{"question": "NaN or Infinity?"}').question == "NaN or Infinity?"


def test_a_long_value_is_not_echoed() -> None:
    sentence = refusal(json.dumps({"question": "a", "passages": "x" * 10_000}).encode())
    assert "…" in sentence and len(sentence) < 130


def test_a_body_past_the_limit_is_refused_with_both_numbers() -> None:
    sentence = refusal(b" " * (MAX_BODY + 1))
    assert str(MAX_BODY) in sentence and str(MAX_BODY + 1) in sentence


def nested(depth: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return b'{"question": "a", "anything": ' + opening * depth + b"1" + closing * depth + b"}"


def test_depth_is_bounded() -> None:
    assert Query.decode(nested(63)).question == "a"
    assert "deeper than 64" in refusal(nested(64))
    assert "deeper than 64" in refusal(nested(64, b'{"k": ', b"}"))


def test_brackets_in_texts_and_in_width_are_not_depth() -> None:
    body = json.dumps({"question": "[{" * 500 + '"\\', "anything": [[]] * 500})
    assert Query.decode(body.encode()).question.startswith("[{")


json_values = st.recursive(
    st.none() | st.integers() | text, lambda inner: st.lists(inner) | st.dictionaries(text, inner)
)


def depth_of(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@given(json_values, st.integers(0, 4))
def test_the_depth_check_agrees_with_the_depth(value: object, limit: int) -> None:
    body = json.dumps(value).encode()
    if depth_of(value) <= limit:
        check_depth(body, limit)
    else:
        with pytest.raises(InvalidInput):
            check_depth(body, limit)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_input_or_a_refusal(body: bytes) -> None:
    try:
        Query.decode(body)
    except InvalidInput as error:
        assert 0 < len(str(error)) < 600


def test_the_depth_check_is_quick_on_the_worst_bodies() -> None:
    import time

    for body in (b'"' + b'\\"' * 500_000, b"[" * 1_000_000, b"[]," * 300_000, b'"' * 999_999):
        start = time.process_time()
        with contextlib.suppress(InvalidInput):
            check_depth(body)
        assert time.process_time() - start < 20  # quadratic ones took minutes


def test_a_variable_field_has_a_plain_default_and_the_bounds_of_its_type() -> None:
    class Tuned(Schema):
        temperature: Probability = variable(1)
        k: int = variable(4, low=1, high=20)
        style: Literal["terse", "full"] = variable("terse")

    assert Tuned().temperature == 1.0 and type(Tuned().temperature) is float
    assert field_variables(Tuned) == {
        "temperature": Float(default=1.0, low=0.0, high=1.0),
        "k": Integer(default=4, low=1, high=20),
        "style": Choice(default="terse", choices=("terse", "full")),
    }
    assert Tuned.model_json_schema()["properties"]["k"] == {"default": 4, "title": "K", "type": "integer"}


def test_a_field_defined_anew_without_a_variable_has_none() -> None:
    class Fixed(Query):
        temperature: Probability = 0.1

    assert list(field_variables(Query)) == ["temperature"] and not field_variables(Fixed)


def test_types_of_the_function_around_are_found() -> None:
    class Inner(Schema):
        x: int

    class Outer:
        class Input(Schema):
            inner: Inner

    assert Outer.Input.decode(b'{"inner": {"x": 1}}').inner.x == 1


def test_an_instance_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Query(question="a").question = "b"  # type: ignore[misc]


class NoForm:
    """A type without a JSON form."""


def define_unknown_type() -> None:
    class Bad(Schema):
        fine: str
        field: NoForm


def define_untyped_variable() -> None:
    class Bad(Schema):
        field = variable(3, low=1, high=4)  # type: ignore[pydantic-field]


def define_untyped_field() -> None:
    class Bad(Schema):
        field = 3  # type: ignore[pydantic-field]


def define_default_outside() -> None:
    class Bad(Schema):
        field: Probability = variable(1.7)


def define_bound_outside() -> None:
    class Bad(Schema):
        field: Probability = variable(0.5, high=1.7)


def define_without_bounds() -> None:
    class Bad(Schema):
        field: float = variable(1.7)


def define_choice_outside() -> None:
    class Bad(Schema):
        field: Literal["a", "b"] = variable("a", choices=["a", "c"])  # type: ignore[list-item]


def define_reserved_name() -> None:
    class Bad(Schema):
        encode: str  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("define", "field", "value", "remedy"),
    [
        (define_unknown_type, "field", "NoForm", "use types that have a JSON form"),
        (define_untyped_variable, "field", "3", "write field: type = variable(...)"),
        (define_untyped_field, "field", "3", "write field: type"),
        (define_default_outside, "field", "1.7", "choose the default that the type admits"),
        (define_bound_outside, "field", "1.7", "choose high that the type admits"),
        (define_without_bounds, "field", "1.7", "low=…"),
        (define_choice_outside, "field", "'c'", "choose a choice that the type admits"),
        (define_reserved_name, "encode", "encode", "rename the field"),
    ],
)
def test_a_mistake_is_an_error_at_definition(define: Any, field: str, value: str, remedy: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        define()
    message = str(caught.value)
    assert f"Bad.{field} = " in message and value in message and remedy in message
