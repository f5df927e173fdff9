"""What the log may forget: tasks that have ended, are archived, and are past the bounds.

First the submission goes, then the events of the task, and only then is it noted that they went; so whoever dies in
between, the same is done again, and doing it twice changes nothing. The newest entry never goes: a log that lost it
would give its position away again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec

from dspex.agents.bounds import Bounds
from dspex.bus.client import Client
from dspex.bus.streams import RESTORED, jetstream_api
from dspex.core.codec import NOT_JSON, decode_commit
from dspex.core.errors import LogCorrupt, LogError
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects, aggregate
from dspex.core.task import fold
from dspex.store.archive import Archive
from dspex.store.mend import REACHED

__all__ = ["Forgetting"]

logger = logging.getLogger("dspex.agents")

EVERY = 5.0
PAGE = 500
PAUSE = 0.002
"""Seconds after each task, so that forgetting never takes the server's time from working."""
GONE = {10043, 10037, 10057}
"""JetStream's words for a message that is not there."""
NOTE = "forgotten"
"""Under this name the archive has the position up to which nothing is left to forget."""


class Forgetting:
    """Lets one log forget what one archive has. `on_forgotten` hears how many tasks went."""

    def __init__(
        self, client: Client, subjects: Subjects, archive: Archive, bounds: Bounds, on_forgotten: Callable[[int], None]
    ) -> None:
        self._client, self._subjects, self._archive = client, subjects, archive
        self._bounds, self._on_forgotten = bounds, on_forgotten
        self._after, self._note = -1, NOTE
        self._kept: set[int] = set()

    async def go_on(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            if self._bounds.any:
                try:
                    await self.once()
                except LogError as error:
                    logger.warning("the log could not forget: %s", error)

    async def once(self) -> int:
        """Forget all that may go now, oldest first; how many tasks that was. Raises LogError."""
        if self._after < 0:
            info = await self._info()
            # A log that was restored has again what it had been let forget.
            self._note = f"{NOTE}.{info['config'].get('metadata', {}).get(RESTORED, 0)}"
            self._after = int(await self._archive.noted(self._note) or 0)
        state, gone, now = await self._state(), 0, time.time()
        for position in sorted(self._kept):
            entry = await self._archive.entry(position)
            if entry is None or await self._look_at(entry, state, now):
                self._kept.discard(position)
                gone += 1
                state = await self._state()
        while entries := await self._archive.scan(self._after, PAGE):
            await self._archive.note(REACHED, str(entries[-1].position))  # before anything of it goes
            for entry in entries:
                if not self._too_much(state) and self._too_young(entry.time, now):
                    return await self._noted(gone)  # whatever comes later is younger still
                went = await self._look_at(entry, state, now)
                if went:
                    gone += 1
                    state = await self._state() if self._too_much(state) else state
                elif went is False:
                    self._kept.add(entry.position)
                self._after = entry.position
            await self._noted(gone)
        return await self._noted(gone)

    async def _noted(self, gone: int) -> int:
        """Note how far we are, and from where a successor has to look:
        before that nothing is left to forget."""
        await self._archive.note(self._note, str(min(self._kept, default=self._after + 1) - 1))
        return gone

    async def _look_at(self, entry: Entry, state: dict[str, Any], now: float) -> bool | None:
        """Forget what an entry is about if it may go. Whether it went; None when it is none of ours to forget."""
        task = self._task_of(entry)
        if task is None:
            return None
        if not await self._may_go(*task, state, now):
            return False
        if not await self._forget(entry, *task):
            return False
        self._on_forgotten(1)
        await asyncio.sleep(PAUSE)
        return True

    # -- deciding

    def _too_much(self, state: dict[str, Any]) -> bool:
        count, size = self._bounds.count, self._bounds.bytes
        return (count is not None and state["messages"] > count) or (size is not None and state["bytes"] > size)

    def _too_young(self, when: float, now: float) -> bool:
        return self._bounds.age is None or now - when < self._bounds.age

    def _task_of(self, entry: Entry) -> tuple[str, str] | None:
        """The program and the task that a door message is about; None for everything else."""
        door = self._subjects.door_of(entry.subject)
        if door is None:
            return None
        kind, program = door
        if kind == "task":
            return program, str(entry.position)
        try:
            task = str(msgspec.json.decode(entry.body).get("task"))
        except (*NOT_JSON, AttributeError):
            return None
        return (program, task) if task.isdecimal() and len(task) < 19 else None

    async def _may_go(self, program: str, task: str, state: dict[str, Any], now: float) -> bool:
        last = await self._archive.last(aggregate("task", program, task))
        if last is None or last.position >= min(self._archive.position, int(state["last_seq"])):
            return False
        try:
            ended = fold(decode_commit(last.body, last.position)).ended
        except LogCorrupt:
            return False
        return ended and (self._too_much(state) or not self._too_young(last.time, now))

    # -- forgetting

    async def _forget(self, entry: Entry, program: str, task: str) -> bool:
        """Forget one door message and, when it is a submission, all that its task has; False when it must stay."""
        if entry.position >= self._archive.position:
            return False
        stream = self._subjects.stream
        what = {"seq": entry.position, "no_erase": True}
        _refuse(await jetstream_api(self._client, f"STREAM.MSG.DELETE.{stream}", what))
        if entry.position == int(task):
            for kind in ("task", "inbox", "dlq"):
                # Not past what is archived: nothing is written to a task that has ended, and if it were, it would stay.
                pattern = self._subjects.event(aggregate(kind, program, task))
                purge = {"filter": pattern, "seq": self._archive.position}
                _refuse(await jetstream_api(self._client, f"STREAM.PURGE.{stream}", purge))
        return True

    async def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = (await self._info())["state"]
        return state

    async def _info(self) -> dict[str, Any]:
        answer = await jetstream_api(self._client, f"STREAM.INFO.{self._subjects.stream}")
        if "error" in answer:
            raise LogError(f"the stream cannot be looked at: {answer['error'].get('description', '')}")
        return answer


def _refuse(answer: dict[str, Any]) -> None:
    """Raises LogError unless something went or was gone already."""
    error = answer.get("error")
    if error and error.get("err_code") not in GONE:
        raise LogError(f"JetStream refused to forget: {error.get('description', 'no reason given')}")
