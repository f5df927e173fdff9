"""How long an agent that is told to end waits for the tasks it has: it may be told to hurry while it waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

__all__ = ["Patience"]


class Patience:
    """So many `seconds` from when the waiting begins, and fewer from when they are cut."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._until: float | None = None
        self._cut = asyncio.Event()

    def cut(self, seconds: float) -> None:
        """Wait no longer than so many seconds from now."""
        if seconds < self.seconds:
            self.seconds = seconds
            if self._until is not None:
                self._until = min(self._until, asyncio.get_running_loop().time() + seconds)
            self._cut.set()

    async def wait(self, tasks: Iterable[asyncio.Task[Any]]) -> None:
        """Wait until all have ended or the patience is over; none is cancelled."""
        loop = asyncio.get_running_loop()
        self._until = loop.time() + self.seconds
        left = set(tasks)
        while left and (seconds := self._until - loop.time()) > 0:
            self._cut.clear()
            cut = loop.create_task(self._cut.wait())
            await asyncio.wait([cut, *left], timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            cut.cancel()
            left = {task for task in left if not task.done()}
