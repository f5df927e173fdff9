"""The circuit breakers of one agent, shared with the other agents of its program.

Where a breaker stands is an aggregate in the log, changed under compare-and-set; so is the quota of trial calls. What
the agents count they tell each other about once a second, over core NATS, so that each judges by the calls of all.
While a breaker is closed nothing is written, and while it is open nothing is asked: both are decided in memory.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from contextvars import Context, copy_context
from typing import Any, cast

import msgspec
from msgspec import Struct
from msgspec.structs import asdict

from dspex.agents.journal import events_for
from dspex.bus.client import Client, Message
from dspex.bus.service import Endpoint, Request, Service
from dspex.core import headers as h
from dspex.core.breaker import (
    Breaker,
    BreakerState,
    Tally,
    Window,
    breaker_name,
    fold,
    refused_until,
    trial_begins,
    trial_ends,
    trips,
)
from dspex.core.codec import NOT_JSON, decode_commit, rfc3339
from dspex.core.effects import Call
from dspex.core.errors import BreakerOpen, ConnectionFailed, InvalidInput, LogError
from dspex.core.events import BreakerClosed, Head, Payload
from dspex.core.ports import Appended, Log
from dspex.core.subjects import Subjects, aggregate

__all__ = ["MAX_ABANDONED", "Breakers"]

logger = logging.getLogger("dspex.agents")

TELL = 1.0
"""Seconds between two reports of an agent to the others."""
SOON = 0.05
"""Seconds that the first call to be told waits for others."""
STUBBORN = 0.5
"""Seconds that an async effect gets to end when its time is over; then it is left behind."""
MAX_ABANDONED = 16
"""Effects left behind, in threads or as tasks that do not end, at which the agent is replaced."""
MAX_THREADS = 64
"""Plain effects with a timeout that run at once; others wait for one to end."""
MAX_BREAKERS = 1000
"""Breakers of one agent; an effect beyond that is called without one."""
TRIES = 20
REPORT = "breaker"
"""The control verb under which the agents of a program tell each other of their calls."""


class _Count(Struct):
    """What one agent has to tell of one breaker: calls that ended while it stood at `version`."""

    name: str
    version: int
    calls: int = 0
    failures: int = 0
    slow: int = 0


class _Report(Struct):
    agent: str
    counts: list[_Count]


class _Gate:
    """One breaker as this agent knows it."""

    def __init__(self, name: str, effect: str, breaker: Breaker, program: str) -> None:
        self.name, self.effect, self.breaker = name, effect, breaker
        self.aggregate = aggregate("breaker", program, name)
        self.window, self.fresh = Window(breaker), Tally()
        self.state, self.head = BreakerState(), Head()
        self.known = False
        """What the log says has been read since we connected."""
        self.reading: asyncio.Task[None] | None = None
        self.writing: asyncio.Task[None] | None = None

    def take(self, state: BreakerState, head: Head) -> None:
        """What the log has now. Calls that ended before a change say nothing about what follows it."""
        if head.version != self.head.version:
            self.window.clear()
            self.fresh = Tally()
        self.state, self.head = state, head


class Breakers:
    """Decides on the calls of one agent's effects, and counts what becomes of them."""

    def __init__(self, client: Client, log: Log, subjects: Subjects, program: str, agent: str) -> None:
        self._client, self._log, self._subjects, self._program = client, log, subjects, program
        self._me, self._source = f"{agent}-{secrets.token_hex(3)}", f"/agents/{agent}"
        self._gates: dict[str, _Gate] = {}
        self._loop = asyncio.get_running_loop()
        self._beside: set[asyncio.Task[None]] = set()
        self._trials = 0
        self._telling: asyncio.TimerHandle | None = None
        self._told = 0.0
        self._threads = asyncio.Semaphore(MAX_THREADS)
        self._left: set[asyncio.Future[Any]] = set()

    @property
    def abandoned(self) -> int:
        """How many effects go on although nobody waits for them any more."""
        return len(self._left)

    # -- one call

    def refusal(self, call: Call) -> BreakerOpen | None:
        """Why an effect is not called now, as far as is known here; None when it may be."""
        gate = self._gate(call)
        return self._refusal(gate) if gate and gate.known else None

    async def run(self, call: Call) -> Any:
        """Call the effect, if it may be called, and count how it went. Raises BreakerOpen, TimeoutError, and what the
        effect raises."""
        gate = self._gate(call)
        if gate is None:
            return await self._act(call)
        if not gate.known:
            await self._read(gate)
        if refusal := self._refusal(gate):
            raise refusal
        holder = await self._begin_trial(gate) if gate.state.status != "closed" else ""
        version, started = gate.head.version, time.perf_counter()
        result = Tally()  # of a call that came to no end, because it was cancelled
        try:
            value = await self._act(call)
            result = Tally(1, 0, int(gate.breaker.is_slow(time.perf_counter() - started)))
            return value
        except Exception as error:
            failed = isinstance(error, tuple(gate.breaker.counts))
            result = Tally(1, int(failed), int(gate.breaker.is_slow(time.perf_counter() - started)))
            raise
        finally:
            if holder:
                self._spawn(self._end_trial(gate, holder, result))
            elif result.calls:
                self._count(gate, version, result)

    def _gate(self, call: Call) -> _Gate | None:
        gate = self._gates.get(call.name)
        if gate is None and call.breaker and len(self._gates) < MAX_BREAKERS:
            if not self._gates:
                self._client.subscribe(self._subjects.control(self._program, REPORT), self._heard)
                self._client.on_reconnect.append(self._forget)
            gate = self._gates[call.name] = _Gate(breaker_name(call.name), call.name, call.breaker, self._program)
        return gate

    def _refusal(self, gate: _Gate) -> BreakerOpen | None:
        now = time.time()
        until = refused_until(gate.breaker, gate.state, now)
        return None if until is None else self._refused(gate, until, now)

    def _refused(self, gate: _Gate, until: float, now: float) -> BreakerOpen:
        state, wait = gate.state, until - now
        opened = f"{gate.effect} is not called: its breaker opened at {rfc3339(state.since)[11:19]} UTC"
        if state.status == "half_open":
            return BreakerOpen(f"{opened} and lets only trial calls through now; try again in {wait:.1f} s", until)
        what = f"{state.slow} of {state.calls} calls were slow" if state.reason == "slow" else (
            f"{state.failures} of {state.calls} calls failed"
        )  # fmt: skip
        return BreakerOpen(f"{opened} ({what} in {state.window}), and is tried again in {wait:.1f} s", until)

    # -- the time of a call

    async def _act(self, call: Call) -> Any:
        seconds = cast("float | None", call.breaker.timeout) if call.breaker else None
        if seconds is None:
            return await call.act()
        if call.plain is None:
            return await self._in_time(call, call.act(), seconds)
        async with self._threads:
            return await self._in_time(call, self._in_thread(call.plain), seconds)

    async def _in_time(self, call: Call, work: Any, seconds: float) -> Any:
        """The result of what ends in time. What does not is told to end, and left behind when it goes on."""
        # Past the task factory: this is no branch of the program.
        acting = work if isinstance(work, asyncio.Future) else asyncio.Task(work, loop=self._loop)
        try:
            await asyncio.wait({acting}, timeout=seconds)
            if not acting.done():
                raise TimeoutError(f"{call.name} took longer than {seconds:g} s")
        finally:
            if not acting.done():
                await self._end(acting)
        return acting.result()

    async def _end(self, acting: asyncio.Future[Any]) -> None:
        if isinstance(acting, asyncio.Task):
            acting.cancel()
            await asyncio.wait({acting}, timeout=STUBBORN)
        if not acting.done():  # a thread cannot be stopped, and a coroutine need not heed us
            self._left.add(acting)
        acting.add_done_callback(self._ended)

    def _ended(self, acting: asyncio.Future[Any]) -> None:
        self._left.discard(acting)
        if not acting.cancelled():
            acting.exception()  # nobody asks for it any more

    def _in_thread(self, function: Callable[[], Any]) -> asyncio.Future[Any]:
        """A thread of its own: one that is left behind must not take the place of others in a pool."""
        future: asyncio.Future[Any] = self._loop.create_future()
        context = copy_context()

        def work() -> None:
            settle: Callable[[Any], None] = future.set_result
            try:
                end = context.run(function)
            except StopIteration:  # no future can hold one
                settle, end = future.set_exception, RuntimeError("the effect raised StopIteration")
            except BaseException as error:
                settle, end = future.set_exception, error
            with suppress(RuntimeError):  # the loop is closed: the process ends
                self._loop.call_soon_threadsafe(settle, end)

        threading.Thread(target=work, name="dspex-effect", daemon=True).start()
        return future

    # -- what is counted, and told

    def _count(self, gate: _Gate, version: int, result: Tally) -> None:
        if gate.state.status == "closed" and version == gate.head.version:
            gate.window.add(result, self._loop.time())
            gate.fresh = gate.fresh.plus(result)
            self._judge(gate)
            if self._telling is None:
                wait = max(SOON, self._told + TELL - self._loop.time())
                self._telling = self._loop.call_later(wait, self._tell, context=Context())

    def _judge(self, gate: _Gate) -> None:
        """Open a breaker whose window says so: here at once, and for all as soon as the log has it."""
        opened = None
        if gate.state.status == "closed" and gate.known and not (gate.writing and not gate.writing.done()):
            opened = trips(gate.breaker, gate.window.tally(self._loop.time()), time.time())
        if opened:
            [event] = events_for(gate.aggregate, gate.head, [opened], source=self._source)
            gate.state = fold([event], gate.state)
            gate.writing = self._spawn(self._open(gate, opened))

    async def _open(self, gate: _Gate, opened: Payload) -> None:
        if not await self._write(gate, opened):
            gate.known = False  # somebody was first, or nobody can say: the next call looks

    def _tell(self) -> None:
        self._telling, self._told = None, self._loop.time()
        counts = []
        for gate in self._gates.values():
            if gate.fresh.calls:
                counts.append(_Count(gate.name, gate.head.version, **asdict(gate.fresh)))
                gate.fresh = Tally()
        self._say(counts)

    def _say(self, counts: list[_Count]) -> None:
        if counts:
            with suppress(ConnectionFailed):
                body = msgspec.json.encode(_Report(self._me, counts))
                self._client.publish(self._subjects.control(self._program, REPORT), body)

    def _heard(self, message: Message) -> None:
        """Another agent's report. Called from the reading loop."""
        try:
            report = msgspec.json.decode(message.data, type=_Report)
        except NOT_JSON:
            return
        if report.agent == self._me:
            return
        gates = {gate.name: gate for gate in self._gates.values()}
        for count in report.counts:
            gate = gates.get(count.name)
            if gate is None or not gate.known:
                continue
            if count.version > gate.head.version:
                self._look(gate)
            elif count.version < gate.head.version and count.calls:
                self._say([_Count(gate.name, gate.head.version)])  # it has not heard of the change
            elif gate.state.status == "closed" and 0 <= max(count.failures, count.slow) <= count.calls:
                gate.window.add(Tally(count.calls, count.failures, count.slow), self._loop.time())
                self._judge(gate)

    # -- the log

    def _forget(self) -> None:
        """We may have missed a change: look before the next call."""
        for gate in self._gates.values():
            gate.known = False

    def _look(self, gate: _Gate) -> None:
        if gate.reading is None or gate.reading.done():
            gate.reading = self._spawn(self._read(gate))

    async def _read(self, gate: _Gate) -> None:
        """Learn where the breaker stands. When the log does not answer, go on with what is known."""
        try:
            entry = await self._log.last(gate.aggregate)
            events = decode_commit(entry.body, entry.position) if entry else []
        except LogError as error:
            logger.debug("nobody can say where the breaker of %s stands: %s", gate.effect, error)
            return
        head = Head(events[-1].version, events[-1].position) if events else Head()
        if head >= gate.head:
            gate.take(fold(events), head)
        gate.known = True

    async def _write(self, gate: _Gate, payload: Payload) -> bool:
        """Whether the log took a change behind what we know; the others are told then."""
        events = events_for(gate.aggregate, gate.head, [payload], source=self._source)
        state = fold(events, gate.state)
        try:
            result = await self._log.append(gate.aggregate, events, gate.head)
        except LogError as error:
            logger.warning("the breaker of %s could not be changed: %s", gate.effect, error)
            return False
        if not isinstance(result, Appended):
            return False
        if result.head >= gate.head:
            gate.take(state, result.head)
        self._say([_Count(gate.name, result.head.version)])
        return True

    # -- trial calls

    async def _begin_trial(self, gate: _Gate) -> str:
        """A permit for one trial call, "" when none is needed any more. Raises BreakerOpen when none is left."""
        self._trials += 1
        holder = f"{self._me}/{self._trials}"
        for _ in range(TRIES):
            now = time.time()
            if gate.state.status == "closed":
                return ""
            permit = trial_begins(gate.breaker, gate.state, holder, now)
            if permit is None:
                break
            if await self._write(gate, permit):
                return holder
            await self._read(gate)
        now = time.time()
        raise self._refused(gate, refused_until(gate.breaker, gate.state, now) or now + TELL, now)

    async def _end_trial(self, gate: _Gate, holder: str, result: Tally) -> None:
        """Say how a trial call went. What cannot be said is lost when its permit runs out."""
        for _ in range(TRIES):
            change = trial_ends(gate.breaker, gate.state, holder, result, time.time())
            if change is None or await self._write(gate, change):
                return
            await self._read(gate)

    # -- by hand

    def serve(self, service: Service) -> None:
        """Serve the door at which somebody closes a breaker by hand."""
        service.serve(Endpoint("breakers-reset", self._subjects.breakers(self._program, "reset"), self._reset))

    async def _reset(self, request: Request) -> None:
        try:
            effect = msgspec.json.decode(request.data, type=dict[str, str])["effect"]
        except (*NOT_JSON, KeyError):
            raise InvalidInput('the effect is due whose breaker is to be closed: {"effect": "charge"}') from None
        who = request.headers.get(h.ACTOR, "")[:200]
        gate = self._gates.get(effect) or _Gate(breaker_name(effect), effect, Breaker(), self._program)
        for _ in range(TRIES):
            await self._read(gate)
            before = gate.state.status
            if before == "closed" or await self._write(gate, BreakerClosed(reason="reset", by=who)):
                answer = {"program": self._program, "effect": effect, "before": before, "state": "closed"}
                request.respond(msgspec.json.encode(answer | {"version": gate.head.version}))
                return
        raise LogError(f"the breaker of {effect} changed {TRIES} times while it was being closed; try again")

    def stats(self) -> list[dict[str, Any]]:
        """Where the breakers stand that were asked for here; times in seconds since the epoch."""
        now = self._loop.time()
        return [
            {
                "effect": gate.effect, "state": gate.state.status, "version": gate.head.version,
                **asdict(gate.window.tally(now) if gate.state.status == "closed" else gate.state.tally),
                "window": gate.breaker.shown_window, "since": gate.state.since, "due": gate.state.due,
            }
            for gate in self._gates.values()
        ]  # fmt: skip

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # Past the task factory and in an empty context: no branch of the program that happens to run now.
        task = asyncio.Task(work, loop=self._loop, context=Context())
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
        return task
