"""The effects of one attempt: looked up when they were recorded before, performed and recorded when not.

Records are written behind the program, one append under way at a time, and what comes meanwhile goes into the next. But
nothing leaves the process before everything it may depend on is in the log: the claim first of all, then every earlier
record. So a task that goes on elsewhere finds all that was done, and at most the effects under way are done again.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import CancelledError
from typing import Any, NoReturn, Protocol

import msgspec

from dspex.core.effects import Call, Diverged, failed, outcome_of, recorded, unseen, with_idempotency
from dspex.core.errors import DspexError, LimitExceeded
from dspex.core.events import (
    EffectRecorded,
    Event,
    Payload,
    SignalReceived,
    TaskClaimed,
    TaskRetried,
    TaskSleeping,
)
from dspex.core.ports import Appended, Conflict

__all__ = ["Attempt", "Recorder", "Superseded", "Suspended"]

MAX_RECORDS = 100_000
"""Effects that one task may have."""
MAX_COMMIT = 256 << 10
"""Bytes of results that one commit may hold; more go into the next."""
QUIET = 0.005
"""Seconds without an effect under way after which a run that waits is put to sleep."""
SHORT = 1.5
"""Seconds that are slept in the process; more are slept in the log."""


class Suspended(BaseException):
    """The task waits for what may take long; its process's part ends here. Not an Exception, so that no program takes
    it for one of its own."""


class Superseded(DspexError):
    """Another attempt has the task now; this one must leave no trace."""


class Attempt(Protocol):
    """What the recorder needs to know and do about the attempt it records."""

    @property
    def id(self) -> str:
        """The task's id."""

    claimed: bool
    suspended: bool

    def claim(self) -> TaskClaimed:
        """The event that claims the task for this attempt."""

    async def commit(self, payloads: list[Payload]) -> Appended | Conflict:
        """Append behind `head`, and move `head` when it was taken."""

    async def signals(self, name: str) -> list[SignalReceived]:
        """The signals of a name that have reached the task, oldest first."""

    def suspend(self) -> None:
        """End the program's run here; what it waits for is in `waits` of the recorder."""


class Recorder:
    """The `Runtime` of an attempt. `history` are the records of the attempts before it."""

    def __init__(self, attempt: Attempt, history: Iterable[Event], loop: asyncio.AbstractEventLoop) -> None:
        self._attempt, self._loop = attempt, loop
        self._known: dict[str, EffectRecorded] = {}
        self._until: dict[str, float | None] = {}
        self._life = 0
        self._recall(history)
        self._pending: list[Payload] = []
        self._writing: asyncio.Task[None] | None = None
        self._under_way = 0
        self._parked: set[asyncio.Task[Any]] = set()
        self.waits: dict[str, TaskSleeping] = {}

    def _recall(self, history: Iterable[Event]) -> None:
        """What the attempts before this one have done; a clean retry forgot what was before it."""
        for event in history:
            match event.data:
                case EffectRecorded() as record:
                    self._known[record.key] = record
                case TaskSleeping(key=key, until=until):
                    self._until[key] = until
                case TaskRetried(clean=True):
                    self._known.clear()
                    self._until.clear()
                    self._life += 1

    # -- the Runtime port

    async def perform(self, call: Call) -> Any:
        """Look the effect up, or perform and record it."""
        if self._attempt.suspended:
            raise Suspended
        record = self._look_up(call)
        if record is None:
            if call.outside:
                await self.flush()
            started = time.perf_counter()
            self._under_way += 1
            try:
                result = await with_idempotency(self._idempotency_key(call.key), call.act)()
            except Exception as error:
                record = failed(call, error, time.perf_counter() - started)
            else:
                record = recorded(call, result, time.perf_counter() - started)
            finally:
                self._under_way -= 1
            self._note(record)
        return outcome_of(call, record)

    def perform_in_thread(self, call: Call) -> Any:
        return asyncio.run_coroutine_threadsafe(self.perform(call), self._loop).result()

    def perform_now(self, call: Call, act: Callable[[], Any]) -> Any:
        record = self._look_up(call)
        if record is None:
            record = recorded(call, act(), 0.0)
            self._loop.call_soon_threadsafe(self._note, record)
        return outcome_of(call, record)

    async def sleep(self, key: str, seconds: float) -> None:
        if key in self._known:
            return
        until = self._until.get(key) or time.time() + seconds
        left = until - time.time()
        if left <= SHORT:
            await asyncio.sleep(max(left, 0.0))
            self._note(EffectRecorded(key=key, name="sleep", digest="", seconds=round(seconds, 6)))
            return
        await self._park(TaskSleeping(key=key, until=until))

    async def signal(self, key: str, name: str, timeout: float | None) -> Any:
        kind = f"signal.{name}"
        record = self._known.get(key)
        if record is None:
            taken = self.taken(name)
            with unseen():
                received = await self._attempt.signals(name)
            until = self._until.get(key) or (time.time() + timeout if timeout is not None else None)
            if len(received) > taken:
                record = EffectRecorded(key=key, name=kind, digest="", result=received[taken].value)
            elif until is not None and until <= time.time():
                record = EffectRecorded(key=key, name=kind, digest="", error="builtins:TimeoutError", arguments=[
                    f"the signal {name} did not come in time"])  # fmt: skip
            else:
                await self._park(TaskSleeping(key=key, until=until, signal=name))
            self._note(record)
        if record.error:
            raise TimeoutError(*record.arguments)
        return msgspec.json.decode(record.result)

    def taken(self, name: str) -> int:
        """How many signals of a name the program has taken so far."""
        kind = f"signal.{name}"
        return sum(record.name == kind and not record.error for record in self._known.values())

    def wait_in_thread(self, work: Awaitable[Any]) -> Any:
        async def waited() -> Any:
            return await work

        waiting = asyncio.run_coroutine_threadsafe(waited(), self._loop)
        try:
            return waiting.result()
        except CancelledError:
            raise Suspended from None

    async def _park(self, wait: TaskSleeping) -> NoReturn:
        """Wait here for good; when no branch has an effect under way any more, the run ends with what it waits for."""
        self.waits[wait.key] = wait
        branch = asyncio.current_task()
        assert branch, "a coroutine runs in a task"
        self._parked.add(branch)
        try:
            while True:
                await asyncio.sleep(QUIET)
                if not self._under_way and not self._attempt.suspended:
                    self._attempt.suspend()
                    for parked in list(self._parked):
                        parked.cancel()
        finally:
            self._parked.discard(branch)
            if not self._attempt.suspended:
                self.waits.pop(wait.key, None)  # a branch that lost a race: nobody waits here any more

    def seed(self, key: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._attempt.id}/{self._life}/{key}".encode()).digest()[:8], "big")

    # -- writing

    async def flush(self) -> None:
        """Return when the claim and everything recorded so far is in the log. Raises Superseded, LogError."""
        if not self._attempt.claimed and not self._pending:
            self._pending.append(self._attempt.claim())
        while self._pending or self._writing:
            if self._writing is None:
                with unseen():
                    self._writing = self._loop.create_task(self._write(), name="dspex-record")
            writing = self._writing
            try:
                await asyncio.shield(writing)
            finally:
                if writing.done() and self._writing is writing:
                    self._writing = None

    async def rest(self) -> list[Payload]:
        """What has not been written, for the last commit to take along; nothing is under way afterwards."""
        if self._writing:
            await self.flush()
        rest, self._pending = self._pending, []
        return rest

    def _note(self, record: EffectRecorded) -> None:
        if len(self._known) >= MAX_RECORDS:
            raise LimitExceeded(f"a task may have {MAX_RECORDS:,} effects; {record.key} is one more")
        self._known[record.key] = record
        self._pending.append(record)

    async def _write(self) -> None:
        while self._pending:
            batch, size = [], 0
            while self._pending and size < MAX_COMMIT:
                payload = self._pending.pop(0)
                size += len(bytes(payload.result)) if isinstance(payload, EffectRecorded) else 0
                batch.append(payload)
            if not self._attempt.claimed and not isinstance(batch[0], TaskClaimed):
                batch.insert(0, self._attempt.claim())
            if isinstance(await self._attempt.commit(batch), Conflict):
                raise Superseded(f"task {self._attempt.id} was taken over by another attempt")

    def _look_up(self, call: Call) -> EffectRecorded | None:
        record = self._known.get(call.key)
        if record is not None and record.digest != call.digest:
            raise Diverged("arguments", call.key, f"{record.name} {record.digest}", f"{call.name} {call.digest}")
        return record

    def _idempotency_key(self, key: str) -> str:
        return hashlib.sha256(f"{self._attempt.id}/{self._life}/{key}".encode()).hexdigest()[:32]
