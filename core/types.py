"""The ML-native types: values of machine learning with their rules, their JSON Schema and their wire form.

Every type validates in Python and from JSON, and its wire form is plain JSON. Arrays of numpy, torch or
anything else with a `tolist()` are taken as they are; no array library is imported.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Self, TypeVar, cast, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    TypeAdapter,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from dspex.core.sealing import PRIVATE, secret_pattern
from dspex.core.tensor import Shape, Tensor, plain

__all__ = [
    "AttentionWeights",
    "Confidence",
    "Dimension",
    "Embedding",
    "Label",
    "ModelResponse",
    "Private",
    "Probability",
    "ReasoningChain",
    "Score",
    "Secret",
    "Shape",
    "Tensor",
    "TokenList",
]

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""How likely something is: a plain float from 0 to 1."""

Confidence = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""How sure a program is of its own answer: a plain float from 0 to 1, calibrated or not."""

Score = Annotated[float, Field(allow_inf_nan=False)]
"""How good an output is: any finite float, higher is better."""

LABEL_TOLERANCE = 1e-6
# A softmax in half precision sums to 1 within about 1e-3; a tighter bound would refuse honest weights.
ATTENTION_TOLERANCE = 1e-3

T = TypeVar("T")


class _PrivateMark:
    """Says so in the field's JSON Schema, which is where everybody looks."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {**handler(schema), PRIVATE: True}


Private = Annotated[T, _PrivateMark()]
"""A field whose value is never stored in the open: `ssn: Private[str]`. It is sealed with a key of its task's own, and
is gone everywhere when that key is forgotten."""


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


class _Row(tuple[T, ...]):
    """An immutable row of values whose wire form is a JSON array."""

    __slots__ = ()

    def __new__(cls, values: Iterable[T] = ()) -> Self:
        made: Self = _adapter(cls).validate_python(values)
        return made

    @classmethod
    def _items(cls) -> CoreSchema:
        raise NotImplementedError

    @classmethod
    def _checked(cls, values: tuple[T, ...]) -> Self:
        return tuple.__new__(cls, values)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        rows = core_schema.no_info_before_validator_function(_tuples, cls._items())
        return core_schema.no_info_after_validator_function(cls._checked, rows)

    def __repr__(self) -> str:
        shown = ", ".join(repr(value) for value in self[:4]) + (", …" if len(self) > 4 else "")
        return f"{type(self).__name__}([{shown}], length={len(self)})"


class Embedding(_Row[float]):
    """A vector of finite floats; `Embedding[384]` fixes its dimension.

    A type checker that refuses a number as a type parameter takes `Annotated[Embedding, Dimension(384)]`,
    which is what `Embedding[384]` is.
    """

    __slots__ = ()

    def __class_getitem__(cls, dimension: object) -> Any:
        if get_origin(dimension) is Literal:
            (dimension,) = get_args(dimension)
        return Annotated[cls, Dimension(dimension)]  # type: ignore[arg-type]

    @property
    def dimension(self) -> int:
        """How many numbers the vector has."""
        return len(self)

    @classmethod
    def _items(cls) -> CoreSchema:
        return core_schema.tuple_variable_schema(core_schema.float_schema(allow_inf_nan=False), min_length=1)


@dataclass(frozen=True)
class Dimension:
    """The rule that an Embedding has exactly so many numbers."""

    size: int

    def __post_init__(self) -> None:
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise TypeError(f"Embedding[{self.size!r}]: the dimension is a whole number, at least 1")

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), "minItems": self.size, "maxItems": self.size}

    def _check(self, value: Embedding) -> Embedding:
        if len(value) != self.size:
            raise PydanticCustomError(
                "dimension", "{due} numbers are due, {came} came", {"due": self.size, "came": len(value)}
            )
        return value


class TokenList(_Row[int]):
    """Token ids as a tokenizer gives them: whole numbers from 0."""

    __slots__ = ()

    @classmethod
    def _items(cls) -> CoreSchema:
        return core_schema.tuple_variable_schema(core_schema.int_schema(ge=0))


class ReasoningChain(_Row[str]):
    """The steps of a thought in order, each a text that is not blank; `str()` numbers them."""

    __slots__ = ()

    @classmethod
    def of(cls, text: str) -> Self:
        """One step for every line that is not blank."""
        return cls(line.strip() for line in text.splitlines() if line.strip())

    @classmethod
    def _items(cls) -> CoreSchema:
        return core_schema.tuple_variable_schema(core_schema.str_schema(pattern=r"\S"))

    def __str__(self) -> str:
        return "\n".join(f"{number}. {step}" for number, step in enumerate(self, 1))


class AttentionWeights(_Row[tuple[float, ...]]):
    """A matrix of attention, queries by keys: rows of equal length, each of them summing to 1."""

    __slots__ = ()

    @classmethod
    def _items(cls) -> CoreSchema:
        weight = core_schema.float_schema(ge=0, le=1, allow_inf_nan=False)
        row = core_schema.tuple_variable_schema(weight, min_length=1)
        return core_schema.tuple_variable_schema(row, min_length=1)

    @classmethod
    def _checked(cls, values: tuple[tuple[float, ...], ...]) -> Self:
        for number, row in enumerate(values):
            if len(row) != len(values[0]):
                raise PydanticCustomError(
                    "attention_shape",
                    "row {row} has {came} weights, row 0 has {due}",
                    {"row": number, "came": len(row), "due": len(values[0])},
                )
            if abs(math.fsum(row) - 1) > ATTENTION_TOLERANCE:
                raise PydanticCustomError(
                    "attention_sum",
                    "row {row} sums to {sum}, 1 is due",
                    {"row": number, "sum": math.fsum(row)},
                )
        return super()._checked(values)


class ModelResponse(BaseModel):
    """What a model answered and what it took: tokens as the provider counted them, cost in US dollars."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    text: str
    model: str = ""
    finish_reason: str = "stop"
    input_tokens: int = Field(default=0, ge=0)
    output_tokens: int = Field(default=0, ge=0)
    usd: float = Field(default=0.0, ge=0)


class Label(BaseModel):
    """A class with the probability of every class it was chosen from; they sum to 1 within 1e-6."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    value: str
    probabilities: dict[str, Probability]

    @classmethod
    def of(cls, weights: Mapping[str, float], value: str | None = None) -> Self:
        """The likeliest label (or `value`) of weights that are 0 or more; they are scaled to sum to 1.

        Raises ValueError when there is no weight above 0 or one is negative or not finite.
        """
        plain_weights = {name: float(weight) for name, weight in weights.items()}
        total = math.fsum(plain_weights.values())
        if not math.isfinite(total) or total <= 0 or min(plain_weights.values()) < 0:
            raise ValueError("weights of labels are finite, 0 or more, and one of them is above 0")
        probabilities = {name: min(1.0, weight / total) for name, weight in plain_weights.items()}
        chosen = max(probabilities, key=probabilities.__getitem__) if value is None else value
        return cls(value=chosen, probabilities=probabilities)

    @property
    def confidence(self) -> float:
        """The probability of the chosen value."""
        return self.probabilities[self.value]

    @model_validator(mode="after")
    def _check(self) -> Self:
        total = math.fsum(self.probabilities.values())
        if abs(total - 1) > LABEL_TOLERANCE:
            raise PydanticCustomError("label_sum", "the probabilities sum to {sum}, 1 is due", {"sum": total})
        if self.value not in self.probabilities:
            raise PydanticCustomError("label_value", "the value has no probability among those given")
        return self


SCHEMES = {"env", "file"}
"""Where a secret may be; `agents.secrets` adds those that other distributions resolve."""
_ENV = re.compile(r"env:[A-Za-z_][A-Za-z0-9_]{0,254}")
_ELSEWHERE = re.compile(r"([a-z][a-z0-9_]{0,31}):[^\s\x00](?:[^\x00-\x1f]{0,4094}[^\s\x00])?")
_SECRET_DUE = "a reference such as env:NAME or file:/path is due, never the secret itself"


def _is_reference(text: str) -> bool:
    if _ENV.fullmatch(text):
        return True
    found = _ELSEWHERE.fullmatch(text)
    return found is not None and found[1] != "env" and found[1] in SCHEMES


class Secret(str):
    """A reference to a secret: `env:OPENAI_API_KEY` or `file:/path`, never the value.

    `dspex.reveal` reads the value, at the edge and when it is used. Other distributions may add schemes. What is not a
    reference is refused without being shown.
    """

    __slots__ = ()

    def __new__(cls, reference: str) -> Self:
        if not isinstance(reference, str) or not _is_reference(reference):
            raise ValueError(_SECRET_DUE)
        return super().__new__(cls, reference)

    @property
    def scheme(self) -> str:
        """Where to look: `env`, `file`, or what another distribution adds."""
        return self.partition(":")[0]

    @property
    def target(self) -> str:
        """What to look for there: the variable's name or the path."""
        return self.partition(":")[2]

    def __repr__(self) -> str:
        return f"Secret({str(self)!r})"

    @classmethod
    def _validated(cls, value: object) -> Self:
        try:
            return cls(cast(str, value))
        except ValueError:
            # One error type for all cases: `explain` knows by it that the value must not be shown.
            raise PydanticCustomError("secret", _SECRET_DUE) from None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.to_string_ser_schema()
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {
            "type": "string",
            "pattern": secret_pattern(SCHEMES),
            "description": "A reference, never the value.",
        }


def _tuples(value: object) -> object:
    # Strict validation takes a tuple from Python only, so lists become tuples, two levels at most.
    value = plain(value)
    if type(value) is list and (not value or type(value[0]) in (int, float, str)):
        return tuple(value)  # the usual case, without a look at every item
    if isinstance(value, (str, bytes, dict)) or not isinstance(value, Iterable):
        return value
    return tuple(tuple(item) if isinstance(item, list) else item for item in map(plain, value))
