"""The effects of one attempt: looked up when they were recorded before, performed and recorded when not.

Records are written behind the program, one append under way at a time, and what comes meanwhile goes into the next. But
nothing leaves the process before everything it may depend on is in the log: the claim first of all, then every earlier
record. So a task that goes on elsewhere finds all that was done, and at most the effects under way are done again.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from dspex.core.effects import Call, Diverged, failed, outcome_of, recorded, with_idempotency
from dspex.core.errors import DspexError, LimitExceeded
from dspex.core.events import EffectRecorded, Event, Payload, TaskClaimed
from dspex.core.ports import Appended, Conflict

__all__ = ["Attempt", "Recorder", "Superseded"]

MAX_RECORDS = 100_000
"""Effects that one task may have."""
MAX_COMMIT = 256 << 10
"""Bytes of results that one commit may hold; more go into the next."""


class Superseded(DspexError):
    """Another attempt has the task now; this one must leave no trace."""


class Attempt(Protocol):
    """What the recorder needs to know and do about the attempt it records."""

    @property
    def id(self) -> str:
        """The task's id."""

    claimed: bool

    def claim(self) -> TaskClaimed:
        """The event that claims the task for this attempt."""

    async def commit(self, payloads: list[Payload]) -> Appended | Conflict:
        """Append behind `head`, and move `head` when it was taken."""


class Recorder:
    """The `Runtime` of an attempt. `history` are the records of the attempts before it."""

    def __init__(self, attempt: Attempt, history: Iterable[Event], loop: asyncio.AbstractEventLoop) -> None:
        self._attempt, self._loop = attempt, loop
        self._known = {event.data.key: event.data for event in history if isinstance(event.data, EffectRecorded)}
        self._pending: list[Payload] = []
        self._writing: asyncio.Task[None] | None = None
        self.performed = 0

    # -- the Runtime port

    async def perform(self, call: Call) -> Any:
        """Look the effect up, or perform and record it."""
        record = self._look_up(call)
        if record is None:
            if call.outside:
                await self.flush()
            started = time.perf_counter()
            try:
                result = await with_idempotency(self._idempotency_key(call.key), call.act)()
            except Exception as error:
                record = failed(call, error, time.perf_counter() - started)
            else:
                record = recorded(call, result, time.perf_counter() - started)
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

    def seed(self, key: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._attempt.id}/{key}".encode()).digest()[:8], "big")

    # -- writing

    async def flush(self) -> None:
        """Return when the claim and everything recorded so far is in the log. Raises Superseded, LogError."""
        if not self._attempt.claimed and not self._pending:
            self._pending.append(self._attempt.claim())
        while self._pending or self._writing:
            if self._writing is None:
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
        if self.performed >= MAX_RECORDS:
            raise LimitExceeded(f"a task may have {MAX_RECORDS:,} effects; {record.key} is one more")
        self.performed += 1
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
        return hashlib.sha256(f"{self._attempt.id}/{key}".encode()).hexdigest()[:32]
