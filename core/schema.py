"""`Schema`, the base of every Input and Output: strict JSON in, compact JSON out, one sentence on refusal."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections.abc import Mapping
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUndefinedAnnotation
from pydantic.fields import FieldInfo
from pydantic_core import SchemaError, from_json

from dspex.core.declare import build, is_program, shown_name
from dspex.core.errors import DefinitionError, InvalidInput
from dspex.core.explain import explain
from dspex.core.variables import Declaration, Module, Variable

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    # The public way to pydantic's metaclass; the private import above is for type checkers only.
    ModelMetaclass = type(BaseModel)

MAX_BODY = 1 << 20
"""The largest body in bytes that is taken; the server's own limit for a message is the same."""

MAX_DEPTH = 64
"""How deeply arrays and objects may nest in a body."""

# A string that never ends takes the rest of the body; possessive, so that no body costs more than one pass.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_AS_ARRAYS = bytes.maketrans(b"{}", b"[]")
_OWN_NAMES = frozenset({"decode", "encode"})
_PYDANTIC_ERRORS = (PydanticUserError, PydanticUndefinedAnnotation, SchemaError, NameError, TypeError)


def check_depth(body: bytes, limit: int = MAX_DEPTH) -> None:
    """Raise InvalidInput when arrays and objects nest deeper than `limit`; mostly the cost of two counts."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return
    # Objects count as arrays, so that one round below takes away one level and not two.
    brackets = _STRING.sub(b"", body).translate(_AS_ARRAYS, _NOT_BRACKETS)
    # Each round takes away the innermost pairs of the whole body at once, in C. What is out of balance
    # stays and is refused here in these words or by the parser in its own: it is not JSON either way.
    for _ in range(limit):
        brackets = brackets.replace(b"[]", b"")
        if not brackets:
            return
    if b"[" in brackets:
        raise InvalidInput(f"the body nests deeper than {limit} levels of arrays and objects")


def _check_names(owner: str, declared: Mapping[str, Declaration], annotations: Mapping[str, object]) -> None:
    for field, declaration in declared.items():
        if field not in annotations:
            remedy = f"write {field}: type = variable(...)"
            raise DefinitionError(owner, field, declaration.default, "a field needs a type", remedy)
    for field in _OWN_NAMES & set(annotations):
        raise DefinitionError(owner, field, field, "Schema itself uses this name", "rename the field")


def _local_types(frame: FrameType | None) -> dict[str, Any]:
    """The types that the code around a class body can see, out to the function that holds it."""
    found: dict[str, Any] = {}
    while frame is not None and frame.f_locals is not frame.f_globals:
        # Types only: a class lives long, and other locals may be large.
        for name, value in frame.f_locals.items():
            if isinstance(value, type) or type(value).__module__ in ("typing", "types", "typing_extensions"):
                found.setdefault(name, value)
        is_class_body = "__qualname__" in frame.f_locals
        frame = frame.f_back if is_class_body else None
    return found


def _culprit(annotations: Mapping[str, Any], namespace: Mapping[str, Any]) -> tuple[str, object]:
    """The field whose type pydantic cannot use, and that type."""
    scope = vars(sys.modules[namespace["__module__"]]) if namespace.get("__module__") in sys.modules else {}
    local = namespace.get("__pydantic_parent_namespace__") or {}
    for name, annotation in annotations.items():
        found = annotation
        try:
            if isinstance(annotation, str):
                found = eval(annotation, dict(scope), dict(local))  # the class's own source, as typing does
            TypeAdapter(found)
        except PydanticSchemaGenerationError:
            return name, found
        except Exception:  # not the error looked for; the original one is reported
            continue
    for name, value in namespace.items():
        if (
            name not in annotations
            and not name.startswith("_")
            and not callable(value)
            and name != "model_config"
        ):
            return name, value
    return "", "the class"


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0].split(". ")[0].rstrip(".")


class SchemaMeta(ModelMetaclass):
    """Puts plain defaults in the place of `variable(...)` and speaks of mistakes as DefinitionError."""

    def __new__(
        mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **options: Any
    ) -> SchemaMeta:
        owner = str(namespace.get("__qualname__", name)).rpartition("<locals>.")[2]
        declared = {field: value for field, value in namespace.items() if isinstance(value, Declaration)}
        annotations = namespace.get("__annotations__", {})
        _check_names(owner, declared, annotations)
        for field, declaration in declared.items():
            # Validated, so that 1 in a float field is 1.0 in every instance and on the wire.
            namespace[field] = Field(
                default=declaration.default, validate_default=True, description=declaration.doc or None
            )
        namespace["__declared__"] = declared
        # pydantic looks for local names in the frame that called it, which would be this function.
        if options.setdefault("__pydantic_reset_parent_namespace__", False) is False:
            namespace.setdefault("__pydantic_parent_namespace__", _local_types(sys._getframe(1)))
        try:
            made = super().__new__(mcs, name, bases, namespace, **options)
        except _PYDANTIC_ERRORS as error:
            field, found = _culprit(annotations, namespace)
            remedy = "use types that have a JSON form, such as str, float, list[str], or dspex.core.types"
            if field and field not in annotations:
                remedy = f"write {field}: type = …, or {field}: ClassVar[…] = …"
            raise DefinitionError(owner, field, found, _first_line(error), remedy) from error
        return cast(SchemaMeta, made)


class Schema(BaseModel, metaclass=SchemaMeta):
    """The typed shape of an Input or Output: immutable, no unknown fields, no NaN.

    A field may have `variable(...)` as its default; its bounds come from the field's type when not given.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        serialize_by_alias=True,  # what is written must be what is read
        hide_input_in_errors=True,  # pydantic's own text may reach a log, and inputs hold prompts
    )

    __declared__: ClassVar[dict[str, Declaration]] = {}
    __variables__: ClassVar[Mapping[str, Variable] | None] = None

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        cls.__variables__ = None
        # A class that waits for a name defined further down is looked at when somebody needs it.
        if cls.__pydantic_complete__:
            field_variables(cls)

    @classmethod
    def decode(cls, body: bytes) -> Self:
        """An instance from strict JSON; raises InvalidInput with one sentence that names the fields."""
        if len(body) > MAX_BODY:
            raise InvalidInput(f"the body has {len(body)} bytes, at most {MAX_BODY} are taken")
        if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
            check_depth(body)
        try:
            # The parser takes NaN and Infinity, which are not JSON, where a field's type lets them pass.
            if b"NaN" in body or b"Infinity" in body:
                from_json(body, allow_inf_nan=False)
            return cast(Self, cls.__pydantic_validator__.validate_json(body, strict=True))
        except ValidationError as error:
            raise InvalidInput(_body_problem(body, error, cls)) from None
        except ValueError as error:
            raise InvalidInput(f"the body is not JSON, which has no NaN or Infinity: {error}") from None

    def encode(self) -> bytes:
        """Compact JSON in UTF-8."""
        return self.__pydantic_serializer__.to_json(self)


def field_declarations(schema: type[Schema]) -> dict[str, Declaration]:
    """The `variable(...)` of every field that has one, inherited ones too, in the order of the fields."""
    found: dict[str, Declaration] = {}
    for base in reversed(schema.__mro__):
        for name in vars(base).get("__annotations__", {}):
            found.pop(name, None)  # a field defined anew without a variable has none
        found.update(vars(base).get("__declared__", {}))
    return {name: found[name] for name in schema.model_fields if name in found}


def field_variables(schema: type[Schema]) -> Mapping[str, Variable]:
    """The variable of every field that has one, without conditions; raises DefinitionError."""
    known = schema.__dict__.get("__variables__")
    if known is not None:
        return known  # type: ignore[no-any-return]  # __dict__ forgets the type
    owner = shown_name(schema)
    found: dict[str, Variable] = {}
    for name, declared in field_declarations(schema).items():
        found[name] = _field_variable(owner, name, declared, schema.model_fields[name])
    schema.__variables__ = MappingProxyType(found)
    return schema.__variables__


def _field_variable(owner: str, name: str, declared: Declaration, field: FieldInfo) -> Variable:
    if is_program(declared.default):
        problem, remedy = "a field cannot select a program", "declare this variable on the program itself"
        raise DefinitionError(owner, name, declared.default, problem, remedy)
    annotated: Any = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    adapter: TypeAdapter[Any] = TypeAdapter(annotated)

    def fit(value: object, what: str) -> Any:
        try:
            return adapter.validate_python(value)
        except ValidationError as error:
            problem = f"{what} does not fit the field's type: {explain(error, BaseModel)}"
            raise DefinitionError(
                owner, name, value, problem, f"choose {what} that the type admits"
            ) from None

    default = fit(declared.default, "the default")
    low, high = _type_bounds(field, default)
    choices = declared.choices
    if choices is None and get_origin(field.annotation) is Literal:
        choices = get_args(field.annotation)
    settled = dataclasses.replace(
        declared,
        default=default,
        choices=None if choices is None else tuple(fit(choice, "a choice") for choice in choices),
        low=low if declared.low is None else fit(declared.low, "low"),
        high=high if declared.high is None else fit(declared.high, "high"),
    )
    variable = build(owner, name, settled)
    assert not isinstance(variable, Module)
    return variable


def _type_bounds(field: FieldInfo, default: object) -> tuple[float | None, float | None]:
    """The lowest and highest value that the type's ge, gt, le, lt admit; None where they say nothing."""
    if isinstance(default, bool) or not isinstance(default, (int, float)):
        return None, None
    low: float | None = None
    high: float | None = None
    whole = isinstance(default, int)
    for rule in field.metadata:
        if (bound := getattr(rule, "ge", None)) is not None:
            low = bound
        if (bound := getattr(rule, "gt", None)) is not None:
            low = bound + 1 if whole else math.nextafter(bound, math.inf)
        if (bound := getattr(rule, "le", None)) is not None:
            high = bound
        if (bound := getattr(rule, "lt", None)) is not None:
            high = bound - 1 if whole else math.nextafter(bound, -math.inf)
    return low, high


def _body_problem(body: bytes, error: ValidationError, model: type[BaseModel]) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    if first["type"] != "json_invalid":
        return explain(error, model)
    if not body.strip():
        return "the body is empty, a JSON object is due"
    try:
        body.decode()
    except UnicodeDecodeError as wrong:
        return f"the body is not UTF-8 (byte {wrong.start})"
    return f"the body is not JSON: {first['ctx']['error']}"
