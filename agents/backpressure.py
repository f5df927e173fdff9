"""How much waits for one agent's program, and whether one more may: the queue's bound, known without asking anybody.

Each delivery says how many more wait behind it in the log and which number it is among all deliveries of the program,
so whoever works knows the backlog and how fast all agents together work it off. Only an agent whose slots have all been
taken for a while, and that is asked for more, asks the server once a second.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from dspex.bus.client import Client, Message
from dspex.bus.pull import Delivery
from dspex.core.codec import NOT_JSON
from dspex.core.errors import ConnectionFailed, LimitExceeded

__all__ = ["Backlog"]

MAX_STORING = 10_000
"""Asks and submits that one agent stores at once."""
MAX_STORING_BYTES = 64 << 20
"""The same, in bytes."""
EMPTY = 1.0
"""Seconds without a delivery, while we ask for some, after which nothing waits."""
STALE = 1.0
"""Seconds without a delivery after which the server is asked how many wait, and between two such questions."""
MEASURE = 1.0
"""Seconds over which the pace is measured, at least."""
UNKNOWN = 2.0
"""Seconds to wait when nobody knows the pace."""
LONGEST = 300.0
"""Seconds that anybody is told to wait at most."""
BUSY = 0.5
"""Seconds to wait for an agent that stores as much as it may."""


class _Info(msgspec.Struct):
    num_pending: int = 0


class Backlog:
    """What waits for one program, as one agent sees it. `most` may wait (None: any number); `hungry` says whether we
    ask for tasks that do not come. `place` is the stream and the consumer that the tasks come from."""

    def __init__(
        self, client: Client, place: tuple[str, str], program: str, most: int | None, hungry: Callable[[], bool]
    ) -> None:
        self._client, self._subject = client, "$JS.API.CONSUMER.INFO." + ".".join(place)
        self._program, self._most, self._hungry = program, most, hungry
        self._loop, self._looked = asyncio.get_running_loop(), 0.0
        self._pending = self._added = 0
        self._seen = self._marked = time.monotonic()
        self._sequence = self._mark = 0
        self._pace = 0.0
        self.storing = self._bytes = 0

    def seen(self, delivery: Delivery) -> None:
        """A task was delivered."""
        now = time.monotonic()
        self._pending, self._added, self._seen, self._sequence = delivery.pending, 0, now, delivery.sequence
        since = now - self._marked
        if not 0 < self._mark <= self._sequence or since > 60 * MEASURE:
            self._mark, self._marked = self._sequence, now
        elif since >= MEASURE:
            pace = (self._sequence - self._mark) / since
            self._pace = (self._pace + pace) / 2 if self._pace else pace
            self._mark, self._marked = self._sequence, now

    @property
    def waiting(self) -> int:
        """About how many tasks wait in the log."""
        if self._hungry() and time.monotonic() - self._seen > EMPTY:
            self._pending = self._added = 0
        return self._pending + self._added + self.storing

    def check(self, size: int) -> None:
        """Raise LimitExceeded unless one more task of so many bytes may come."""
        if self.storing >= MAX_STORING or (self.storing and self._bytes + size > MAX_STORING_BYTES):
            what = f"{self.storing:,} tasks of {self._program} are being stored here"
            raise LimitExceeded(f"{what}; try again in {BUSY:g} s", retry_after=BUSY)
        if self._most is None:
            return
        waiting = self.waiting
        self._look()
        if waiting < self._most:
            return
        wait, pace = self._wait(waiting), self._pace_now()
        at = f"; at {pace:,.1f} a second there is room" if pace else "; try again"
        what = f"{waiting:,} tasks of {self._program} wait already, and {self._most:,} may"
        raise LimitExceeded(f"{what}{at} in about {wait:,.0f} s", retry_after=wait)

    def _look(self) -> None:
        """Ask the server how many wait, when we have not heard of it for a while; the answer is for the next."""
        now = time.monotonic()
        if now - self._seen < STALE or now - self._looked < STALE or self._hungry():
            return
        if asyncio.get_running_loop() is not self._loop:  # the watch answers in the place of a loop that stands still
            return
        self._looked = now
        try:
            self._client.call(self._subject, b"").add_done_callback(self._told)
        except ConnectionFailed:
            return

    def _told(self, asked: asyncio.Future[Message]) -> None:
        if asked.cancelled() or asked.exception() or asked.result().status:
            return
        try:
            info = msgspec.json.decode(asked.result().data, type=_Info)
        except NOT_JSON:
            return
        if self._seen < self._looked:  # nothing was delivered meanwhile, which would know better
            self._pending, self._added = info.num_pending, 0

    def begin(self, size: int) -> None:
        """One more is being stored."""
        self.storing += 1
        self._bytes += size

    def end(self, size: int, *, stored: bool) -> None:
        """It is stored, or it is not."""
        self.storing -= 1
        self._bytes -= size
        self._added += stored

    def _pace_now(self) -> float:
        """Tasks a second of all agents together; less when none has come for a while."""
        since = time.monotonic() - self._marked
        if since < 2 * MEASURE:
            return self._pace
        return min(self._pace, (self._sequence - self._mark + 1) / since)

    def _wait(self, waiting: int) -> float:
        """Seconds until a quarter of the queue is free."""
        pace = self._pace_now()
        if not pace or self._most is None:
            return UNKNOWN
        return min(max((waiting - 0.75 * self._most) / pace, 1.0), LONGEST)
