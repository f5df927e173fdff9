"""A fork run dry: on the records that it shares, up to the first effect that would go outside. None is performed."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NoReturn

import msgspec
from msgspec import Struct

from dspex.core.answering import Answering
from dspex.core.effects import Call, outcome_of, recorded
from dspex.core.errors import InvalidInput, TaskError
from dspex.core.events import EffectRecorded, Event, TaskSubmitted
from dspex.core.fork import shared
from dspex.core.lookup import Stopped
from dspex.core.program import Program
from dspex.core.replay import run_on
from dspex.core.request import shown_request

__all__ = ["Changed", "DryReport", "Outside", "dry_run"]

MAX_CHANGED = 100
"""Places with another request that a report names; the rest is left out."""


class Outside(Struct, frozen=True):
    """Where a run would go outside: the place, the effect's name, the request as code would write it, and the line."""

    place: str
    name: str
    request: str
    where: str = ""


class Changed(Struct, frozen=True):
    """A shared place that is asked for otherwise now: both requests as code would write them."""

    place: str
    recorded: str
    asked: str


class DryReport(Struct, frozen=True):
    """What a fork of `parent` at event `at` would do. `performed` is 0, always: it is there to be checked.

    `shared` is how many records it would share, `used` how many of them it asked for, `changed` the places that it asks
    for otherwise than was recorded (the record counts all the same). `outside` is where it would go outside first; when
    it would not, it ended in an `output`, or in an `error`. `slept` are seconds of sleep that were not waited for.
    """

    parent: str
    at: int
    shared: int
    used: int
    performed: int = 0
    changed: list[Changed] = []
    outside: Outside | None = None
    output: Any = None
    error: str = ""
    slept: float = 0.0
    seconds: float = 0.0


async def dry_run(
    program: Program, events: Iterable[Event], parent: str, at: int, body: bytes | None = None
) -> DryReport:
    """Run `program` on the first `at` events of a task, up to the first effect that would go outside. `body` is another
    input. Raises InvalidInput for a version that the task does not have, and for a body that is no Input."""
    story = list(events)
    part = shared(story, parent, at)
    if body is None:
        submitted = next((event.data for event in story if isinstance(event.data, TaskSubmitted)), None)
        if submitted is None:
            raise InvalidInput(f"task {parent} has no submission among its events")
        body = bytes(submitted.input)
    program.decode(body)
    records = {event.data.key: event.data for event in part.records if isinstance(event.data, EffectRecorded)}
    answers = _Dry(records, part.forked.seed, part.forked.life)
    started = time.perf_counter()
    output, error = await run_on(program, body, answers)
    words = "" if error is None else f"{error.type if isinstance(error, TaskError) else type(error).__name__}: {error}"
    return DryReport(
        parent, at, len(records), answers.used, 0, answers.changed[:MAX_CHANGED], answers.outside,
        None if output is None or answers.outside else msgspec.json.decode(output), words, answers.slept,
        round(time.perf_counter() - started, 6),
    )  # fmt: skip


class _Dry(Answering):
    """The `Runtime` of a dry run. What stays in the process is done: the clock, ids. A sleep is over at once."""

    def __init__(self, records: dict[str, EffectRecorded], seed: str, life: int) -> None:
        super().__init__(seed, life)
        self._records = records
        self._lines: dict[str, str] = {}
        self._home = threading.get_ident()
        self.main: asyncio.Task[Any] | None = None
        self.stopped = ""
        self.outside: Outside | None = None
        self.changed: list[Changed] = []
        self.used, self.slept = 0, 0.0
        self._parked: set[asyncio.Task[Any]] = set()

    # -- the Answers port

    def begins(self) -> None:
        """Nobody looks on."""

    def asks(self, key: str, name: str, frame: FrameType) -> None:
        self._lines[key] = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"

    def close(self) -> None:
        for branch in [*self._parked, *([self.main] if self.main else [])]:
            if not branch.done():
                branch.cancel()

    async def perform(self, call: Call) -> Any:
        record = self._take(call.key, call)
        return outcome_of(call, record or await self._leave(call.key, call.name, call.shown))

    def perform_in_thread(self, call: Call) -> Any:
        return outcome_of(call, self._take(call.key, call) or self._stop(call.key, call.name, call.shown))

    def perform_now(self, call: Call, act: Callable[[], Any]) -> Any:
        return outcome_of(call, self._take(call.key, call) or recorded(call, act(), 0.0))

    async def sleep(self, key: str, seconds: float) -> None:
        if self._take(key) is None:
            self.slept += seconds

    async def signal(self, key: str, name: str, timeout: float | None) -> Any:
        record = self._take(key) or await self._leave(key, f"signal.{name}", f"signal({name!r})")
        if record.error:
            raise TimeoutError(*record.arguments)
        return msgspec.json.decode(record.result)

    # -- inside

    def _take(self, key: str, call: Call | None = None) -> EffectRecorded | None:
        if self.stopped:
            raise Stopped(key)  # whatever the program made of being stopped, it gets nothing more
        record = self._records.get(key)
        if record is not None:
            self.used += 1
            if call and record.digest != call.digest:
                self.changed.append(Changed(key, shown_request(record), call.shown))
        return record

    def _stop(self, key: str, name: str, request: str) -> NoReturn:
        self.stopped = key
        self.outside = Outside(key, name, request, self._lines.get(key, ""))
        raise Stopped(key)

    async def _leave(self, key: str, name: str, request: str) -> NoReturn:
        try:
            self._stop(key, name, request)
        except Stopped:
            if threading.get_ident() != self._home:
                raise
        branch = asyncio.current_task()
        assert branch, "a coroutine runs in a task"
        self._parked.add(branch)
        self.close()
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody ends this wait but by cancelling it")
