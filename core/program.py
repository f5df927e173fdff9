"""`Program`, the class people write: typed Input and Output, tunable variables, and a `predict` method."""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import inspect
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, cast

import msgspec
from pydantic import BaseModel, ValidationError

from dspex.core.breaker import Breaker
from dspex.core.declare import shown_name
from dspex.core.definition import Definition, define
from dspex.core.effects import ask_now, call_program, entered, here
from dspex.core.errors import InvalidAssignment, InvalidInput, ProgramFailed
from dspex.core.explain import explain, shown
from dspex.core.retry import Retry
from dspex.core.schema import Schema
from dspex.core.signature import bus_name, check_limits, check_predict, is_abstract, schemas
from dspex.core.space import Assignment, Space, canonical
from dspex.core.variables import JsonScalar

ASYNC_SLOTS = 256
SYNC_SLOTS = 4


class ProgramDescription(msgspec.Struct, frozen=True):
    """What others may know of a program without its code.

    `doc` is the first paragraph of its docstring, the schemas are JSON Schema, `variables` is the space as
    JSON. `fingerprint` is the SHA-256 in hex of name and schemas: equal means "takes and gives the same".
    """

    name: str
    doc: str
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]
    variables: dict[str, Any]
    fingerprint: str


class Program:
    """A typed unit of work with tunable variables.

    A subclass defines `Input`, `Output` (both Schema) and `predict(self, input)`, plain or async; its
    variables are class attributes made by `variable(...)`, its sub-programs are instances of other programs.
    A subclass with none of the three is an abstract base. Mistakes raise DefinitionError when the class is
    defined. An instance holds one assignment for good; `setup` runs once before its first `predict`.
    """

    name: ClassVar[str]
    """The name on the bus: the class name in lower case unless the class says another."""

    timeout: ClassVar[float] = 300.0
    """Seconds that one attempt may take."""

    attempts: ClassVar[int] = 3
    """Deaths of its process, alone in it, after which a task is set aside; twice as many when somebody else may have
    killed the process, eight times as many attempts that were lost for whatever reason."""

    retry: ClassVar[Retry | None] = None
    """Whether and when a task is tried again after predict raised; None: an error is the end."""

    on_change: ClassVar[Literal["fail", "finish", "drain"]] = "fail"
    """What becomes of a task that other code has begun. "fail": it goes on, and fails at the first effect that was
    recorded and is asked for otherwise now. "finish": what was recorded counts, although it is asked for otherwise.
    "drain": it waits for an agent that has the code which began it."""

    drain_time: ClassVar[float] = 3600.0
    """Seconds that a task waits for an agent with the code that it needs, before it fails."""

    concurrency: ClassVar[int | None] = None
    """Tasks at once per agent; None is 256 for an async predict, 4 for a plain one."""

    breakers: ClassVar[Mapping[str, Breaker]] = {}
    """The circuit breakers of calls to other programs, by their names."""

    max_queue: ClassVar[int | None] = 10_000
    """Tasks that may wait in the log; while there are more, an ask or submit is refused with 429. None: no bound."""

    is_async: ClassVar[bool]
    """Whether predict is `async def`."""

    Input: ClassVar[type[Schema]]
    Output: ClassVar[type[Schema]]
    predict: ClassVar[Callable[..., Any]]

    __definition__: ClassVar[Definition | None] = None
    _description: ClassVar[ProgramDescription]

    assignment: Assignment
    """The value of every active variable of this instance."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__definition__ = None
        check_limits(cls)
        if is_abstract(cls):
            define(cls, Program, None)  # its variables are checked here, where their author sees it
            cls.name = cls.__dict__.get("name", cls.__name__.lower())
            return
        cls.name = bus_name(cls)
        takes, gives = schemas(cls)
        cls.is_async = check_predict(cls)
        cls.__definition__ = define(cls, Program, cls.Input)
        cls._description = _describe(cls, cls.__definition__.space, takes, gives)

    def __init__(self, *, assignment: Assignment | None = None, **values: object) -> None:
        """With the default assignment, or with `assignment`, or with values by name on top of either.

        Raises InvalidAssignment. For sub-programs: `Q(assignment=Q.space().assign({"reader.k": 3}))`,
        or an instance as the value: `Q(reader=Reader(k=3))`.
        """
        definition = _definition(type(self))
        for name in values:
            if name not in definition.space.variables and name in self.Input.model_fields:
                problem = f"it is a field of Input, not a variable; write {type(self).__name__}()({name}=…)"
                raise InvalidAssignment(name, values[name], problem)
        self._bind(definition.space.assign(_by_path(definition, values), base=assignment))

    def setup(self) -> None:
        """Load models, build an index: called once per instance before its first predict. Override it."""

    def prepare(self) -> None:
        """Run `setup` of the sub-programs and of this instance, once whoever calls; safe in threads."""
        if self._prepared:
            return
        with self._preparing:
            if self._prepared:
                return
            for child in self._children:
                child.prepare()
            self.setup()
            self._prepared = True

    @classmethod
    def space(cls) -> Space:
        """All variables of the program and of its sub-programs by path."""
        return _definition(cls).space

    @classmethod
    def describe(cls) -> ProgramDescription:
        """Name, doc, JSON Schemas, variables and fingerprint."""
        _definition(cls)
        return cls._description

    @classmethod
    def slots(cls) -> int:
        """How many tasks one agent runs at once."""
        return cls.concurrency or (ASYNC_SLOTS if cls.is_async else SYNC_SLOTS)

    @classmethod
    def to_agent_system(cls, **options: Any) -> Any:
        """A running system of this program, to be entered with `with` or `async with`: see `dspex.System`."""
        # The one way up from core; named, not imported, so that core depends on nothing above it.
        return importlib.import_module("dspex.compose.system").System(cls, **options)

    def with_assignment(self, assignment: Assignment) -> Self:
        """An instance like this one with other values; what its __init__ set is shared, setup runs anew."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._bind(self.space().assign({}, base=assignment))
        return other

    # The results are Any because a class can't name the Output of a subclass that nests it.
    def __call__(self, input: Schema | None = None, /, **fields: object) -> Any:
        """Run in this process and give the Output. Inside a running event loop, a program whose predict is async
        gives something to await instead: `await self.respond(question=…)`.

        Raises InvalidInput, ProgramFailed when predict gives no Output, and whatever predict raises.
        """
        if self.is_async:
            work = self.acall(input, **fields)
            return work if _in_event_loop() else asyncio.run(work)
        checked = self._check_input(input, fields)
        self.prepare()
        with entered(self._place):
            return self.check_output(self.predict(checked))

    async def acall(self, input: Schema | None = None, /, **fields: object) -> Any:
        """Like calling, to be awaited; a predict that is not async runs in a thread."""
        checked = self._check_input(input, fields)
        if not self._prepared:
            await asyncio.to_thread(self.prepare)
        with entered(self._place):
            if self.is_async:
                result = await self.predict(checked)
            else:
                result = await asyncio.to_thread(self.predict, checked)
        if inspect.isawaitable(result):
            result = await result
        return self.check_output(result)

    def sleep(self, seconds: float) -> Any:
        """Wait: `await self.sleep(3600)`, or plain in a plain predict. A long sleep holds no process, no slot and no
        memory, and outlives restarts of everything."""
        scope = here()
        if scope is None:
            return asyncio.sleep(seconds) if _in_event_loop() else time.sleep(seconds)
        work = scope.runtime.sleep(scope.place("sleep"), seconds)
        return work if _in_event_loop() else scope.runtime.wait_in_thread(work)

    def signal(self, name: str, *, timeout: float | None = None) -> Any:
        """Wait for somebody's word: `await self.signal("approval")` gives the value of the next signal of that name
        that was sent to this task, now or before. Raises TimeoutError after `timeout` seconds, if given."""
        scope = here()
        if scope is None:
            raise RuntimeError(f"nobody can send the signal {name!r}: this program runs outside of a system")
        work = scope.runtime.signal(scope.place(f"signal.{name}"), name, timeout)
        return work if _in_event_loop() else scope.runtime.wait_in_thread(work)

    def call(self, program: str, /, **fields: object) -> Any:
        """Run another program of this installation and give its output as JSON values: `await self.call("reader",
        question="…")`. A recorded effect: the other task is started once, whatever crashes, and found again by its key.

        Raises TaskError as the other program's callers get it, BreakerOpen when `breakers` has one for that program and
        it is open. The slot is held meanwhile.
        """
        return call_program(program, fields, self.breakers.get(program))

    def now(self) -> float:
        """The time, in seconds since the epoch. A recorded effect: a run that is resumed or replayed sees it again."""
        found: float = ask_now("now", time.time, float)
        return found

    def new_id(self) -> str:
        """A random id, 32 hex digits. A recorded effect."""
        found: str = ask_now("new_id", lambda: uuid.uuid4().hex, str)
        return found

    def random(self) -> random.Random:
        """A generator of random numbers that gives the same ones whenever this task comes to this place again."""
        scope = here()
        return random.Random() if scope is None else random.Random(scope.runtime.seed(scope.place("random")))

    def decode(self, body: bytes) -> Any:
        """The Input in a body of JSON, with this instance's values where variable fields were not sent."""
        # _bind puts Input.decode itself in this place when there is nothing to fill in.
        return self._fill(self.Input.decode(body))

    def check_output(self, value: object) -> Any:
        """The value if it is an Output, an Output made of it if it fits, else raises ProgramFailed."""
        if isinstance(value, self.Output):
            return value
        needed = shown_name(self.Output)
        fields = value.model_dump() if isinstance(value, BaseModel) else value
        if not isinstance(fields, Mapping):
            gave = "nothing" if value is None else shown(value, texts=False)
            raise ProgramFailed(f"predict gave {gave}, {needed} needs {_fields(self.Output)}")
        try:
            return self.Output.model_validate(fields)
        except ValidationError as error:
            gave, wrong = type(value).__name__, explain(error, self.Output, texts=False)
            raise ProgramFailed(f"predict gave a {gave} that is no {needed}: {wrong}") from None

    def __setattr__(self, name: str, value: object) -> None:
        if name in _definition(type(self)).names and "assignment" in self.__dict__:
            cls = type(self).__name__
            raise AttributeError(
                f"{cls}.{name} is fixed when an instance is made: make a new one, {cls}({name}=…)"
            )
        object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.assignment.to_json().items())})"
        )

    def _bind(self, assignment: Assignment) -> None:
        """Put values, sub-programs and computed values in `__dict__`, so that reading one is cheap."""
        definition = _definition(type(self))
        space, place = definition.space, self.__dict__
        # A variable that is not active reads as its default, so that code which looks at it still works.
        values: dict[str, JsonScalar] = {**space.defaults, **assignment.values}
        for name in definition.plain:
            place[name] = values[name]
        children: list[Program] = []
        for name, module in definition.modules.items():
            chosen = cast(str, values[name])
            program = cast("type[Program]", module.program(chosen))
            children.append(program(assignment=assignment.part(f"{name}.{chosen}.")))
            place[name] = children[-1]
            children[-1].__dict__["_place"] = name
        for name, template in definition.templates.items():
            children.append(cast(Program, template).with_assignment(assignment.part(f"{name}.")))
            place[name] = children[-1]
            children[-1].__dict__["_place"] = name
        if definition.computed:
            resolved = space.evaluate(values)
            place.update({name: resolved[name] for name in definition.computed})
        place.update(_children=tuple(children), _prepared=False, _preparing=threading.RLock())
        place["_filling"] = _filling(definition, assignment)
        place.pop("decode", None)
        # A subclass may have its own decode; only the plain one is replaced by the shorter way.
        if not place["_filling"] and type(self).decode is Program.decode:
            place["decode"] = self.Input.decode
        place["assignment"] = assignment

    def _check_input(self, input: Schema | None, fields: dict[str, object]) -> Schema:
        if input is None:
            try:
                return self._fill(self.Input(**fields))
            except ValidationError as error:
                raise InvalidInput(explain(error, self.Input)) from None
        if fields:
            raise InvalidInput("an Input or its fields are due, both came")
        if not isinstance(input, self.Input):
            raise InvalidInput(f"an instance of {shown_name(self.Input)} is due, {shown(input)} came")
        return self._fill(input)

    def _fill(self, input: Schema) -> Schema:
        sent = input.model_fields_set
        missing = {name: value for name, value in self._filling.items() if name not in sent}
        return input.model_copy(update=missing) if missing else input

    _place: str = ""
    """Where a sub-program stands in the one that holds it."""
    _children: tuple[Program, ...]
    _prepared: bool
    _preparing: threading.RLock
    _filling: dict[str, JsonScalar]


def _definition(cls: type[Program]) -> Definition:
    if cls.__definition__ is None:
        name = cls.__name__
        raise TypeError(
            f"{name} is abstract: it has no Input, Output and predict; use a subclass that defines them"
        )
    return cls.__definition__


def _describe(
    cls: type[Program], space: Space, takes: dict[str, Any], gives: dict[str, Any]
) -> ProgramDescription:
    text = inspect.cleandoc(cls.__dict__.get("__doc__") or "").split("\n\n")[0]
    content = canonical({"name": cls.name, "input": takes, "output": gives})
    fingerprint = hashlib.sha256(content).hexdigest()
    return ProgramDescription(cls.name, " ".join(text.split()), takes, gives, space.to_json(), fingerprint)


def _by_path(definition: Definition, values: Mapping[str, object]) -> dict[str, object]:
    """Values by path; an instance in the place of a sub-program stands for all its values."""
    found: dict[str, object] = {}
    for name, value in values.items():
        if not isinstance(value, Program) or not (name in definition.modules or name in definition.templates):
            found[name] = value
            continue
        prefix = f"{name}."
        if name in definition.modules:
            found[name], prefix = type(value), f"{name}.{value.name}."
        found |= {prefix + path: part for path, part in value.assignment.items()}
    return found


def _filling(definition: Definition, assignment: Assignment) -> dict[str, JsonScalar]:
    """The fields of Input for which the assignment has another value than the field's own default."""
    paths = {name: f"input.{name}" for name in definition.fields}
    defaults = definition.space.defaults
    return {n: assignment[p] for n, p in paths.items() if p in assignment and assignment[p] != defaults[p]}


def _fields(schema: type[Schema]) -> str:
    return ", ".join(list(schema.model_fields)[:8]) or "no fields"


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
