"""What the ML-native types take, refuse, and look like on the wire."""

from __future__ import annotations

import json
import pickle
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from dspex.core.errors import InvalidInput
from dspex.core.schema import Schema
from dspex.core.types import (
    AttentionWeights,
    Confidence,
    Dimension,
    Embedding,
    Label,
    ModelResponse,
    Probability,
    ReasoningChain,
    Score,
    Secret,
    Tensor,
    TokenList,
)

finite = st.floats(allow_nan=False, allow_infinity=False)


class Everything(Schema):
    probability: Probability
    confidence: Confidence
    score: Score
    embedding: Embedding[3]  # type: ignore[valid-type, type-arg]
    tensor: Tensor
    matrix: Tensor[2, None]  # type: ignore[valid-type, type-arg]
    tokens: TokenList
    chain: ReasoningChain
    attention: AttentionWeights
    response: ModelResponse
    label: Label
    key: Secret


def everything(**changes: Any) -> Everything:
    values: dict[str, Any] = {
        "probability": 0.5,
        "confidence": 1,
        "score": -3.5,
        "embedding": [0.1, 0.2, 0.3],
        "tensor": 7,
        "matrix": [[1, 2, 3], [4, 5, 6]],
        "tokens": [1, 2, 3],
        "chain": ["look", "think"],
        "attention": [[0.25, 0.75], [1, 0]],
        "response": {"text": "hi", "model": "small", "input_tokens": 3},
        "label": Label.of({"cat": 3.0, "dog": 1.0}),
        "key": "env:OPENAI_API_KEY",
    }
    return Everything(**{**values, **changes})


def test_every_type_survives_the_wire() -> None:
    value = everything()
    assert Everything.decode(value.encode()) == value
    assert json.loads(value.encode())["matrix"] == {
        "shape": [2, 3],
        "dtype": "int64",
        "data": [1, 2, 3, 4, 5, 6],
    }


def test_every_type_has_a_json_schema() -> None:
    schema = Everything.model_json_schema(mode="serialization")
    fields = schema["properties"]
    assert fields["probability"] == {
        "maximum": 1,
        "minimum": 0,
        "title": "Probability",
        "type": "number",
    }
    assert (fields["embedding"]["minItems"], fields["embedding"]["maxItems"]) == (3, 3)
    assert fields["tensor"]["required"] == ["shape", "dtype", "data"]
    assert fields["key"]["type"] == "string"


def test_numpy_values_are_taken() -> None:
    value = everything(
        probability=np.float32(0.5),
        embedding=np.zeros(3, dtype="float32"),
        tensor=np.arange(6, dtype="uint8").reshape(1, 2, 3),
        tokens=np.array([4, 5]),
        attention=np.full((2, 2), 0.5),
    )
    assert value.tensor == Tensor([[[0, 1, 2], [3, 4, 5]]], dtype="uint8")
    assert Everything.decode(value.encode()) == value


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["probability", "confidence"])
def test_a_probability_stays_between_0_and_1(field: str, value: float) -> None:
    with pytest.raises(ValidationError):
        everything(**{field: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_number_is_nan_or_infinite(value: float) -> None:
    for changes in ({"score": value}, {"embedding": [value, 0, 0]}, {"tensor": [value]}):
        with pytest.raises(ValidationError):
            everything(**changes)


def refusal(field: str, value: object) -> str:
    body = json.loads(everything().encode())
    with pytest.raises(InvalidInput) as caught:
        Everything.decode(json.dumps({**body, field: value}).encode())
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("embedding", [1, 2], "embedding: 3 numbers are due, 2 came"),
        ("embedding", [1, 2, "3"], "embedding.2: a number is due, '3' came"),
        ("tensor", [[1], [2, 3]], "tensor: the lists at depth 1 differ in length"),
        ("tensor", {"shape": [2, 2], "data": [1]}, "tensor: shape [2, 2] holds 4 values, 1 came"),
        ("tensor", {"shape": [1], "dtype": "int8", "data": [200]}, "tensor: int8 data is from -128 to 127"),
        ("tensor", ["a"], "tensor: float64 data is finite numbers"),
        ("matrix", [1, 2], "matrix: shape [2, any] is due, [2] came"),
        ("tokens", [-1], "tokens.0: at least 0, -1 came"),
        ("chain", ["  "], "chain.0: a string matching \\S is due, '  ' came"),
        ("attention", [[0.5, 0.4]], "attention: row 0 sums to 0.9, 1 is due"),
        ("attention", [[1], [0.5, 0.5]], "attention: row 1 has 2 weights, row 0 has 1"),
        (
            "label",
            {"value": "a", "probabilities": {"a": 0.9}},
            "label: the probabilities sum to 0.9, 1 is due",
        ),
        (
            "label",
            {"value": "b", "probabilities": {"a": 1.0}},
            "label: the value has no probability among those given",
        ),
    ],
)
def test_a_refusal_says_what_is_due_and_what_came(field: str, value: object, sentence: str) -> None:
    assert refusal(field, value) == sentence


@pytest.mark.parametrize(
    "value", ["sk-live-123456", "", "env:", "env:9X", "file:", "file:a\nb", "http://x", 7, None]
)
def test_a_secret_is_a_reference_and_a_value_is_never_shown(value: object) -> None:
    sentence = refusal("key", value)
    assert "env:NAME" in sentence
    assert not isinstance(value, str) or len(value) < 6 or value not in sentence


def test_a_secret_beside_other_types_is_not_shown_either() -> None:
    class Both(Schema):
        key: Secret | int | None

    with pytest.raises(InvalidInput) as caught:
        Both.decode(b'{"key": "sk-live-123456"}')
    assert "sk-live" not in str(caught.value)
    with pytest.raises(ValidationError) as raw:
        Both(key="sk-live-123456")
    assert "sk-live" not in str(raw.value)


def test_a_secret_shows_its_reference() -> None:
    key = Secret("file:/run/key")
    assert (str(key), repr(key), key.scheme, key.target) == (
        "file:/run/key",
        "Secret('file:/run/key')",
        "file",
        "/run/key",
    )
    with pytest.raises(ValueError, match="reference") as caught:
        Secret("hunter2-hunter2")
    assert "hunter2" not in str(caught.value)


def test_a_label_of_weights_is_the_likeliest_with_probabilities_that_sum_to_1() -> None:
    label = Label.of({"cat": 1, "dog": 3})
    assert (label.value, label.confidence) == ("dog", 0.75)
    assert Label.of({"cat": 1, "dog": 3}, value="cat").confidence == 0.25
    for weights in ({}, {"a": 0.0}, {"a": -1.0, "b": 2.0}, {"a": float("nan")}):
        with pytest.raises(ValueError, match="weights of labels"):
            Label.of(weights)


@given(st.dictionaries(st.text(min_size=1), st.floats(1e-9, 1e9), min_size=1, max_size=50))
def test_any_positive_weights_make_a_label_that_survives_the_wire(weights: dict[str, float]) -> None:
    try:
        json.dumps(list(weights), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    label = Label.of(weights)
    assert Label.model_validate_json(label.model_dump_json()) == label


@given(st.lists(finite, min_size=1, max_size=20))
def test_any_finite_vector_is_an_embedding(values: list[float]) -> None:
    embedding = Embedding(values)
    assert list(embedding) == values and embedding.dimension == len(values)
    assert pickle.loads(pickle.dumps(embedding)) == embedding


@given(st.lists(st.integers(0, 4), max_size=4), st.data())
def test_a_tensor_gives_back_the_nested_lists_it_was_made_of(shape: list[int], data: st.DataObject) -> None:
    # Behind a size of 0 nested lists cannot show further sizes, so such shapes end there.
    shape = shape[: shape.index(0) + 1] if 0 in shape else shape
    array = np.array(data.draw(st.lists(finite, min_size=int(np.prod(shape)), max_size=int(np.prod(shape)))))
    nested = array.reshape(shape).tolist()
    tensor = Tensor(nested)
    assert tensor.tolist() == nested and tensor.shape == tuple(shape)
    assert Tensor.parse(json.loads(json.dumps(tensor.to_json()))) == tensor


def test_the_annotated_spelling_of_a_dimension_is_the_same() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[Embedding, Dimension(2)])
    assert adapter.json_schema() == TypeAdapter(Embedding[2]).json_schema()  # type: ignore[misc]
    for wrong in (0, True, "3"):
        with pytest.raises(TypeError, match="whole number"):
            Embedding[wrong]  # type: ignore[misc]


def test_a_chain_is_made_of_lines_and_numbers_its_steps() -> None:
    chain = ReasoningChain.of("look\n\n  think\n")
    assert list(chain) == ["look", "think"] and str(chain) == "1. look\n2. think"
