"""What one process may start now under the rate and concurrency of one scope, as the limiter has lent it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from dspex.agents import logtime
from dspex.core.lending import Pace, Paced
from dspex.core.limits import Amount, Limit, Scope

__all__ = ["PLENTY", "Gate"]

HOLD = 3.5
"""So many times the seconds between our words, and permits that were not confirmed are not given to anybody new."""
PLENTY = 1 << 30
NUDGE = 0.25
"""Seconds between words for permits that others have."""
KEEP = 60.0
"""Seconds, and twice the time of a token, that tokens of a tenant, study or model are kept for whoever was refused."""


class Gate:
    """`held` is how many of a program's tasks are held here, where that is what counts; otherwise whoever enters
    counts. `want` is how many could be held. `bell` is rung when the limiter should be asked."""

    def __init__(
        self, scope: Scope, bell: Callable[[], None], held: Callable[[], int] | None = None, want: int = 0
    ) -> None:
        self.scope, self.limit = scope, Limit()
        self._bell, self._held, self._want = bell, held, want
        self._entered = self.waiting = 0
        self.cap, self._until = 0, 0.0  # permits that we may use, and until when
        self._tokens = self._coming = self._piece = 0
        self._empty_at = 0.0
        self.on_change: list[Callable[[], None]] = []
        self._moved = asyncio.Event()
        self._touched = time.monotonic()

    @property
    def use(self) -> int:
        """How many are under way here."""
        return self._held() if self._held else self._entered

    @property
    def free(self) -> int:
        """How many more may start now."""
        free = PLENTY
        if self.limit.concurrency is not None:
            free = (self.cap if time.monotonic() < self._until else 0) - self.use
        if self.limit.rate is not None:
            free = min(free, self._tokens)
        return max(free, 0)

    @property
    def wait(self) -> float:
        """About how many seconds until one more token of the rate comes, with none left here."""
        if self.limit.rate is None or self._tokens:
            return 0.0
        return max(0.0, self._empty_at - logtime.now(), 0.0 if self._coming else 1 / self.limit.rate.per_second)

    def take(self) -> None:
        """One starts: a token is used."""
        self._touched = time.monotonic()
        if self.limit.rate is not None:
            self._tokens = max(self._tokens - 1, 0)
            if self._hungry:
                self._bell()

    async def enter(self, patience: float) -> bool:
        """Wait until one more may start, and start it; False when that does not come in time."""
        self._touched = time.monotonic()
        until = self._touched + patience
        self.waiting += 1
        try:
            while not self.free:
                left = until - time.monotonic()
                if left <= 0:
                    return False
                self._moved.clear()
                self._bell()
                try:
                    await asyncio.wait_for(self._moved.wait(), min(left, NUDGE))
                except TimeoutError:
                    continue
            self._entered += 1
            self.take()
            return True
        finally:
            self.waiting -= 1

    def leave(self) -> None:
        """One that had entered is over."""
        self._entered -= 1
        self._changed()

    # -- what is said and heard

    def change(self, limit: Limit) -> None:
        """The limit is another one now. Tokens of another rate are worth nothing."""
        if limit.rate != self.limit.rate:
            self._tokens = self._coming = self._piece = 0
            self._empty_at = 0.0
        self.limit = limit
        self._changed()

    @property
    def quiet(self) -> bool:
        """Whether nothing is had or wanted here, nor was lately: a token that somebody will come back for is kept."""
        if self._held is not None or self._entered or self.waiting or self.cap:
            return False
        rested = time.monotonic() - self._touched
        return rested > (KEEP + 2 / self.limit.rate.per_second if self.limit.rate else 0.0)

    def released(self) -> None:
        """A slot is free again: if there is no token for it, one is asked for."""
        if self._hungry:
            self._bell()

    @property
    def _hungry(self) -> bool:
        """Whether more tokens should be asked for before the last one is used."""
        return self.limit.rate is not None and self._tokens + self._coming <= self._piece // 2

    def word(self) -> Pace:
        """What we have and want."""
        use = self.use
        could = self._want - use if self._held else self.waiting
        wanted = max(could - self._coming, 0) if self._hungry else 0
        want = self._want if self._held else use + self.waiting
        return Pace(have=max(self.cap, use), want=want, use=use, tokens=wanted, empty_at=self._empty_at)

    def hear(self, paced: Paced, asked: float, again: float) -> None:
        """What the limiter answered to a word of the time `asked`."""
        if paced.cap is not None:
            self.cap, self._until = paced.cap, asked + HOLD * again
        if paced.tokens:
            self._coming += paced.tokens
            self._piece = paced.tokens
            self._empty_at = max(self._empty_at, paced.empty_at)
            loop = asyncio.get_running_loop()
            loop.call_later(paced.after, self._ripen, paced.tokens, self.limit.rate)
        self._changed()

    def _ripen(self, tokens: int, rate: Amount | None) -> None:
        if rate != self.limit.rate:
            return  # of a rate that is no more
        self._coming -= tokens
        self._tokens += tokens
        self._changed()

    def _changed(self) -> None:
        self._moved.set()
        for tell in self.on_change:
            tell()
