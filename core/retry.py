"""When a task whose program raised is tried again: a policy that the program's class states."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

__all__ = ["Retry"]


@dataclass(frozen=True)
class Retry:
    """Try again up to `attempts` times after the first, `backoff` seconds later, then `factor` times as long, at most
    `longest`, with up to `jitter` of it taken away at random.

    `on` are the exceptions that are worth it. `clean` forgets the recorded effects and starts anew; otherwise a retry
    goes on with them, and only what failed is done again. Raises ValueError for numbers that make no sense.
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

    def delay(self, retry: int, task: str) -> float | None:
        """Seconds until retry number `retry` (from 1) of a task, the same whenever it is asked; None for no more."""
        if retry > self.attempts:
            return None
        try:
            longest = min(self.backoff * self.factor ** (retry - 1), self.longest)
        except OverflowError:
            longest = self.longest
        chance = int.from_bytes(hashlib.sha256(f"{task}/{retry}".encode()).digest()[:4], "big") / 2**32
        return longest * (1 - self.jitter * chance)
