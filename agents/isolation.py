"""In what company tasks run in one agent: a suspect with few others, or with nothing else in the process.

While somebody runs alone, or waits for the neighbours to end so that it can, the agent asks for no more tasks, and what
has come already waits at the entrance. Every run passes the entrance and says there that it goes on without giving way
in between, so that whoever is alone stays alone.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping

from dspex.agents import logtime
from dspex.agents.run import Run
from dspex.core.suspicion import Company, few

__all__ = ["Isolation"]

logger = logging.getLogger("dspex.agents")

LOOK = 0.02
"""Seconds between looks whether the neighbours have ended."""
PATIENCE = 15.0
"""Seconds that a suspect waits for that the first time; then the agent goes on, and it is delivered elsewhere."""
ELSEWHERE = 2.0
"""Seconds until then."""


class Isolation:
    """`running` are all runs of the agent, `hold` stops or resumes the taking of tasks, `worn` says that something goes
    on in the process that cannot be stopped: nobody is alone there."""

    def __init__(
        self, slots: int, running: Mapping[int, Run], hold: Callable[[bool], None], worn: Callable[[], bool]
    ) -> None:
        self._running, self._hold, self._worn = running, hold, worn
        self._few = asyncio.Semaphore(few(slots))
        self._turn = asyncio.Lock()
        self._wanted = 0
        self._open = asyncio.Event()
        self._open.set()

    @property
    def closed(self) -> bool:
        """Whether who comes now has to wait at the entrance."""
        return not self._open.is_set()

    async def enter(self, run: Run) -> None:
        """Wait until nobody is alone, nor wants to be."""
        waiting = self.closed and _Waiting(run)
        while self.closed:
            await self._open.wait()
        if waiting:
            waiting.over()

    async def join(self, run: Run, company: Company, pause: float) -> bool:
        """Wait for the company in which the run may go on; False when the neighbours do not end. `leave` it then."""
        if company is Company.ANY:
            return True
        waiting = _Waiting(run)
        try:
            if company is Company.FEW:
                await self._few.acquire()
                run.company = Company.FEW
                while self.closed:
                    await self._open.wait()
                return True
            await asyncio.sleep(pause)
            return await self._be_alone(run)
        finally:
            waiting.over()

    def leave(self, run: Run) -> None:
        """The run has ended, or goes no further."""
        company, run.company = run.company, Company.ANY
        if company is Company.FEW:
            self._few.release()
        elif company is Company.NONE:
            self._turn.release()
            self._reopen()

    async def _be_alone(self, run: Run) -> bool:
        self._wanted += 1
        if not self.closed:
            self._open.clear()
            self._hold(True)
        try:
            await self._turn.acquire()
        except BaseException:
            self._reopen()
            raise
        run.company = Company.NONE
        until = time.monotonic() + min(PATIENCE * 2 ** min(run.delivery.delivered, 8) / 4, run.patience)
        while self._worn() or any(_goes_on(other) for other in self._running.values() if other is not run):
            if self._worn() or time.monotonic() > until:
                return False
            await asyncio.sleep(LOOK)
        return True

    def _reopen(self) -> None:
        self._wanted -= 1
        if not self._wanted:
            self._open.set()
            self._hold(False)


class _Waiting:
    """A run that waits takes no time of its own: only the deadline of its task ends it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._began, self._left = time.monotonic(), run.expires - time.monotonic()
        run.waiting = True
        run.claimed = True  # if it ends here, no attempt has begun
        run.expires = math.inf if run.deadline is None else self._began + max(0.0, run.deadline - logtime.now())

    def over(self) -> None:
        run = self._run
        if run.abandoned:
            return
        run.waiting = run.claimed = False
        run.started = time.monotonic()
        run.expires = run.started + self._left


def _goes_on(run: Run) -> bool:
    """Whether code of a program runs for it."""
    return not (run.waiting or run.settling)
