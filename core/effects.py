"""Effects: what a program asks of the outside world, known by its place, so that a second run finds what the first
recorded.

A place is the path of the module that asks, the name of the effect and how often it was asked there before. Parallel
branches get a place of their own when they are started, so that the order in which they finish changes nothing. What is
done with a request (perform and record it, or only look it up) is decided by the `Runtime` of the run.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib
import inspect
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Any, Generic, ParamSpec, Protocol, Self, TypeVar, cast, overload

import msgspec
from msgspec import Raw
from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from dspex.core.breaker import Breaker
from dspex.core.errors import DspexError, EffectFailed
from dspex.core.events import EffectRecorded
from dspex.core.request import as_code, places_of, request_of
from dspex.core.retry import Retry
from dspex.core.spending import Cost, Spent, cost_of

__all__ = [
    "Call", "Diverged", "Effect", "Lasting", "Performing", "Runtime", "Scope", "ask_now", "begin", "branching",
    "call_program", "cancelled", "effect", "entered", "failed", "here", "idempotency_key", "outcome_of", "recorded",
    "spend", "time_left", "unseen", "when_cut",
]  # fmt: skip

MAX_WORDS = 1000
"""Characters of an exception's arguments that are recorded."""
P = ParamSpec("P")
R = TypeVar("R")


class Scope:
    """One branch of a run: what was asked in it so far.

    `path` is "" for the main branch, `~0~2/` for nested ones. The run's runtime is made when it is first needed,
    because most programs ask for nothing. `live` are the tasks of all branches of the run that have not ended.
    """

    # Set on the class, not in each instance: every task has a scope, and few ask it for anything.
    path = ""
    branches = 0
    _runtime: Runtime | None = None
    _counts: dict[str, int] | None = None
    _live: set[asyncio.Task[Any]] | None = None

    def __init__(self, program: str, make: Callable[[], Runtime]) -> None:
        self.program, self._make = program, make

    @property
    def scope(self) -> Scope:
        return self

    @property
    def live(self) -> set[asyncio.Task[Any]]:
        if self._live is None:
            self._live = set()
        return self._live

    @property
    def runtime(self) -> Runtime:
        if self._runtime is None:
            self._runtime = self._make()
        return self._runtime

    def branch(self) -> Self:
        """A branch that starts now."""
        number, self.branches = self.branches, self.branches + 1
        branch = type(self)(self.program, lambda: self.runtime)
        branch.path = f"{self.path.rstrip('/')}~{number}/"
        branch._live = self.live
        return branch

    def place(self, name: str) -> str:
        """The place of the next request of this name here: `~0/qabot.reader.fetch#2`."""
        place = f"{self.path}{self.program}{_module.get()}.{name}"
        counts = self._counts
        if counts is None:
            counts = self._counts = {}
        number = counts.get(place, 0)
        counts[place] = number + 1
        return f"{place}#{number}"


class Call(msgspec.Struct, frozen=True):
    """One request for an effect. `act` performs it; `adapter` gives its result a form in JSON and back.

    `outside` says that it leaves the process, so that everything it depends on must be on disk before; `read_only` that
    it changes nothing there, so that it may be done again and need not wait; `private` that its record is sealed.
    """

    key: str
    name: str
    digest: str
    act: Callable[[], Awaitable[Any]]
    adapter: TypeAdapter[Any]
    outside: bool = True
    read_only: bool = False
    request: bytes = b"null"
    private: bool = False
    arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    retry: Retry | None = None
    breaker: Breaker | None = None
    plain: Callable[[], Any] | None = None
    cost: Cost | None = None
    """The most that it may cost; None: nothing."""

    @property
    def shown(self) -> str:
        """The request as code would write it, in a line: `step('t1', n=2)`."""
        if self.arguments is None:
            return f"{self.name}()"
        return as_code(self.name, *self.arguments)


class Runtime(Protocol):
    """What answers the requests of one run."""

    async def perform(self, call: Call) -> Any:
        """The result of the effect, performed or looked up. Raises what the effect raised, the same each time."""

    def perform_in_thread(self, call: Call) -> Any:
        """The same, for a program that runs in a thread: blocks it."""

    def perform_now(self, call: Call, act: Callable[[], Any]) -> Any:
        """The result of an effect that stays in the process and takes no time."""

    async def sleep(self, key: str, seconds: float) -> None:
        """Return when the time is over. A long sleep ends this process's part in the run."""

    async def signal(self, key: str, name: str, timeout: float | None) -> Any:
        """The value of the next signal of this name. Raises TimeoutError."""

    def wait_in_thread(self, work: Awaitable[Any]) -> Any:
        """Wait for one of the two above, for a program that runs in a thread."""

    async def call(self, program: str, body: bytes, key: str) -> bytes:
        """Run another program as the task that `key` names, and give its output. Raises TaskError."""

    def seed(self, key: str) -> int:
        """A number that is the same whenever this task comes to this place."""


_scope: ContextVar[Scoped | None] = ContextVar("dspex_scope", default=None)
_module: ContextVar[str] = ContextVar("dspex_module", default="")


class Scoped(Protocol):
    """What has a scope: a scope itself, or a run that makes its own when it is asked. None: what is done here is no
    part of a program."""

    @property
    def scope(self) -> Scope | None: ...


def begin(run: Scoped) -> None:
    """Make what follows in this context part of a run."""
    _scope.set(run)


def here() -> Scope | None:
    """The branch of the run that this code is part of; None outside of one."""
    run = _scope.get()
    return None if run is None else run.scope


@contextmanager
def entered(segment: str) -> Iterator[None]:
    """Make what follows part of the module `segment` of the present one."""
    if not segment:
        yield
        return
    token = _module.set(f"{_module.get()}.{segment}")
    try:
        yield
    finally:
        _module.reset(token)


def branching(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """A task factory: a task that is started inside a run is a branch of its own, numbered when it is started."""
    given = options.pop("context", None)
    run: Scoped | None = _scope.get() if given is None else given.get(_scope)
    scope = None if run is None else run.scope
    if scope is None:
        return asyncio.Task(coroutine, loop=loop, context=given, **options)
    context = given or copy_context()
    context.run(_scope.set, scope.branch())
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, context=context, **options)
    scope.live.add(task)
    task.add_done_callback(scope.live.discard)
    return task


@contextmanager
def unseen() -> Iterator[None]:
    """What is done in here is no part of the program: it takes no places and starts no branches, for it is not done
    again when the run is."""
    token = _scope.set(None)
    try:
        yield
    finally:
        _scope.reset(token)


class Lasting(Protocol):
    """What takes time, and may be stopped before it ends."""

    @property
    def over(self) -> bool:
        """Whether it was stopped."""

    @property
    def left(self) -> float:
        """Seconds that it may still take."""


class Performing:
    """`with Performing(…):` one effect is performed. What it does is part of it: effects inside of it are not recorded
    themselves, and it has an idempotency key, made of the task's `life` and the effect's `place`."""

    __slots__ = ("_closers", "_life", "_place", "_run", "_token", "cut", "spent")
    scope = None

    def __init__(self, life: str, place: str, run: Lasting | None = None) -> None:
        self._life, self._place, self._run = life, place, run
        self._closers: list[Callable[[], None]] = []
        self.spent: Spent | None = None
        self.cut = False
        """Nobody waits for it any more."""

    def __enter__(self) -> Self:
        self._token = _scope.set(self)
        return self

    @property
    def over(self) -> bool:
        return self.cut or (self._run is not None and self._run.over)

    @property
    def left(self) -> float:
        return math.inf if self._run is None else self._run.left

    def stop(self) -> None:
        """Nobody waits for it any more: what it has open is closed."""
        self.cut = True
        for close in list(self._closers):
            with suppress(Exception):
                close()

    def when_cut(self, close: Callable[[], None]) -> None:
        """Have `close` called when nobody waits for the effect any more, by another thread than its own."""
        self._closers.append(close)
        if self.over:
            close()

    def __exit__(self, *raised: object) -> None:
        _scope.reset(self._token)

    @property
    def idempotency_key(self) -> str:
        return hashlib.sha256(f"{self._life}/{self._place}".encode()).hexdigest()[:32]


def idempotency_key() -> str:
    """Inside an effect: a key that is the same whenever this very effect of this task is performed again.

    Give it to the outside (a payment, an API that takes one), so that a repeat after a crash is recognised.
    """
    inside = _scope.get()
    return inside.idempotency_key if isinstance(inside, Performing) else ""


def cancelled() -> bool:
    """Whether what this code is part of is over: its task was cancelled, or its time is up, or nobody waits for its
    effect any more. A plain function, which nothing can stop, looks now and then and returns."""
    inside = _lasting()
    return inside is not None and inside.over


def time_left() -> float:
    """Seconds until the time of the task is up, by its `timeout` and its deadline; infinite outside of a system. For
    the timeouts of what an effect asks outside."""
    inside = _lasting()
    return math.inf if inside is None else max(0.0, inside.left)


def when_cut(close: Callable[[], None]) -> None:
    """Inside an effect: have something closed as soon as nobody waits for the effect any more."""
    inside = _scope.get()
    if isinstance(inside, Performing):
        inside.when_cut(close)


def _lasting() -> Lasting | None:
    inside: object = _scope.get()
    if isinstance(inside, Scope):
        inside = inside.runtime
    return cast(Lasting, inside) if hasattr(inside, "over") else None  # a replay's runtime takes no time


def spend(*, usd: float = 0.0, tokens: int = 0, model: str = "") -> None:
    """Inside an effect: say what it has cost, in dollars and tokens, and which model was asked. Several calls add up.

    An effect that says nothing counts as what its `@effect(usd=…, tokens=…)` allows, also when it raises; `spend()`
    with nothing says that it was free. Outside of a system it does nothing. Raises InvalidInput for what is no cost,
    RuntimeError in a program outside of its effects.
    """
    inside = _scope.get()
    if isinstance(inside, Performing):
        inside.spent = inside.spent or Spent()
        inside.spent.add(usd, tokens, model)
    elif inside is not None:
        raise RuntimeError("spend belongs inside an effect: what a program itself does is done again on every resume")


class Effect(Generic[P, R]):
    """A function whose calls are recorded. Inside a running event loop a call gives something to await, also when the
    function is plain (it then runs in a thread); elsewhere it gives the result."""

    def __init__(
        self, function: Callable[P, Any], name: str | None = None, *, read_only: bool = False,
        hidden: Sequence[str] = (), private: bool = False, retry: Retry | None = None, breaker: Breaker | None = None,
        cost: Cost | None = None,
    ) -> None:  # fmt: skip
        functools.update_wrapper(self, function)
        self.retry, self.breaker, self.cost = retry, breaker, cost
        self._hidden = places_of(function, hidden)
        self.private = private
        self._function = function
        self.name = name or function.__name__
        self.read_only = read_only
        self._is_async = inspect.iscoroutinefunction(function)

    @functools.cached_property
    def adapter(self) -> TypeAdapter[Any]:
        """How the result becomes JSON and back: by the annotation of the function."""
        hints = inspect.get_annotations(self._function, eval_str=True)
        return TypeAdapter(hints.get("return", Any))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        scope, in_loop, name = here(), _in_loop(), self.name
        if scope is None:
            if in_loop and not self._is_async:
                return asyncio.to_thread(self._function, *args, **kwargs)
            result = self._function(*args, **kwargs)
            return result if in_loop or not self._is_async else asyncio.run(result)
        function: Callable[..., Any] = self._function
        key = scope.place(name)
        digest, request = request_of(name, args, kwargs, self._hidden)
        call = Call(
            key=key, name=name, digest=digest, request=request,
            act=lambda: function(*args, **kwargs) if self._is_async else asyncio.to_thread(function, *args, **kwargs),
            adapter=self.adapter, read_only=self.read_only, private=self.private, arguments=(args, kwargs),
            retry=self.retry, breaker=self.breaker, cost=self.cost,
            plain=None if self._is_async else functools.partial(function, *args, **kwargs),
        )  # fmt: skip
        return scope.runtime.perform(call) if in_loop else scope.runtime.perform_in_thread(call)


@overload
def effect(function: Callable[P, Any]) -> Any: ...
@overload
def effect(
    *, name: str | None = None, read_only: bool = False, hidden: Sequence[str] = (), private: bool = False,
    retry: Retry | None = None, breaker: Breaker | None = None, usd: float | None = None, tokens: int | None = None,
    model: str = "",
) -> Callable[[Callable[P, Any]], Any]: ...
def effect(
    function: Callable[P, Any] | None = None, *, name: str | None = None, read_only: bool = False,
    hidden: Sequence[str] = (), private: bool = False, retry: Retry | None = None, breaker: Breaker | None = None,
    usd: float | None = None, tokens: int | None = None, model: str = "",
) -> Any:  # fmt: skip
    """Mark a function or tool as an effect: `@effect` or `@effect(name="charge")`.

    Its result is recorded, so it must have a form in JSON: annotate what it returns. It is performed once per task and
    place, whatever crashes; if the process dies while it is under way, it is performed again with the same
    `idempotency_key()`. `read_only=True` promises that it changes nothing outside: then it does not wait until the log
    has what came before, and the last few of them may be performed again when the process dies.

    The arguments of a call are recorded with its result, up to 16 KiB; `hidden` names parameters whose values are not.
    `private` seals all that is recorded of it with the task's key; in a program with a Private field every effect is
    sealed. Raises DefinitionError for a hidden parameter that the function has not.

    With `retry` one that raises is performed again, later and later, under the same idempotency key; every try is in
    the log, and a crash does not begin the count anew. What it raised the last time is its outcome. With a `breaker` it
    raises BreakerOpen at once when too many of its calls failed lately, in whichever agent of the program that was.

    `usd` and `tokens` are the most that one call may cost: so much of every budget is reserved before it is performed,
    and it raises BudgetExhausted when a budget has not so much left. Inside, `spend` says what it was; `model` names
    the model that it asks. Raises InvalidInput for what is no cost.
    """
    costs = usd is not None or tokens is not None or model
    options: dict[str, Any] = {
        "read_only": read_only, "hidden": hidden, "private": private, "retry": retry, "breaker": breaker,
        "cost": cost_of(usd or 0.0, tokens or 0, model) if costs else None,
    }  # fmt: skip
    if function is None:
        return lambda real: Effect(real, name, **options)
    return Effect(function, name, **options)


def ask_now(name: str, act: Callable[[], Any], kind: Any) -> Any:
    """A small effect that stays in the process (the clock, an id): recorded, but nothing waits for the record."""
    scope = here()
    if scope is None:
        return act()

    async def never() -> Any:
        return act()

    call = Call(key=scope.place(name), name=name, digest=name, act=never, adapter=_adapter(kind), outside=False)
    return scope.runtime.perform_now(call, act)


def call_program(program: str, fields: dict[str, Any], breaker: Breaker | None = None) -> Any:
    """The effect that runs another program: awaitable in an event loop, else blocking."""
    scope = here()
    if scope is None:
        raise RuntimeError(f"nobody runs {program!r}: this program runs outside of a system")
    body = to_json(fields)
    digest, request = request_of(program, (), fields)

    async def act() -> Any:
        return msgspec.json.decode(await scope.runtime.call(program, body, idempotency_key()))

    name = f"call.{program}"
    call = Call(
        key=scope.place(name), name=name, digest=digest, request=request, act=act, adapter=_adapter(Any),
        breaker=breaker,
    )  # fmt: skip
    return scope.runtime.perform(call) if _in_loop() else scope.runtime.perform_in_thread(call)


_adapter = functools.lru_cache(maxsize=64)(TypeAdapter)


def recorded(call: Call, result: Any, seconds: float) -> EffectRecorded:
    """The record of an effect that gave a result. Raises EffectFailed when the result has no form in JSON."""
    try:
        body = call.adapter.serializer.to_json(result, warnings=False)
        msgspec.json.decode(body)
    except Exception as error:
        raise EffectFailed(f"the result of {call.name} cannot be recorded: {error}", name=call.name) from error
    return EffectRecorded(
        key=call.key, name=call.name, digest=call.digest, request=Raw(call.request), result=Raw(body),
        seconds=round(seconds * 1e6) / 1e6,
    )  # fmt: skip


def failed(call: Call, error: BaseException, seconds: float) -> EffectRecorded:
    """The record of an effect that raised."""
    kind = type(error)
    return EffectRecorded(
        key=call.key, name=call.name, digest=call.digest, request=Raw(call.request),
        error=f"{kind.__module__}:{kind.__qualname__}", arguments=_arguments(error), seconds=round(seconds * 1e6) / 1e6,
    )  # fmt: skip


def _arguments(error: BaseException) -> list[Any]:
    """The arguments of an exception as JSON keeps them, or its words when they are no plain values."""
    given: Sequence[object] = error.args
    try:
        if all(isinstance(value, (str, int, float, bool, type(None))) for value in given):
            body = msgspec.json.encode(given)
            kept: list[Any] = msgspec.json.decode(body)
            # A value that JSON changes (nan) would be another on the second run; the words are always the same.
            if len(body) < MAX_WORDS and kept == list(given):
                return kept
    except (ValueError, OverflowError, msgspec.MsgspecError):
        pass  # half of a surrogate pair, an integer beyond 64 bits
    try:
        words = str(error)
    except Exception:
        words = "its words cannot be read"
    return [words[:MAX_WORDS].encode("utf-8", "backslashreplace").decode()]


def outcome_of(call: Call, record: EffectRecorded) -> Any:
    """What a record gives to the program: its result, or its exception raised again.

    The first run gets its result through here, too, so that no run sees anything another does not.
    """
    if record.error:
        raise _exception(record)
    try:
        return call.adapter.validator.validate_json(bytes(record.result))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise EffectFailed(f"{call.name} gave what its annotation does not allow: {first}", name=call.name) from None


def _exception(record: EffectRecorded) -> Exception:
    """The exception of a record, as its own class when that can be made from a message, else EffectFailed."""
    module, _, name = record.error.partition(":")
    try:
        kind: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        if isinstance(kind, type) and issubclass(kind, Exception):
            made: Exception = kind(*record.arguments)
            if isinstance(made, EffectFailed):
                made.name = record.name
            return made
    except Exception:
        pass
    words = ", ".join(map(str, record.arguments))
    return EffectFailed(f"{record.name} raised {name}: {words}", name=record.name)


class Diverged(DspexError):
    """Today's code does not ask what was recorded. Fields: `kind` (added, removed, arguments), `key`, `expected`,
    `found`."""

    def __init__(self, kind: str, key: str, expected: str, found: str) -> None:
        self.kind, self.key, self.expected, self.found = kind, key, expected, found
        super().__init__(f"at {key}: {expected} was recorded, {found} was asked")


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
