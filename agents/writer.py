"""What a run has recorded, on its way to the log: in the order in which it was made, one append under way at a time.

There is no task that writes. Who needs the records in the log writes them, in its own coroutine; who comes meanwhile
waits, and then writes what has gathered. So a program that asks for one effect after the other pays for the append and
for nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import Context
from typing import Protocol

from dspex.core.errors import DspexError
from dspex.core.events import EffectRecorded, Event, Payload, TaskClaimed
from dspex.core.ports import Appended, Conflict

__all__ = ["MAX_COMMIT", "RECORD", "Superseded", "Writer", "Writing"]

MAX_COMMIT = 256 << 10
"""Bytes of records that one commit may hold, unless a single one is larger; more go into the next."""
RECORD = 512
"""Bytes that a record takes beside its request and result."""
BEHIND = 0.02
"""Seconds that a record may wait for a companion before it is written although nothing asks for it."""


class Superseded(DspexError):
    """Another attempt has the task now; this one must leave no trace."""


class Writing(Protocol):
    """The attempt that writes."""

    @property
    def id(self) -> str:
        """The task's id."""

    claimed: bool

    def claim(self) -> TaskClaimed:
        """The event that claims the task for this attempt."""

    def events(self, payloads: Sequence[Payload]) -> list[Event]:
        """Payloads as the next events of the task."""

    async def commit(self, events: list[Event]) -> Appended | Conflict:
        """Append behind `head`, and move `head` when it was taken. The very same may be repeated: it is stored once."""


class Writer:
    """Writes the records of one attempt, the claim before all of them. `on_lost` hears of the first failure
    (LogError, Superseded), after which nothing more is written; `size` is about how many bytes wait."""

    def __init__(
        self, attempt: Writing, loop: asyncio.AbstractEventLoop, on_lost: Callable[[Exception], None]
    ) -> None:
        self._attempt, self._loop, self._on_lost = attempt, loop, on_lost
        self._pending: list[Payload] = []
        self.size = 0
        self._added = self._stored = 0
        self._writing = False
        self._own: asyncio.Task[None] | None = None
        self._turn: list[asyncio.Future[None]] = []
        self._later: asyncio.TimerHandle | None = None
        self._lost: Exception | None = None
        self.closed = False

    def add(self, payload: Payload) -> None:
        """Take a record; it is written when somebody flushes, or with the end of the run."""
        self._pending.append(payload)
        self._added += 1
        self.size += size_of(payload)

    def write_soon(self) -> None:
        """See that what was added is written, although nobody should ask for it."""
        if self._later is None:
            self._later = self._loop.call_later(BEHIND, self._write_behind)

    async def flush(self) -> None:
        """Return when the claim and everything added so far is in the log. Raises Superseded, LogError."""
        if not self._attempt.claimed and not self._pending and not self._writing:
            self.add(self._attempt.claim())
        # Not until nothing is left: what other branches add meanwhile is not ours to wait for.
        upto = self._added
        while self._stored < upto:
            if self._lost:
                raise self._lost
            if self._writing:
                turn: asyncio.Future[None] = self._loop.create_future()
                self._turn.append(turn)
                await turn
            else:
                events, count = self._take()
                try:
                    await self._append(events, count)
                except asyncio.CancelledError:  # of whoever asks: what is under way is seen through without him
                    self._write_apart(events, count)
                    raise

    async def rest(self, room: int) -> list[Payload]:
        """What has not been written, at most `room` bytes, for the last commit to take along."""
        self.close()
        while self._writing or self.size > min(room, MAX_COMMIT):
            await self.flush()
        if self._lost:  # records are lost: what ends the run must not be stored as if there had been none
            raise self._lost
        rest, self._pending, self.size = self._pending, [], 0
        return rest

    def close(self) -> None:
        """Nothing more will be added; what there is waits for `rest`."""
        self.closed = True
        if self._later:
            self._later.cancel()

    def _write_behind(self) -> None:
        self._later = None
        if self._pending and not (self._writing or self.closed or self._lost):
            self._write_apart(*self._take())

    def _write_apart(self, events: list[Event], count: int) -> None:
        # Past the task factory and in an empty context: this is no branch of the program.
        self._own = asyncio.Task(self._append(events, count), loop=self._loop, name="dspex-record", context=Context())

    def _take(self) -> tuple[list[Event], int]:
        """What the next commit holds, and how many of it were added. From here on an append is under way."""
        batch, self._pending = self._pending, []
        if self.size > MAX_COMMIT and len(batch) > 1:
            fits = size = 0
            while not fits or size + size_of(batch[fits]) <= MAX_COMMIT:
                size += size_of(batch[fits])
                fits += 1
            batch, self._pending = batch[:fits], batch[fits:]
            self.size -= size
        else:
            self.size = 0
        count = len(batch)
        self._writing = True
        if not self._attempt.claimed and not isinstance(batch[0], TaskClaimed):
            batch.insert(0, self._attempt.claim())
        return self._attempt.events(batch), count

    async def _append(self, events: list[Event], count: int) -> None:
        try:
            if isinstance(await self._attempt.commit(events), Conflict):
                raise Superseded(f"task {self._attempt.id} was taken over by another attempt")
            self._stored += count
        except Exception as error:
            self._lost = self._lost or error
            self._on_lost(error)
        self._writing = False
        turn, self._turn = self._turn, []
        for waiting in turn:
            if not waiting.done():
                waiting.set_result(None)
        if self._pending and not self.closed:
            self.write_soon()


def size_of(payload: Payload) -> int:
    """About how many bytes a payload takes in a commit."""
    if not isinstance(payload, EffectRecorded):
        return RECORD
    size = RECORD + len(bytes(payload.request)) + len(bytes(payload.result))
    return size + 4 * sum(len(str(value)) for value in payload.arguments) if payload.arguments else size
