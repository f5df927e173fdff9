"""Wakes tasks whose timer or wake is gone: its stream was lost, or came back older than it was, or an acknowledgement
that was late took it away from whoever held it.

Timers are the server's. What the log says of a sleeping task is in the archive's views, so whoever sleeps past his time
is found there and woken, and so is who was woken and neither ends nor sleeps again. One wake too many changes nothing:
an agent looks at the task, and at who holds it, before it takes it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time

from dspex.agents.projecting import Projecting
from dspex.agents.vault import Vault
from dspex.agents.waiting import Waiting
from dspex.bus.client import Client
from dspex.bus.objects import NatsKeys, NatsObjects
from dspex.bus.streams import consumer_name, jetstream_api
from dspex.core.errors import ConnectionFailed, LogError, Unavailable
from dspex.core.ports import Log
from dspex.core.sealing import Guard
from dspex.core.subjects import Subjects
from dspex.store.due import overdue
from dspex.store.projections import Views

__all__ = ["Overdue"]

logger = logging.getLogger("dspex.agents")

EVERY = 30.0
"""Seconds between looks."""
LATE = 30.0
"""Seconds past its time after which a timer is taken to be gone."""
PAGE = 1000
"""Tasks that are woken at one look; the others are still there at the next."""
AT_ONCE = 32


class Overdue:
    """Looks after the sleeping tasks of one log."""

    def __init__(self, projecting: Projecting, client: Client, log: Log, subjects: Subjects, source: str) -> None:
        self._projecting, self._client, self._log = projecting, client, log
        self._subjects, self._source = subjects, source

    async def go_on(self) -> None:
        """Look, and look again, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            try:
                await self.once()
            except (LogError, ConnectionFailed, Unavailable, sqlite3.Error) as error:
                logger.debug("sleeping tasks are looked at later: %s", error)

    async def once(self, late: float = LATE) -> int:
        """Wake who should have been woken more than `late` seconds ago; how many. Raises LogError, Unavailable."""

        def work(views: Views, _: sqlite3.Connection) -> list[dict[str, list[str]]]:
            return [overdue(views, time.time() - late, PAGE, claimed=claimed) for claimed in (False, True)]

        asleep, woken = await self._projecting.with_views(work)
        return await self._wake(asleep, logging.WARNING, "slept past their time") + await self._wake(
            woken, logging.DEBUG, "were woken and have not ended"
        )

    async def _wake(self, found: dict[str, list[str]], level: int, why: str) -> int:
        count = 0
        for program, tasks in found.items():
            if await self._wakes_wait(program):
                continue  # nobody takes them now: one more for each would only heap up
            objects = NatsObjects(self._client, self._subjects, program=program)
            vault = Vault(NatsKeys(self._client, self._subjects), objects)
            waiting = Waiting(self._client, self._log, self._subjects, program, self._source, vault, Guard())
            logger.log(level, "%d tasks of %s %s: they are woken now", len(tasks), program, why)
            for start in range(0, len(tasks), AT_ONCE):
                await asyncio.gather(*(waiting.wake(task) for task in tasks[start : start + AT_ONCE]))
            count += len(tasks)
        return count

    async def _wakes_wait(self, program: str) -> bool:
        stream, consumer = self._subjects.timers(program), consumer_name(program, "wake")
        info = await jetstream_api(self._client, f"CONSUMER.INFO.{stream}.{consumer}")
        return "error" in info or bool(info["num_pending"])
