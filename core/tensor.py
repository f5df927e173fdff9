"""The Tensor type: a shape, an element type and flat data, with plain JSON as its wire form."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

Number = bool | int | float

# Element type -> (kind, lowest, highest). Floats carry no bounds: their values travel as doubles.
DTYPES: dict[str, tuple[type, int, int]] = {
    "bool": (bool, 0, 1),
    **{f"int{bits}": (int, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (int, 0, 2**bits - 1) for bits in (8, 16, 32, 64)},
    **dict.fromkeys(("float16", "bfloat16", "float32", "float64"), (float, 0, 0)),
}


def plain(value: object) -> object:
    """Arrays and scalars of numpy, torch and the like (whatever has `tolist`) as lists and numbers."""
    tolist = getattr(value, "tolist", None)
    return tolist() if callable(tolist) else value


@dataclass(frozen=True, slots=True, init=False)
class Tensor:
    """An array of any rank, its data flat in row-major order; `Tensor[2, None]` fixes the shape, None is any.

    Made from nested lists, from flat data with a shape, or from an array that has `tolist`. The element type
    is the array's, or bool, int64 or float64 by the data. Raises ValueError for ragged lists, values that are
    not finite or don't fit the element type, and shapes that don't fit the data.
    """

    shape: tuple[int, ...]
    dtype: str
    data: tuple[Number, ...]

    def __init__(self, data: object, *, shape: Sequence[int] | None = None, dtype: str | None = None) -> None:
        if dtype is None and (given := getattr(data, "dtype", None)) is not None:
            dtype = str(given).removeprefix("torch.")  # torch writes "torch.float32", numpy "float32"
        found, flat = _flattened(plain(data))
        if shape is not None:
            found = _fitting(shape, found, flat)
        object.__setattr__(self, "shape", found)
        object.__setattr__(self, "dtype", dtype := _dtype(flat) if dtype is None else dtype)
        object.__setattr__(self, "data", _elements(flat, dtype))

    def __class_getitem__(cls, shape: object) -> object:
        return Annotated[cls, Shape(shape if isinstance(shape, tuple) else (shape,))]

    def tolist(self) -> object:
        """The data as nested lists; a single number for a tensor of rank 0."""
        rows: list[object] = list(self.data)
        for size in reversed(self.shape[1:]):
            # A size of 0 leaves no data to slice, but the rows around it are still there.
            count = len(rows) // size if size else math.prod(self.shape[: self.shape.index(0)])
            rows = [rows[row * size : (row + 1) * size] for row in range(count)]
        return rows if self.shape else rows[0]

    def to_json(self) -> dict[str, object]:
        """The wire form: shape, dtype and flat data."""
        return {"shape": list(self.shape), "dtype": self.dtype, "data": list(self.data)}

    @classmethod
    def parse(cls, value: object) -> Self:
        """A Tensor from its wire form, from nested lists, from an array, or itself."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            return cls(value)
        if unknown := sorted(str(key)[:40] for key in value if key not in ("shape", "dtype", "data"))[:3]:
            raise ValueError(f"a tensor has shape, dtype and data, not {', '.join(unknown)}")
        if "data" not in value:
            raise ValueError("a tensor without data came")
        return cls(value["data"], shape=value.get("shape"), dtype=value.get("dtype"))

    @classmethod
    def _validated(cls, value: object) -> Self:
        try:
            return cls.parse(value)
        except ValueError as error:
            raise PydanticCustomError("tensor", "{problem}", {"problem": str(error)}) from None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls._validated, serialization=core_schema.plain_serializer_function_ser_schema(cls.to_json)
        )

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        wire = {
            "type": "object",
            "properties": {
                "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}},
                "dtype": {"enum": list(DTYPES)},
                "data": {"type": "array"},
            },
            "required": ["shape", "dtype", "data"],
            "additionalProperties": False,
        }
        if handler.mode == "serialization":
            return wire
        return {"anyOf": [{**wire, "required": ["data"]}, {"type": "array"}, {"type": ["number", "boolean"]}]}


@dataclass(frozen=True)
class Shape:
    """The rule that a Tensor has these sizes; None is any size."""

    sizes: tuple[object, ...]

    def __post_init__(self) -> None:
        for size in self.sizes:
            if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 0):
                raise TypeError(f"Tensor[{size!r}]: a size is a whole number from 0, or None for any")

    def __get_pydantic_core_schema__(self, source: object, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {**handler(schema), "description": f"A tensor of shape {self}."}

    def _check(self, value: Tensor) -> Tensor:
        fits = len(value.shape) == len(self.sizes) and all(
            due is None or due == came for due, came in zip(self.sizes, value.shape, strict=True)
        )
        if not fits:
            raise PydanticCustomError(
                "shape", "shape {due} is due, {came} came", {"due": str(self), "came": _sizes(value.shape)}
            )
        return value

    def __str__(self) -> str:
        return _sizes(self.sizes)


def _sizes(sizes: Sequence[object]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in sizes) + "]"


def _flattened(value: object) -> tuple[tuple[int, ...], list[object]]:
    shape: list[int] = []
    level: list[object] = [value]
    while level and isinstance(level[0], (list, tuple)):
        size = len(level[0])
        if any(not isinstance(row, (list, tuple)) or len(row) != size for row in level):
            raise ValueError(f"the lists at depth {len(shape)} differ in length")
        shape.append(size)
        level = [item for row in level if isinstance(row, (list, tuple)) for item in row]
    return tuple(shape), level


def _fitting(shape: object, found: tuple[int, ...], flat: list[object]) -> tuple[int, ...]:
    # bool is an int to Python, and True in a shape is a mistake
    if not isinstance(shape, (list, tuple)) or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError("a shape is a list of whole numbers from 0")
    due = tuple(shape)
    if len(found) > 1 and due != found:
        raise ValueError(f"the shape is {_sizes(due)}, the nested data has {_sizes(found)}")
    if math.prod(due) != len(flat):
        raise ValueError(f"shape {_sizes(due)} holds {math.prod(due)} values, {len(flat)} came")
    return due


def _dtype(flat: list[object]) -> str:
    kinds = {type(value) for value in flat}
    if kinds == {bool}:
        return "bool"
    return "int64" if kinds == {int} else "float64"


def _elements(flat: list[object], dtype: object) -> tuple[Number, ...]:
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}")
    kind, low, high = DTYPES[dtype]
    if kind is float:
        if any(type(value) not in (int, float) or not _finite(value) for value in flat):
            raise ValueError(f"{dtype} data is finite numbers")
        return tuple(float(value) for value in flat)  # type: ignore[arg-type]  # checked just above
    if any(type(value) is not kind for value in flat):
        raise ValueError(f"{dtype} data is {'true and false' if kind is bool else 'whole numbers'}")
    numbers: tuple[int, ...] = tuple(flat)  # type: ignore[arg-type]  # checked just above
    if numbers and not (low <= min(numbers) and max(numbers) <= high):
        raise ValueError(f"{dtype} data is from {low} to {high}")
    return numbers


def _finite(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]  # a number, by the caller
    except OverflowError:  # an int past the largest double
        return False
