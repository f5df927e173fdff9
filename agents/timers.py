"""The timers of sleeping tasks, set anew from the log: the server may have lost them."""

from __future__ import annotations

import asyncio
import logging

from dspex.agents.vault import Vault
from dspex.agents.waiting import Waiting, times_of
from dspex.bus.client import Client
from dspex.bus.objects import NatsKeys, NatsObjects
from dspex.core import headers as h
from dspex.core.codec import decode_commit
from dspex.core.errors import InvalidInput, LogCorrupt
from dspex.core.ports import Log
from dspex.core.sealing import Guard
from dspex.core.standing import Standing
from dspex.core.subjects import Subjects, aggregate

__all__ = ["rearm"]

logger = logging.getLogger("dspex.agents")

AT_ONCE = 32


async def rearm(client: Client, log: Log, subjects: Subjects, standing: Standing) -> None:
    """Set the timer of every sleeping task; wake those whose time or signal has come. One too many changes nothing.
    Raises LogError."""
    asleep = list(standing.asleep.items())
    for start in range(0, len(asleep), AT_ONCE):
        some = asleep[start : start + AT_ONCE]
        await asyncio.gather(*(_rearm(client, log, subjects, standing, task, program) for task, program in some))


async def _rearm(
    client: Client, log: Log, subjects: Subjects, standing: Standing, task: int, program: str
) -> None:
    name = str(task)
    vault = Vault(NatsKeys(client, subjects), NatsObjects(client, subjects, program=program))
    waiting = Waiting(client, log, subjects, program, "", vault, Guard())
    try:
        submission = await log.entry(task)
        entries = await log.read(aggregate("task", program, name))
        events = [event for entry in entries for event in decode_commit(entry.body, entry.position)]
        times = times_of(events)
        if submission is not None:
            headers = {header.title(): value for header, value in submission.headers.items()}
            deadline = h.deadline_of(headers, submission.time)
            times += [deadline] if deadline is not None else []
        due = await waiting.due(name, events)
    except (LogCorrupt, InvalidInput) as error:
        logger.warning("task %s sleeps, and it is not known until when: %s", name, error)
        return
    if standing.asleep.get(task) != program:
        return  # it woke up meanwhile
    if times:
        await waiting.arm(name, min(times))
    if due is not None:
        await waiting.wake(name)
