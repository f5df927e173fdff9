"""The `Runtime` of a replay: answers every request from the records, and finds where code and record part."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Container, Iterator
from types import FrameType
from typing import Any, NoReturn, Protocol, cast

import msgspec
from msgspec import Struct

from dspex.core.answering import Answering
from dspex.core.effects import Call, Runtime, Scope, outcome_of
from dspex.core.events import EffectRecorded
from dspex.core.request import shown_request

__all__ = ["Answers", "Difference", "Lookup", "Parted", "Stopped", "Traced", "Watch"]

QUIET, LONG = 0.03, 2.0
"""Seconds without a request after which a run that waits at the end of its record is over; and when some of the record
has not been asked for."""


class Difference(Struct, frozen=True):
    """Where a replay and the record part. `kind` is added, removed, arguments, reordered, output or error; `place` is
    the effect's key or the path in the output; `where` the line of the program, when it is known."""

    kind: str
    place: str
    expected: Any
    found: Any
    where: str = ""


class Parted(BaseException):
    """The code asks for what the record cannot answer; not an Exception, so that no program catches it as its own."""


class Stopped(BaseException):
    """The record of a task that has not ended stops here."""


class Watch(Protocol):
    """Somebody who looks on while a program is replayed, in the thread that runs it."""

    def begins(self) -> None:
        """The program is about to run."""

    def asked(self, key: str, name: str, frame: FrameType) -> None:
        """It asks for an effect; `frame` is the line that asks."""


class Answers(Runtime, Protocol):
    """A `Runtime` that performs nothing, for one run. `main` is the run's own task, `stopped` the place at which it was
    stopped, if it was."""

    main: asyncio.Task[Any] | None
    stopped: str

    def begins(self) -> None:
        """The program is about to run."""

    def asks(self, key: str, name: str, frame: FrameType) -> None:
        """It asks for an effect; `frame` is the line that asks."""

    def close(self) -> None:
        """The run is over."""


class Traced(Scope):
    """A branch that notes which line of the program asks at each place."""

    def place(self, name: str) -> str:
        key = super().place(name)
        frame: FrameType | None = sys._getframe(1)
        while frame and str(frame.f_globals.get("__name__", "")).startswith(("dspex.core.", "functools", "contextlib")):
            frame = frame.f_back
        if frame is not None:
            cast(Answers, self.runtime).asks(key, name, frame)
        return key


class _First(Struct):
    """The first request that the record does not answer as it stands."""

    kind: str
    key: str
    name: str
    shown: str
    expected: EffectRecorded | None
    where: str


class _Branch:
    """The records of one branch. Requests that are under way together may have been recorded in any order; one that is
    asked before its time is one whose forerunners have not even been asked for."""

    __slots__ = ("_front", "_old", "_order", "_places", "left")

    def __init__(self, records: list[EffectRecorded], old: set[str]) -> None:
        self._order, self._old, self._front = records, old, 0
        self._places = {record.key: number for number, record in enumerate(records)}
        self.left = {record.key: record for record in records}

    def due(self, key: str, asked: Container[str]) -> bool:
        """Whether everything recorded before `key` has been asked for."""
        number = self._places.get(key)
        if number is None:
            return False
        self._advance(asked)
        return number < self._front

    def first(self, asked: Container[str]) -> EffectRecorded | None:
        """The first record that nobody has asked for."""
        self._advance(asked)
        return self._order[self._front] if self._front < len(self._order) else None

    def needed(self) -> Iterator[EffectRecorded]:
        """What is left and must be asked for."""
        return (record for record in self.left.values() if record.key not in self._old)

    def _advance(self, asked: Container[str]) -> None:
        while self._front < len(self._order):
            key = self._order[self._front].key
            if key not in asked and key not in self._old:
                return
            self._front += 1


class Lookup(Answering):
    """Answers from `records`, in their order within each branch. `old` are the keys of attempts that failed: they may
    be asked for, and need not be. Those of `shared` may be asked for otherwise, too. `ended` says that the record is
    whole; `seed` and `life` are what random numbers come from."""

    def __init__(
        self, records: list[EffectRecorded], seed: str, life: int, old: set[str], shared: set[str], *, ended: bool,
        strict: bool, watch: Watch | None,
    ) -> None:  # fmt: skip
        super().__init__(seed, life)
        self._old, self._shared = old, shared
        self._ended, self._strict, self._watch = ended, strict, watch
        parts: dict[str, list[EffectRecorded]] = {}
        for record in records:
            parts.setdefault(_branch(record.key), []).append(record)
        self._branches = {path: _Branch(part, old) for path, part in parts.items()}
        self._lines: dict[str, tuple[str, int, str]] = {}
        self._home = threading.get_ident()
        self._first: _First | None = None
        self._after: set[tuple[str, str]] = set()
        self._parked: set[asyncio.Task[Any]] = set()
        self._waiter: asyncio.Task[None] | None = None
        self._cut = False
        self.main: asyncio.Task[Any] | None = None
        self.asked = 0
        self.stopped = ""
        self.parted: Parted | None = None

    # -- looking on

    def begins(self) -> None:
        if self._watch:
            self._watch.begins()

    def asks(self, key: str, name: str, frame: FrameType) -> None:
        self._lines[key] = (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        if self._watch:
            self._watch.asked(key, name, frame)

    # -- the Runtime port

    async def perform(self, call: Call) -> Any:
        record = self._take(call.key, call.name, call.digest, call.shown)
        return outcome_of(call, record or await self._park(call.key))

    def perform_in_thread(self, call: Call) -> Any:
        return self.perform_now(call, lambda: None)

    def perform_now(self, call: Call, act: Callable[[], Any]) -> Any:
        record = self._take(call.key, call.name, call.digest, call.shown)
        return outcome_of(call, record or self._stop(call.key))

    async def sleep(self, key: str, seconds: float) -> None:
        if self._take(key, "sleep", "", f"sleep({seconds})") is None:
            await self._park(key)

    async def signal(self, key: str, name: str, timeout: float | None) -> Any:
        record = self._take(key, f"signal.{name}", "", f"signal({name!r})") or await self._park(key)
        if record.error:
            raise TimeoutError(*record.arguments)
        return msgspec.json.decode(record.result)

    # -- what was found

    def difference(self) -> Difference | None:
        """The first difference in what was asked for, named by what came after it."""
        first = self._first
        if first is None:
            return None
        expected, kind, place = first.expected, first.kind, first.key
        later = expected is not None and (expected.name, expected.digest) in self._after
        if kind == "reordered" and expected and not self._strict and not later:
            return Difference("removed", expected.key, shown_request(expected), None, first.where)
        if kind == "arguments" and later:
            kind = "added"
        return Difference(kind, place, shown_request(expected) if expected else None, first.shown, first.where)

    def unasked(self) -> Difference | None:
        """The first record that nothing asked for."""
        for branch in self._branches.values() if not self._cut else ():
            for record in branch.needed():
                return Difference("removed", record.key, shown_request(record), None)
        return None

    # -- inside

    def _take(self, key: str, name: str, digest: str, shown: str) -> EffectRecorded | None:
        """The record of a request; None when the record stops before it."""
        path = _branch(key)
        branch = self._branches.get(path) or self._branches.setdefault(path, _Branch([], self._old))
        if self._first:
            self._after.add((name, digest))
        elif (known := branch.left.get(key)) and self._fits(known, digest) and branch.due(key, self._lines):
            self.asked += 1
            return branch.left.pop(key)
        elif not self._ended and key not in branch.left and next(branch.needed(), None) is None:
            return None
        record = self._guess(branch, key, name, digest, shown)
        if record is None or self._strict:
            # The key stays in the words, so that a traceback tells it.
            self.parted = self.parted or Parted(f"at {key}: {shown} was not recorded so")
            raise self.parted
        return branch.left.pop(record.key)

    def _fits(self, record: EffectRecorded, digest: str) -> bool:
        return record.digest == digest or record.key in self._shared

    def _guess(self, branch: _Branch, key: str, name: str, digest: str, shown: str) -> EffectRecorded | None:
        """Note the first difference; a record that may answer all the same, to see what comes after it."""
        left = branch.left
        here = left.get(key)
        same = (record for record in left.values() if (record.name, record.digest) == (name, digest))
        moved = here if here and here.digest == digest else next(same, None)
        here = here if here and here.name == name else None
        if self._first is None:
            kind = "reordered" if moved else "arguments" if here else "added"
            expected = here if kind == "arguments" else branch.first(self._lines.keys() - {key})
            file, line, function = self._lines.get(key, ("", 0, ""))
            where = f"{file}:{line} in {function}" if file else ""
            self._first = _First(kind, key, name, shown or name, expected, where)
        return moved or here

    def _stop(self, key: str) -> NoReturn:
        self.stopped = self.stopped or key
        self._cut = True
        raise Stopped(key)

    async def _park(self, key: str) -> NoReturn:
        """Wait here for good: other branches may still have records."""
        if threading.get_ident() != self._home:
            self._stop(key)
        self.stopped = self.stopped or key
        branch = asyncio.current_task()
        assert branch, "a coroutine runs in a task"
        self._parked.add(branch)
        if self._waiter is None:
            self._waiter = asyncio.Task(self._wait_for_quiet(), loop=asyncio.get_running_loop())
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nobody ends this wait but by cancelling it")

    async def _wait_for_quiet(self) -> None:
        waited, before = 0.0, -1
        while before != self.asked or (waited < LONG and self.unasked()):
            before = self.asked
            await asyncio.sleep(QUIET)
            waited += QUIET
        self.close()

    def close(self) -> None:
        """End every branch that waits, and the run with them."""
        for branch in [*self._parked, *([self.main] if self.main else [])]:
            if not branch.done():
                branch.cancel()


def _branch(key: str) -> str:
    """The branch of a key: what stands before the first slash, if it begins with a tilde."""
    return key.partition("/")[0] if key.startswith("~") else ""
