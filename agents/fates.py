"""What became of the process that held a task: read from the log of its agent, which its supervisor has written."""

from __future__ import annotations

import asyncio
import time

from dspex.core.codec import decode_commit
from dspex.core.events import AgentCrashed, AgentStarted, AgentStopped, Event
from dspex.core.ports import Log
from dspex.core.subjects import aggregate

__all__ = ["Fates"]

LOOK = 0.25
"""Seconds between looks at an agent's log, however many tasks of it are taken over."""
PATIENCE = 5.0
"""Seconds that a suspect waits for the word of what its last process died of."""
MAX_KNOWN = 1000
"""Agents whose events are remembered for that time."""


class Fates:
    """The ends of the processes of one program."""

    def __init__(self, log: Log, program: str) -> None:
        self._log, self._program = log, program
        self._read: dict[str, tuple[float, asyncio.Task[list[Event]]]] = {}

    async def of(self, agent: str, claimed_at: int, *, patience: float = 0.0) -> str | None:
        """Of what the process of an agent died that had claimed something at a position of the log; None when it did
        not, as far as the log says after `patience` seconds. Raises LogError."""
        until = time.monotonic() + patience
        while True:
            for event in await self._events(agent):
                if event.position > claimed_at and isinstance(event.data, (AgentCrashed, AgentStopped)):
                    return event.data.reason if isinstance(event.data, AgentCrashed) else None
            if time.monotonic() >= until:
                return None
            await asyncio.sleep(LOOK)

    async def is_over(self, agent: str, claimed_at: int) -> bool:
        """Whether the process of an agent that had claimed something at a position has ended, however. Another one of
        its name begins only when it has. Raises LogError."""
        ends = (AgentCrashed, AgentStopped, AgentStarted)
        return any(e.position > claimed_at and isinstance(e.data, ends) for e in await self._events(agent))

    async def _events(self, agent: str) -> list[Event]:
        now = time.monotonic()
        read_at, reading = self._read.get(agent, (-LOOK, None))
        if reading is None or now - read_at >= LOOK:
            reading = asyncio.create_task(self._look(agent))
            self._read.pop(agent, None)
            self._read[agent] = now, reading
            if len(self._read) > MAX_KNOWN:
                del self._read[next(iter(self._read))]
        return await asyncio.shield(reading)

    async def _look(self, agent: str) -> list[Event]:
        entries = await self._log.read(aggregate("agent", self._program, agent))
        return [event for entry in entries for event in decode_commit(entry.body, entry.position)]
