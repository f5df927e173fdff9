"""The door `dspex.privacy.forget`: what a task holds is forgotten on somebody's word, and the log says so."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol

import msgspec

from dspex.agents.beside import Beside, task_is_sealed
from dspex.agents.journal import record
from dspex.agents.reader import kept_submission
from dspex.bus.client import Client
from dspex.bus.service import Request
from dspex.core.codec import NOT_JSON, decode_commit
from dspex.core.errors import Conflict, InvalidInput, LogError, NotFound, Unavailable
from dspex.core.events import TaskForgotten
from dspex.core.ports import Log
from dspex.core.subjects import Subjects, aggregate
from dspex.core.task import fold
from dspex.store.archive import Archive

__all__ = ["Forgetter"]

PATIENCE = 10.0
"""Seconds that the archive has to come to where the log is."""
MAX_WORDS = 1000
"""Characters of who and why."""


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    task: int | str
    reason: str = ""
    actor: str = ""
    force: bool = False


class Open(Protocol):
    """Who has an archive open, or not just now."""

    archive: Archive | None
    beside: Beside | None


class Forgetter:
    """Answers the door for the one archivist that leads."""

    def __init__(self, client: Client, log: Log, subjects: Subjects, source: str, of: Open) -> None:
        self._client, self._log, self._subjects, self._source, self._of = client, log, subjects, source, of

    async def forget(self, request: Request) -> None:
        """Write down that a task is forgotten, then forget it: who dies in between is followed by one who reads it."""
        try:
            wanted = msgspec.json.decode(request.data, type=_Wanted)
        except NOT_JSON as error:
            raise InvalidInput(f"the request is not understood: {error}") from None
        task = str(wanted.task)
        if len(wanted.reason) > MAX_WORDS or len(wanted.actor) > MAX_WORDS:
            raise InvalidInput(f"who and why have at most {MAX_WORDS:,} characters each")
        if not (task.isascii() and task.isdecimal() and len(task) < 19):
            raise InvalidInput(f"{task[:40]!r} is no task's id, which is a number")
        try:
            await self._forget(request, wanted, task)
        except LogError as error:
            raise Unavailable(str(error)) from None

    async def _forget(self, request: Request, wanted: _Wanted, task: str) -> None:
        archive, beside = self._of.archive, self._of.beside
        if archive is None or beside is None:
            raise Unavailable("the archive is not open now; `dspex doctor` says why")
        program = await self._program_of(archive, task)
        await self._wait_for(archive)
        entry = await self._log.last(aggregate("task", program, task)) or await archive.last(
            aggregate("task", program, task)
        )
        ended = bool(entry and fold(decode_commit(entry.body, entry.position)).ended)
        if not ended and not wanted.force:
            raise Conflict(f"task {task} has not ended; wait for it, or say --force: it will then fail", task=task)
        privacy = aggregate("privacy", program, task)
        known = await self._log.last(privacy)
        if known is None and ended and not await task_is_sealed(archive, self._subjects, program, task):
            raise Conflict(
                f"nothing of task {task} is sealed, for {program} has no Private field; what the log and the archive "
                "hold in the open cannot be taken out of them", task=task,
            )  # fmt: skip
        event = TaskForgotten(task=task, actor=wanted.actor or "somebody", reason=wanted.reason)

        async def write_down() -> None:
            await record(self._log, privacy, [event], source=self._source, causation=task)

        gone = await beside.forget(program, task, write_down if known is None else None)
        body = {"task": task, "program": program, **msgspec.to_builtins(gone)}
        request.respond(msgspec.json.encode(body))

    async def _wait_for(self, archive: Archive) -> None:
        """Let the archive come to where the log is now."""
        until, head = time.monotonic() + PATIENCE, await self._log.head()
        while archive.position < head:
            if time.monotonic() > until:
                raise Unavailable(f"the archive is at {archive.position} and the log at {head}; try again")
            await asyncio.sleep(0.05)

    async def _program_of(self, archive: Archive, task: str) -> str:
        found = await self._log.entry(int(task)) or await kept_submission(self._log, self._subjects, task)
        found = found or await archive.entry(int(task))
        door = self._subjects.door_of(found.subject) if found else None
        if door is None or door[0] != "task":
            raise NotFound(f"neither the log nor the archive has a task {task}")
        return door[1]
