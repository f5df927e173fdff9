"""Running a task again from its events: every effect is looked up, none is performed, and the first difference is named.

The same bytes come out, or the report says where today's code and the record part: an effect that was not recorded
("added"), one that was recorded and not asked for ("removed"), other arguments, another order, another output.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import msgspec
from msgspec import Struct

from dspex.core.effects import Call, Diverged, begin, branching, outcome_of
from dspex.core.errors import DspexError, InvalidInput, ProgramFailed, TaskError
from dspex.core.events import EffectRecorded, Event, TaskCompleted, TaskFailed
from dspex.core.history import remembered
from dspex.core.program import Program
from dspex.core.task import fold

__all__ = ["Difference", "Report", "replay"]


class Difference(Struct, frozen=True):
    """Where a replay and the record part. `kind` is added, removed, arguments, reordered, output, error or input;
    `place` is the effect's key or the path in the output; `where` the line of the program, when it is known."""

    kind: str
    place: str
    expected: Any
    found: Any
    where: str = ""


class Report(Struct, frozen=True):
    """What a replay found. `performed` is 0, always: it is there to be checked."""

    task: str
    same: bool
    effects: int
    performed: int
    difference: Difference | None = None


async def replay(program: Program, events: Iterable[Event], task: str) -> Report:
    """Run `program` again on the input and the records in a task's events. Raises InvalidInput when they hold no
    submission, and nothing that the program raises: that is compared with how the task ended."""
    story = list(events)
    state = fold(story)
    if state.input is None:
        raise InvalidInput(f"task {task} has no submission among its events")
    memory = remembered(story)
    runtime = _Lookup(list(memory.records.values()), task, memory.life)
    ended: bytes | TaskError | Diverged
    try:
        input = program.decode(bytes(state.input))
        await asyncio.to_thread(program.prepare)
        ended = await _run(program, input, runtime)
    except (TaskError, Diverged) as error:
        ended = error
    difference = runtime.difference or _compare(ended, story) or runtime.unasked()
    return Report(task, difference is None, runtime.asked, 0, difference)


async def _run(program: Program, input: Any, runtime: _Lookup) -> bytes:
    """In a task of its own, so that the run's scope is not left behind in the caller's context."""

    async def work() -> bytes:
        begin(program.name, lambda: runtime)
        if program.is_async:
            value = await program.predict(input)
        else:
            value = await asyncio.to_thread(program.predict, input)
        body: bytes = program.check_output(value).encode()
        return body

    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    loop.set_task_factory(branching)  # branches are numbered as in an agent
    try:
        return await asyncio.Task(work(), loop=loop)
    except (TaskError, Diverged):
        raise
    except Exception as error:
        raise ProgramFailed(str(error), type=type(error).__name__) from error
    finally:
        loop.set_task_factory(before)


class _Lookup:
    """The `Runtime` of a replay."""

    def __init__(self, records: list[EffectRecorded], task: str, life: int) -> None:
        self._life = life
        self._known = {record.key: record for record in records}
        self._task = task
        self._loop = asyncio.get_running_loop()
        self._left: dict[str, list[str]] = {}
        for record in records:
            self._left.setdefault(_branch(record.key), []).append(record.key)
        self.asked = 0
        self.difference: Difference | None = None

    async def perform(self, call: Call) -> Any:
        return self._answer(call)

    def perform_in_thread(self, call: Call) -> Any:
        return self._answer(call)

    def perform_now(self, call: Call, act: Callable[[], Any]) -> Any:
        return self._answer(call)

    async def sleep(self, key: str, seconds: float) -> None:
        self._wait("sleep", key)

    async def signal(self, key: str, name: str, timeout: float | None) -> Any:
        record = self._wait(f"signal.{name}", key)
        if record.error:
            raise TimeoutError(*record.arguments)
        return msgspec.json.decode(record.result)

    def wait_in_thread(self, work: Awaitable[Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(_awaited(work), self._loop).result()

    def _wait(self, name: str, key: str) -> EffectRecorded:
        """A wait is an effect like any other; in a task that has not ended, it may be where the record stops."""
        return self._found(key, name, "")

    async def call(self, program: str, body: bytes, key: str) -> bytes:
        raise AssertionError("a replay performs nothing")

    def seed(self, key: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._task}/{self._life}/{key}".encode()).digest()[:8], "big")

    def unasked(self) -> Difference | None:
        """The first record that nothing asked for."""
        for keys in self._left.values():
            if keys:
                record = self._known[keys[0]]
                return Difference("removed", record.key, record.name, None)
        return None

    def _answer(self, call: Call) -> Any:
        return outcome_of(call, self._found(call.key, call.name, call.digest))

    def _found(self, key: str, name: str, digest: str) -> EffectRecorded:
        record = self._known.get(key)
        left = self._left.get(_branch(key), [])
        if record is None:
            self._part("added", key, None, name)
        elif record.digest != digest:
            elsewhere = any(self._known[other].digest == digest for other in left)
            self._part("reordered" if elsewhere else "arguments", key, record.digest, digest)
        elif not left or left[0] != key:
            self._part("reordered", key, left[0] if left else None, key)
        assert record is not None, "a place without a record has been reported"
        left.pop(0)
        self.asked += 1
        return record

    def _part(self, kind: str, key: str, expected: Any, found: Any) -> None:
        if self.difference is None:
            self.difference = Difference(kind, key, expected, found, _where())
        raise Diverged(kind, key, str(expected), str(found))


async def _awaited(work: Awaitable[Any]) -> Any:
    return await work


def _branch(key: str) -> str:
    """The branch of a key: what stands before the first slash, if it begins with a tilde."""
    return key.partition("/")[0] if key.startswith("~") else ""


def _where() -> str:
    """The innermost line that is not dspex's own, as `file:line in function`."""
    frame = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(("dspex.core", "asyncio", "concurrent", "threading", "uvloop")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def _compare(ended: bytes | TaskError | Diverged, story: list[Event]) -> Difference | None:
    """How today's end differs from the recorded one; None when it does not, or when none is recorded yet."""
    for event in story:
        match event.data:
            case TaskCompleted(output=output):
                if isinstance(ended, DspexError):
                    return Difference("error", "", "an output", f"{type(ended).__name__}: {ended}")
                return difference_of(msgspec.json.decode(output), msgspec.json.decode(ended))
            case TaskFailed(type=kind):
                if isinstance(ended, bytes):
                    return Difference("output", "", kind, msgspec.json.decode(ended))
                found = ended.type if isinstance(ended, TaskError) else type(ended).__name__
                return None if found == kind else Difference("error", "", kind, found)
    return None


def difference_of(expected: Any, found: Any, path: str = "") -> Difference | None:
    """The first place, by path, at which two JSON values differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(expected.keys() | found.keys()):
            inner = difference_of(expected.get(name), found.get(name), f"{path}.{name}".lstrip("."))
            if inner:
                return inner
        return None
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            inner = difference_of(one, other, f"{path}[{number}]")
            if inner:
                return inner
        return None
    same = type(expected) is type(found) and expected == found
    return None if same else Difference("output", path, expected, found)
