"""Closes the stored doors when the log comes near to what it can have, and opens them again.

The registrar's leader looks once a second. What it decides is an event first and a change of the stream's subjects
then, so whoever leads after it finds the doors as they are to be. Publishers at a closed door have no responders:
nothing that was acknowledged is ever dropped, and the room that is left is for the commits of running tasks.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable

from dspex.agents.grounds import Ground
from dspex.agents.journal import record
from dspex.core.codec import decode_commit
from dspex.core.doors import Marks, closed_doors, doors_aggregate, over_marks, over_open
from dspex.core.errors import ConnectionFailed, LogError
from dspex.core.events import DoorsClosed, DoorsOpened
from dspex.core.subjects import Subjects

__all__ = ["Doorkeeper"]

logger = logging.getLogger("dspex.agents")

LOOK = 1.0
"""Seconds between two looks at how full the log is."""


class Doorkeeper:
    """Decides for the programs of one registrar. `programs` are those registered; `apply` brings the doors to what is
    decided; `closed` is why doors are closed, by program, "" for those of all."""

    def __init__(
        self, ground: Ground, subjects: Subjects, marks: Marks, source: str, programs: Callable[[], Iterable[str]],
        apply: Callable[[], Awaitable[object]],
    ) -> None:  # fmt: skip
        self._ground, self._subjects, self._marks, self._source = ground, subjects, marks, source
        self._programs, self._apply = programs, apply
        self._applied = True
        self.closed: dict[str, DoorsClosed] = {}

    def shut(self, programs: list[str]) -> frozenset[tuple[str, str]]:
        """The doors that are to be closed, as pairs of door and program."""
        return closed_doors(self.closed, programs)

    def said(self, program: str) -> str:
        """Why no new task of a program is taken; "" when they are."""
        why = self.closed.get("") or self.closed.get(program)
        return why.message if why else ""

    async def recall(self) -> None:
        """Learn from the log which doors are closed. Raises LogError."""
        self.closed, after = {}, 0
        while entries := await self._ground.log.scan(after, 1000, self._subjects.event("doors.*.0")):
            for entry in entries:
                for event in decode_commit(entry.body, entry.position):
                    if isinstance(event.data, DoorsClosed):
                        self.closed[event.data.program] = event.data
                    elif isinstance(event.data, DoorsOpened):
                        self.closed.pop(event.data.program, None)
            after = entries[-1].position

    async def work(self) -> None:
        """Look, decide and act, until cancelled."""
        while True:
            try:
                await self._look()
            except (LogError, ConnectionFailed, TimeoutError) as error:
                logger.debug("how full the log is cannot be seen: %s", error)
            await asyncio.sleep(LOOK)

    async def _look(self) -> None:
        level = await self._ground.level()
        if level is not None:
            before = "" in self.closed
            await self._change("", over_marks(self._marks, level, closed=before), level.used)
        for program in list(self._programs()) if self._marks.max_open is not None else ():
            tasks = await self._ground.waiting(program)
            before = program in self.closed
            await self._change(program, over_open(self._marks, program, tasks, closed=before), tasks)
        if not self._applied:
            await self._apply()
            self._applied = True

    async def _change(self, program: str, why: DoorsClosed | None, used: int) -> None:
        """Write down that doors close or open. Who dies before they do leaves it to the next leader, who reads that."""
        was = self.closed.get(program)
        if (why is None) == (was is None):
            return
        event = why or DoorsOpened(program=program, used=used, limit=was.limit if was else 0)
        await record(self._ground.log, doors_aggregate(program), [event], source=self._source)
        if why:
            logger.warning("%s", why.message)
            self.closed[program] = why
        else:
            logger.warning("new tasks%s are taken again", f" of {program}" if program else "")
            del self.closed[program]
        self._applied = False
