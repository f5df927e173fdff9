"""How long a loop has stood still by its own doing: the time in which its thread waited for a core does not count."""

from __future__ import annotations

import threading
from pathlib import Path

__all__ = ["Stillness"]


class Stillness:
    """Made in the thread that is watched. `stat` is where the kernel says how many nanoseconds that thread has run, and
    waited for a core while it could have run (Linux; elsewhere all time counts)."""

    def __init__(self, stat: Path | None = None) -> None:
        self._stat = stat or Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
        self._pulse = self._waited_then = 0.0

    def seconds(self, pulse: float, now: float) -> float:
        """Since its `pulse`, which is what it shows when it goes round. To be asked now and then in between."""
        waited = self._waited()
        if pulse != self._pulse:
            self._pulse, self._waited_then = pulse, waited
        return now - pulse - (waited - self._waited_then)

    def _waited(self) -> float:
        try:
            return int(self._stat.read_text().split()[1]) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0
