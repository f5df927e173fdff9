"""The check of a Program class's interface: Input, Output, `predict`, its bus name and its limits."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from pydantic import ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticUserError
from pydantic.json_schema import JsonSchemaMode

from dspex.core.breaker import Breaker
from dspex.core.declare import shown_name
from dspex.core.errors import DefinitionError
from dspex.core.schema import Schema

ON_CHANGE = ("fail", "finish", "drain")
_BUS_NAME = re.compile(r"[a-z0-9_]{1,64}")


def bus_name(cls: type) -> str:
    """The class's own `name`, or its class name in lower case; raises DefinitionError if it can't be one."""
    own = cls.__dict__.get("name")
    name = cls.__name__.lower() if own is None else own
    if not isinstance(name, str) or not _BUS_NAME.fullmatch(name):
        problem = "a name on the bus is 1 to 64 of the characters a-z, 0-9 and _"
        _refuse(cls, "name", name, problem, 'write name = "…" in the class')
    return name


def check_limits(cls: type) -> None:
    """Raise DefinitionError unless timeout, attempts, concurrency, max_queue and drain_time are numbers that can work,
    on_change is one of its three words, and breakers are some."""
    for field, what, seconds in (("timeout", "a timeout", 300.0), ("drain_time", "a drain_time", 3600.0)):
        value = getattr(cls, field, None)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            _refuse(cls, field, value, f"{what} is a number of seconds above 0", f"write {field} = {seconds}")
    change = getattr(cls, "on_change", None)
    if change not in ON_CHANGE:
        problem = f"what becomes of running tasks is one of {', '.join(ON_CHANGE)}"
        _refuse(cls, "on_change", change, problem, 'write on_change = "fail"')
    for field, example in (("attempts", 3), ("concurrency", 64), ("max_queue", 10_000)):
        value = getattr(cls, field, None)
        if value is None and field != "attempts":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            problem = f"{field} is a whole number, at least 1"
            _refuse(cls, field, value, problem, f"write {field} = {example}")
    breakers = getattr(cls, "breakers", None)
    if not isinstance(breakers, Mapping) or not all(isinstance(each, Breaker) for each in breakers.values()):
        problem = "breakers are Breakers by the names of the programs that are called"
        _refuse(cls, "breakers", breakers, problem, 'write breakers = {"reader": Breaker()}')


def is_abstract(cls: type) -> bool:
    """Whether the class has none of Input, Output, predict; raises DefinitionError when it has only some."""
    missing = [name for name in ("Input", "Output", "predict") if getattr(cls, name, None) is None]
    if missing and len(missing) < 3:
        remedy = f"define {' and '.join(missing)} (an abstract base has none of Input, Output, predict)"
        _refuse(cls, missing[0], "nothing", f"{' and '.join(missing)} missing", remedy)
    return bool(missing)


def schemas(cls: type) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON Schemas of Input and Output; raises DefinitionError for what is not a Schema or has none."""
    return _json_schema(cls, "Input", "validation"), _json_schema(cls, "Output", "serialization")


def check_predict(cls: type) -> bool:
    """Whether `predict` is async; raises DefinitionError unless it takes one Input and gives one Output."""
    predict = inspect.getattr_static(cls, "predict")
    if not inspect.isfunction(predict):
        problem, remedy = "predict is not a plain method", "write def predict(self, input: Input) -> Output"
        _refuse(cls, "predict", predict, problem, remedy)
    if inspect.isasyncgenfunction(predict) or inspect.isgeneratorfunction(predict):
        problem = "predict yields, but a task has one output"
        _refuse(cls, "predict", predict.__name__, problem, "return one Output, drop yield")
    parameters = list(inspect.signature(predict).parameters.values())
    plain = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(plain) != 2 or len(parameters) != 2 or any(p.default is not p.empty for p in plain):
        signature = f"predict({', '.join(str(p) for p in parameters)})"
        problem = "predict takes self and one Input, nothing else"
        _refuse(cls, "predict", signature, problem, "write def predict(self, input: Input) -> Output")
    _check_annotations(cls, predict, plain[1].name)
    return inspect.iscoroutinefunction(predict)


def _check_annotations(cls: Any, predict: Any, parameter: str) -> None:
    annotations = predict.__annotations__
    takes, gives = (_evaluated(cls, predict, annotations.get(name)) for name in (parameter, "return"))
    if isinstance(takes, type) and takes is not object and not issubclass(cls.Input, takes):
        problem = f"predict takes {shown_name(takes)}, the class's Input is {shown_name(cls.Input)}"
        _refuse(cls, "predict", takes, problem, f"annotate {parameter}: Input")
    if gives is None or gives is Any:
        if "return" in annotations and gives is None and annotations["return"] in (None, "None"):
            problem = "predict is annotated to return None"
            _refuse(cls, "predict", None, problem, "return an Output and annotate -> Output")
        return
    if not isinstance(gives, type) or not issubclass(gives, cls.Output):
        shown = shown_name(gives) if isinstance(gives, type) else str(gives)
        problem = f"predict is annotated to return {shown}, the class's Output is {shown_name(cls.Output)}"
        _refuse(cls, "predict", gives, problem, "return an Output and annotate -> Output")


def _evaluated(cls: type, predict: Any, annotation: object) -> object:
    """What an annotation means; None when it can't be known here (a name that is defined later)."""
    if not isinstance(annotation, str):
        return annotation
    scope = dict(vars(sys.modules[predict.__module__])) if predict.__module__ in sys.modules else {}
    members = {name: getattr(cls, name) for name in ("Input", "Output")}
    try:
        # The class's own source text, evaluated as typing.get_type_hints would if the class existed already.
        found: object = eval(annotation, scope, {**members, cls.__name__: cls})
    except Exception:
        return None
    return found


def _json_schema(cls: Any, which: str, mode: JsonSchemaMode) -> dict[str, Any]:
    schema = getattr(cls, which)
    if not isinstance(schema, type) or not issubclass(schema, Schema):
        problem = f"{which} is not a subclass of Schema"
        _refuse(cls, which, schema, problem, f"write class {which}(Schema): …")
    try:
        if not schema.__pydantic_complete__:
            schema.model_rebuild()
        return schema.model_json_schema(mode=mode)
    except PydanticInvalidForJsonSchema as error:
        field = _field_without_schema(schema, mode)
        remedy = f"give {f'field {field}' if field else 'its fields'} a type that has a JSON form"
        problem = f"{which} has no JSON Schema: {str(error).splitlines()[0]}"
        _refuse(cls, f"{which}.{field}" if field else which, schema, problem, remedy)
    except (PydanticUserError, NameError, ValidationError) as error:
        problem = f"{which} is not complete: {str(error).splitlines()[0].rstrip('.')}"
        _refuse(cls, which, schema, problem, "define the types it names before the program")


def _field_without_schema(schema: type[Schema], mode: JsonSchemaMode) -> str:
    from pydantic import TypeAdapter

    for name, field in schema.model_fields.items():
        try:
            TypeAdapter(field.annotation or object).json_schema(mode=mode)
        except PydanticUserError:
            return name
    return ""


def _refuse(cls: type, field: str, value: object, problem: str, remedy: str) -> NoReturn:
    raise DefinitionError(shown_name(cls), field, value, problem, remedy)
