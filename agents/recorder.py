"""The effects of one attempt: looked up when they were recorded before, performed and recorded when not.

Records are written behind the program, one append under way at a time, and what comes meanwhile goes into the next. But
nothing leaves the process before everything it may depend on is in the log: the claim first of all, then every earlier
record. So a task that goes on elsewhere finds all that was done, and at most the effects under way are done again.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import msgspec
from msgspec.structs import replace

from dspex.agents import logtime
from dspex.agents.breakers import Breakers
from dspex.agents.writer import MAX_COMMIT, Writer, Writing
from dspex.core.effects import Call, Diverged, Performing, failed, outcome_of, recorded, unseen
from dspex.core.errors import BreakerOpen, BudgetExhausted, EffectFailed, LimitExceeded, ProgramFailed
from dspex.core.events import (
    EffectRecorded,
    EffectRetried,
    Event,
    Interrupted,
    Payload,
    SignalReceived,
    TaskSleeping,
    Usage,
)
from dspex.core.history import remembered
from dspex.core.request import shown_request
from dspex.core.spending import Cost, usage_of

__all__ = ["Attempt", "Recorder", "Renewing", "Reserved", "Suspended"]

logger = logging.getLogger("dspex.agents")

MAX_RECORDS = 100_000
"""Effects that one task may have."""
QUIET = 0.005
"""Seconds without an effect under way after which a run is put to sleep, when all of its branches wait."""
LINGER = 0.25
"""The same when some branches do not wait: they may be computing, or wait for other branches."""
SHORT = 1.5
"""Seconds that are slept in the process; more are slept in the log."""
LOOK = 1.0
"""Seconds after which a branch that waits beside busy ones looks whether its signal has come."""
MAX_WAIT = 100 * 365 * 86_400.0
"""Seconds that a sleep or a wait may take."""


_NOT_CALLED = f"{BreakerOpen.__module__}:{BreakerOpen.__qualname__}"


class Suspended(BaseException):
    """The run ends here: the task waits for what may take long, or it cannot go on in this process. Not an Exception,
    so that no program takes it for one of its own."""


class Renewing(Exception):
    """A budget is used up, and whoever meets it waits until it renews at `until` (seconds since the epoch)."""

    def __init__(self, until: float) -> None:
        super().__init__(until)
        self.until = until


class Reserved(Protocol):
    """What is reserved of all budgets for one effect."""

    def settle(self, usage: Usage) -> None:
        """The effect is over and has cost this; the rest is free again."""


class Attempt(Writing, Protocol):
    """What the recorder needs to know and do about the attempt it records."""

    @property
    def limit(self) -> int:
        """The most bytes that one result may have."""

    @property
    def branches(self) -> set[asyncio.Task[Any]]:
        """The branches of the run that have not ended, without the main one."""

    @property
    def breakers(self) -> Breakers:
        """What decides whether an effect with a circuit breaker is performed now."""

    suspended: bool
    deadline: float | None
    """When the task must be done, in seconds since the epoch."""

    @property
    def over(self) -> bool:
        """Whether the run was stopped."""

    @property
    def left(self) -> float:
        """Seconds that the run may still take."""

    @property
    def lenient(self) -> bool:
        """Whether a record counts although the code asks for it otherwise now."""

    async def signals(self, name: str) -> list[SignalReceived]:
        """The signals of a name that have reached the task, in the order of their positions."""

    async def call(self, program: str, body: bytes, key: str) -> bytes:
        """Run another program and give its output. Raises TaskError."""

    def seal_effect(self, place: str) -> None:
        """Have the record of the effect at a place sealed."""

    async def reserve(self, cost: Cost, read_only: bool) -> Reserved:
        """Reserve what an effect may cost of every budget that it counts to. Raises BudgetExhausted, Renewing."""

    def charge(self, usage: Usage) -> None:
        """An effect has cost what nobody had said before."""

    def suspend(self) -> None:
        """End the program's run here; what it waits for is in `waits` of the recorder."""


class Recorder:
    """The `Runtime` of an attempt. `history` are the records of the attempts before it.

    `broken` is what made it stop (LogError, Superseded, Diverged), whatever the program has made of that; `closed` says
    that the run is over, and that what is still asked comes from a branch that was left behind.
    """

    def __init__(self, attempt: Attempt, history: Iterable[Event], loop: asyncio.AbstractEventLoop) -> None:
        self._attempt, self._loop = attempt, loop
        memory = remembered(history)
        self._known, self._until, self._shared = memory.records, memory.until, memory.shared
        self._tries, self._raised = memory.tries, dict[str, BaseException]()
        self._in_flight: dict[str, tuple[str, Performing]] = {}
        self._asked: set[Future[Any]] = set()
        self._life = f"{memory.keys or attempt.id}/{memory.life}"
        self._seed = f"{memory.seed or attempt.id}/{memory.life}"
        self.writer = Writer(attempt, loop, self._lose)
        self._under_way = 0
        self._active = loop.time()
        self._parked: set[asyncio.Task[Any]] = set()
        self.waits: dict[str, TaskSleeping] = {}
        self.broken: BaseException | None = None
        self.closed = False

    @property
    def over(self) -> bool:
        return self.closed or self._attempt.over

    @property
    def left(self) -> float:
        return self._attempt.left

    # -- the Runtime port

    async def perform(self, call: Call) -> Any:
        """Look the effect up, or perform and record it."""
        self._check_loop()
        record = self._look_up(call)
        if record is None:
            record = await (self._do_until_done(call) if call.retry else self._perform(call))
            self._check()
            self._note(record)
            if call.outside:
                self.writer.write_soon()
        return outcome_of(call, record)

    def _perform(self, call: Call) -> Coroutine[Any, Any, EffectRecorded]:
        return self._pay(call) if call.cost else self._do(call)

    async def _do(self, call: Call) -> EffectRecorded:
        """Perform an effect, with everything it may depend on in the log, and say what it has cost."""
        self._under_way += 1
        performing = Performing(self._life, call.key, self._attempt)
        try:
            with performing:
                refused = self._attempt.breakers.refusal(call) if call.breaker else None
                if refused is not None:
                    await asyncio.sleep(0)  # a program that tries again at once must leave the loop to others
                    return self._failed(call, refused, 0.0)
                # What may be done again need not wait, within a bound.
                if call.outside and not (call.read_only and self.writer.size < MAX_COMMIT):
                    try:
                        await self.writer.flush()
                    except Exception as error:
                        self._break(error)
                    self._check()
                if not call.read_only:
                    self._in_flight[call.key] = call.name, performing
                record = await self._act(call)
                called = not (call.breaker and record.error == _NOT_CALLED)
                usage = usage_of(call.cost, performing.spent, call.read_only) if called else None
        except asyncio.CancelledError:
            performing.stop()
            raise
        finally:
            self._in_flight.pop(call.key, None)
            self._under_way -= 1
            self._active = self._loop.time()
        if usage and not call.cost:
            self._attempt.charge(usage)
        return replace(record, usage=usage) if usage else record

    async def _pay(self, call: Call) -> EffectRecorded:
        """Perform an effect with what it may cost reserved. A budget that is used up is what it raised, or is waited
        for. However it is cut off, it may have been paid."""
        assert call.cost
        while True:
            try:
                with self._busy(), unseen():
                    reserved = await self._attempt.reserve(call.cost, call.read_only)
                break
            except BudgetExhausted as error:
                return self._failed(call, error, 0.0)
            except Renewing as wait:
                until = wait.until
            await self._park(TaskSleeping(key=call.key, until=until))
            self._check()
        usage = usage_of(call.cost, None, call.read_only)
        try:
            record = await self._do(call)
            usage = record.usage or None
        finally:
            reserved.settle(usage or Usage())
        return record

    async def _do_until_done(self, call: Call) -> EffectRecorded:
        """Perform an effect as often as its policy says. The tries before, by whatever attempt, count."""
        while True:
            while (until := self._until.get(call.key) or 0.0) - logtime.now() > SHORT:
                await self._park(TaskSleeping(key=call.key, until=until))
            with self._busy():
                await asyncio.sleep(max(until - logtime.now(), 0.0))
            self._check()
            record = await self._perform(call)
            again = self._again(call, record)
            if again is None:
                return record
            self._check()
            self._tries[call.key], self._until[call.key] = again.retry, again.until
            self.writer.add(again)
            self.writer.write_soon()

    def _again(self, call: Call, record: EffectRecorded) -> EffectRetried | None:
        """When an effect that was just performed is to be performed again; None for not."""
        error, retry = self._raised.pop(call.key, None), self._tries.get(call.key, 0) + 1
        delay = call.retry.wait(error, retry, f"{self._life}/{call.key}") if call.retry and error else None
        if delay is None:
            return None
        until, deadline = logtime.now() + delay, self._attempt.deadline
        if isinstance(error, BreakerOpen):  # before that it is only refused again
            until = max(until, error.due)
        if until - logtime.now() > MAX_WAIT or (deadline is not None and deadline < until):
            return None
        if sum(self._tries.values()) >= MAX_RECORDS:
            return None
        kind = type(error).__name__[:200]
        return EffectRetried(key=call.key, name=call.name, retry=retry, type=kind, until=until, usage=record.usage)

    async def _act(self, call: Call) -> EffectRecorded:
        started = time.perf_counter()
        try:
            if call.private:
                self._attempt.seal_effect(call.key)
            acted = await (self._attempt.breakers.run(call) if call.breaker else call.act())
            record = recorded(call, acted, time.perf_counter() - started)
            size = len(bytes(record.result))
            if size > self._attempt.limit:
                raise EffectFailed(
                    f"the result of {call.name} has {size:,} bytes; {self._attempt.limit:,} are allowed", name=call.name
                )
        except Exception as error:
            return self._failed(call, error, time.perf_counter() - started)
        return record

    def _failed(self, call: Call, error: Exception, seconds: float) -> EffectRecorded:
        if call.retry:
            self._raised[call.key] = error
        return failed(call, error, seconds)

    def perform_in_thread(self, call: Call) -> Any:
        return self.wait_in_thread(self.perform(call))

    def perform_now(self, call: Call, act: Callable[[], Any]) -> Any:
        record = self._look_up(call)
        if record is None:
            record = recorded(call, act(), 0.0)
            if _is_running(self._loop):
                self._note(record)
            else:
                self._loop.call_soon_threadsafe(self._note, record)
        return outcome_of(call, record)

    async def sleep(self, key: str, seconds: float) -> None:
        self._check_loop()
        self._check()
        if key in self._known:
            return
        until = self._until_of(key, seconds)
        assert until is not None, "a sleep has an end"
        while (left := until - logtime.now()) > SHORT:
            await self._park(TaskSleeping(key=key, until=until))
        with self._busy():
            await asyncio.sleep(max(left, 0.0))
        self._check()
        self._limit(key)
        self._note(EffectRecorded(key=key, name="sleep", digest="", seconds=round(seconds, 6)))

    async def signal(self, key: str, name: str, timeout: float | None) -> Any:
        self._check_loop()
        self._check()
        record, kind = self._known.get(key), f"signal.{name}"
        until = self._until_of(key, timeout) if record is None else None
        while record is None:
            with self._busy(), unseen():
                try:
                    received = await self._attempt.signals(name)
                except Exception as error:
                    self._break(error)
            self._check()
            taken = self.taken(name)  # now, not before the read: another branch may have taken one meanwhile
            fresh = next((each for each in received if each.position not in taken), None)
            if fresh:
                record = EffectRecorded(key=key, name=kind, digest="", result=fresh.value, arguments=[fresh.position])
            elif until is not None and until <= logtime.now():
                record = EffectRecorded(key=key, name=kind, digest="", error="builtins:TimeoutError", arguments=[
                    f"the signal {name} did not come in time"])  # fmt: skip
            else:
                await self._park(TaskSleeping(key=key, until=until, signal=name))
                continue
            self._limit(key)
            self._note(record)
        if record.error:
            raise TimeoutError(*record.arguments)
        return msgspec.json.decode(record.result)

    def taken(self, name: str) -> set[object]:
        """The positions of the signals of a name that the program has taken so far."""
        kind = f"signal.{name}"
        return {record.arguments[0] for record in self._known.values() if record.name == kind and not record.error}

    def wait_in_thread(self, work: Awaitable[Any]) -> Any:
        async def waited() -> Any:
            return await work

        asked = asyncio.run_coroutine_threadsafe(waited(), self._loop)
        self._asked.add(asked)
        try:
            if self.closed:
                asked.cancel()
            return asked.result()
        except CancelledError:
            raise Suspended from None
        finally:
            self._asked.discard(asked)

    async def call(self, program: str, body: bytes, key: str) -> bytes:
        return await self._attempt.call(program, body, key)

    def seed(self, key: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed}/{key}".encode()).digest()[:8], "big")

    # -- waiting

    async def _park(self, wait: TaskSleeping) -> None:
        """Wait here, for good if nobody else is at work: the run then ends with what it waits for. Returns when it is
        worth looking again, because the time is near or a while has passed."""
        self.waits[wait.key] = wait
        branch = asyncio.current_task()
        assert branch, "a coroutine runs in a task"
        self._parked.add(branch)
        self._active = self._loop.time()
        look = self._loop.time() + LOOK
        try:
            while self._loop.time() < look and (wait.until is None or wait.until - logtime.now() > 0):
                await asyncio.sleep(QUIET)
                self._check()
                self._suspend_if_quiet()
        finally:
            self._parked.discard(branch)
            if not self._attempt.suspended:
                self.waits.pop(wait.key, None)  # a branch that lost a race: nobody waits here any more

    def _suspend_if_quiet(self) -> None:
        quiet = self._loop.time() - self._active
        if self._under_way or quiet < QUIET or (quiet < LINGER and self._attempt.branches - self._parked):
            return
        self._attempt.suspend()
        for parked in list(self._parked):
            parked.cancel()

    @contextmanager
    def _busy(self) -> Iterator[None]:
        """While something is under way here, the run is not put to sleep."""
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            self._active = self._loop.time()

    def _until_of(self, key: str, seconds: float | None) -> float | None:
        """When the wait at a place is over: as it was first said."""
        if key not in self._until:
            if seconds is not None and not (math.isfinite(seconds) and seconds <= MAX_WAIT):
                raise ValueError(f"a wait takes at most {MAX_WAIT:,.0f} s, not {seconds}")
            self._until[key] = None if seconds is None else logtime.now() + seconds
        return self._until[key]

    # -- writing

    async def rest(self, room: int = MAX_COMMIT) -> list[Payload]:
        """What has not been written, at most `room` bytes, for the last commit to take along. The run is over then."""
        self.closed = True
        return await self.writer.rest(room)

    def stop(self) -> list[Interrupted]:
        """The run goes no further, wherever it is. What was under way, and may have done something."""
        found = [Interrupted(key, name, it.idempotency_key) for key, (name, it) in self._in_flight.items()]
        self.closed = True
        for asked in list(self._asked):  # a program in a thread, which cannot be cancelled itself
            asked.cancel()
        return found

    def close(self) -> None:
        """The run is over: nothing more is performed or recorded."""
        self.closed = True
        self.writer.close()

    def _note(self, record: EffectRecorded) -> None:
        if not self.closed:
            self._known[record.key] = record
            self.writer.add(record)

    # -- what ends a run

    def _check_loop(self) -> None:
        """Refuse a loop that a plain program has made: places of its branches would not be the same on every run."""
        if asyncio.get_running_loop() is not self._loop:
            raise ProgramFailed(
                "an effect was asked for in an event loop of the program's own; in a plain predict call it without "
                "asyncio.run and await, or write `async def predict`",
                type="OwnEventLoop",
            )

    def _check(self) -> None:
        """Go no further in a run that is over."""
        if self.closed or self.broken or self._attempt.suspended:
            raise Suspended

    def _lose(self, error: BaseException) -> None:
        self.broken = self.broken or error

    def _break(self, error: BaseException) -> NoReturn:
        self._lose(error)
        raise Suspended from error

    def _look_up(self, call: Call) -> EffectRecorded | None:
        self._check()
        record = self._known.get(call.key)
        if record is None:
            self._limit(call.key)
        elif record.digest != call.digest and not self._counts(call, record):
            self._break(Diverged("arguments", call.key, shown_request(record), call.shown))
        return record

    def _counts(self, call: Call, record: EffectRecorded) -> bool:
        """Whether a record counts for a request that is another than was recorded: in a fork what it shares does, for
        that has happened; otherwise the program says."""
        if call.key in self._shared:
            return True
        if self._attempt.lenient:
            logger.warning(
                "task %s: at %s %s was recorded, and %s is asked for now; the record counts",
                self._attempt.id, call.key, shown_request(record), call.shown,
            )  # fmt: skip
        return self._attempt.lenient

    def _limit(self, key: str) -> None:
        if len(self._known) >= MAX_RECORDS:
            raise LimitExceeded(f"a task may have {MAX_RECORDS:,} effects; {key} is one more")


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
