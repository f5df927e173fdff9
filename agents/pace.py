"""How much of the machine work may take that nobody waits for: what is idle, and little when others want it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Pace"]

SCHEDSTAT = Path("/proc/self/schedstat")
"""Nanoseconds that our main thread has run, and that it has waited for a core while it could have run."""
CROWDED = 0.2
"""Waited so much for each second that it ran, we are not alone."""
LOOK = 50_000_000
"""Nanoseconds of running and waiting that a judgement is made of, at least."""


class Pace:
    """Says how long to rest after some work. Where the system does not tell how long we waited, we are never alone."""

    def __init__(self, stat: Path = SCHEDSTAT) -> None:
        self._stat = stat
        self._ran = self._waited = 0
        self._crowded = True

    @property
    def crowded(self) -> bool:
        """Whether others wanted the cores that we wanted, when we looked last."""
        try:
            ran, waited, *_ = map(int, self._stat.read_text().split())
        except (OSError, ValueError):
            return True
        if ran + waited - self._ran - self._waited >= LOOK:
            self._crowded = waited - self._waited > CROWDED * (ran - self._ran)
            self._ran, self._waited = ran, waited
        return self._crowded

    def rest(self, cost: float, share: float, alone: float = 1.0) -> float:
        """Seconds to rest after work that took `cost` seconds of a core, so that it takes no more than `share` of one
        when others want it, and `alone` when not."""
        share = share if self.crowded else alone
        return cost * (1 / share - 1)
