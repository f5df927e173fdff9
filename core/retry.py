"""When what raised is tried again: a policy that a program's class states, or an effect's decorator."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from dspex.core.errors import TaskError

__all__ = ["Retry"]

PASSING = frozenset({408, 429})
"""Codes below 500 that pass: what was refused with another one is refused again."""


@dataclass(frozen=True)
class Retry:
    """Try again up to `attempts` times after the first, `backoff` seconds later, then `factor` times as long, at most
    `longest`, with up to `jitter` of it taken away at random.

    `on` are the exceptions that are worth it; an error with a code below 500 never is, but for 408 and 429. An error
    that has `retry_after`, in seconds, is not tried again before. `clean` forgets the recorded effects of a task and
    starts anew; otherwise a retry goes on with them, and only what failed is done again. An effect has no use for it.
    Raises ValueError for numbers that make no sense.
    """

    attempts: int = 3
    backoff: float = 1.0
    factor: float = 2.0
    longest: float = 300.0
    jitter: float = 0.25
    on: tuple[type[BaseException], ...] = (Exception,)
    clean: bool = False

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.backoff <= 0 or self.factor < 1 or self.longest <= 0 or not 0 <= self.jitter <= 1:
            raise ValueError(
                f"{self}: attempts from 1, backoff and longest over 0 s, factor from 1, jitter from 0 to 1"
            )

    def wait(self, error: BaseException, retry: int, what: str) -> float | None:
        """Seconds until retry number `retry` (from 1) of a task or an effect that raised; None when that is the end."""
        if not isinstance(error, self.on):
            return None
        if isinstance(error, TaskError) and error.code < 500 and error.code not in PASSING:
            return None
        delay, after = self.delay(retry, what), getattr(error, "retry_after", None)
        if delay is None or isinstance(after, bool) or not isinstance(after, (int, float)) or not math.isfinite(after):
            return delay
        return max(delay, after)

    def delay(self, retry: int, what: str) -> float | None:
        """Seconds by the policy alone, the same whenever it is asked; None for no more."""
        if retry > self.attempts:
            return None
        try:
            longest = min(self.backoff * self.factor ** (retry - 1), self.longest)
        except OverflowError:
            longest = self.longest
        chance = int.from_bytes(hashlib.sha256(f"{what}/{retry}".encode()).digest()[:4], "big") / 2**32
        return longest * (1 - self.jitter * chance)
