"""The views beside the archive: brought up to date from it, a group at a time, when the machine has time.

The archivist is the only process that opens `views.db`. Nothing waits for the views but questions, and a question may
hurry them: it says up to which position of the log it wants to know.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from dspex.agents.pace import Pace
from dspex.core.codec import events_of
from dspex.core.errors import LogCorrupt, LogError, Unavailable
from dspex.core.events import Event
from dspex.core.subjects import Subjects
from dspex.store.archive import Archive
from dspex.store.chain import GAP, Row, entry_of
from dspex.store.costs import COSTS
from dspex.store.due import DUE
from dspex.store.projections import Projection, Views, damaged, throw_away
from dspex.store.reading import SELECT, connect, finished
from dspex.store.snapshots import SNAPSHOTS
from dspex.store.tasks import TASKS, TEXT

__all__ = ["PROJECTIONS", "VIEWS", "Projecting"]

logger = logging.getLogger("dspex.agents")

T = TypeVar("T")

VIEWS = "views.db"
PROJECTIONS: tuple[Projection, ...] = (TASKS, TEXT, SNAPSHOTS, DUE, COSTS)
"""What every archive has beside it; one more is one more line here."""
MAX_GROUP = 1000
"""Rows of the archive that are taken in by one transaction."""
GROUP_BYTES = 8 << 20
SHARE, ALONE = 0.05, 0.5
"""The share of a core that the views take while nobody waits for them: when others want it, and when it is idle."""
PAUSE = 0.5
"""Seconds between looks while nothing is new, and between tries after trouble."""
PATIENCE = 3.0
"""Seconds that a question waits for the views to know what it asks about."""


class Projecting:
    """Keeps the views of one archive. `trouble` says why they do not go on, "" when they do."""

    def __init__(
        self, file: Path, subjects: Subjects, pace: Pace, projections: tuple[Projection, ...] = PROJECTIONS
    ) -> None:
        self.file, self.trouble, self._pace = file, "", pace
        self._subjects, self._projections = subjects, projections
        self._views: Views | None = None
        self._rows: sqlite3.Connection | None = None
        self._archive: Archive | None = None
        self._one = asyncio.Lock()
        self._hurry, self._moved = asyncio.Event(), asyncio.Event()

    @property
    def position(self) -> int:
        """Up to where all of them are."""
        return self._views.position if self._views else 0

    async def go_on(self, archive: Archive) -> None:
        """Bring the views forward as the archive grows, until cancelled."""
        self._archive = archive
        try:
            while True:
                try:
                    await self._follow(archive)
                except (sqlite3.Error, LogError, OSError) as error:
                    self._say(f"{self.file} does not go on ({error}); what is new waits in the archive")
                    await self._close(remove=isinstance(error, sqlite3.Error) and damaged(error))
                    await asyncio.sleep(PAUSE)
        finally:
            self._archive = None
            await self._close()

    async def with_views(self, work: Callable[[Views, sqlite3.Connection], T], position: int = 0) -> T:
        """Do something with the views and the archive's rows, once the views know the log up to `position`, or as far
        as they come in `PATIENCE`. Raises Unavailable when there are none now."""
        await self._reach(position)
        async with self._one:
            views, rows = self._views, self._rows
            if views is None or rows is None:
                raise Unavailable(self.trouble or "the archive is not open now; try again")
            return await finished(asyncio.to_thread(work, views, rows))

    # -- inside

    async def _reach(self, position: int) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE
        while (self._views is None or self.position < position) and loop.time() < until:
            self._moved.clear()
            self._hurry.set()
            if self._archive is not None and self._archive.position < position:
                self._archive.hurry()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), min(0.1, until - loop.time()))

    async def _follow(self, archive: Archive) -> None:
        await self._open(archive)
        while True:
            started = time.thread_time()
            async with self._one:
                more, cost = await finished(asyncio.to_thread(self._group))
            self.trouble = ""
            self._moved.set()
            cost += time.thread_time() - started
            if not more and not await self._wait(archive.grown, PAUSE):
                continue
            archive.grown.clear()
            await self._wait(self._hurry, self._pace.rest(cost, SHARE, ALONE))
            self._hurry.clear()

    @staticmethod
    async def _wait(event: asyncio.Event, seconds: float) -> bool:
        try:
            await asyncio.wait_for(event.wait(), seconds)
        except TimeoutError:
            return False
        return True

    def _group(self) -> tuple[bool, float]:
        """Take in one group; whether more is known to wait, and the seconds of a core that it took."""
        started = time.thread_time()
        views, rows = self._views, self._rows
        assert views is not None and rows is not None
        if not views.going:
            return False, 0.0
        until = views.until()
        events: list[Event] = []
        count = size = 0
        last: Row | None = None
        bound = f"AND position <= {until}" if until is not None else ""
        where = f"WHERE position > ? {bound} ORDER BY position LIMIT {MAX_GROUP}"
        for values in rows.execute(f"{SELECT} {where}", (views.position,)):
            last = Row._make(values)
            count, size = count + 1, size + len(last.body)
            if last.subject != GAP:
                with suppress(LogCorrupt):  # nothing that we could make a table of
                    events += events_of(entry_of(last), self._subjects)
            if size > GROUP_BYTES:
                break
        if last is not None:
            views.advance(events, last.position, last.chain.hex())
        more = until is not None or count == MAX_GROUP or size > GROUP_BYTES
        return more, time.thread_time() - started

    async def _open(self, archive: Archive) -> None:
        def opened() -> tuple[Views, sqlite3.Connection]:
            rows = connect(archive.file, readonly=True)

            def mark_at(position: int) -> str | None:
                row = rows.execute("SELECT chain FROM log WHERE position = ?", (position,)).fetchone()
                return row[0].hex() if row else None

            try:
                views = Views(self.file, self._projections, epoch=archive.epoch)
                views.fit(mark_at)
            except BaseException:
                rows.close()
                raise
            return views, rows

        async with self._one:
            if self._views is None:
                self._views, self._rows = await finished(asyncio.to_thread(opened))

    async def _close(self, *, remove: bool = False) -> None:
        async with self._one:
            views, self._views = self._views, None
            rows, self._rows = self._rows, None
            for each in (views, rows):
                if each is not None:
                    await finished(asyncio.to_thread(each.close))
            if remove:
                logger.warning("%s is damaged; it is made again from the archive", self.file)
                await asyncio.to_thread(throw_away, self.file)

    def _say(self, trouble: str) -> None:
        if trouble != self.trouble:  # said once, not at every try
            logger.warning(trouble)
        self.trouble = trouble
