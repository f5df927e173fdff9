"""The timers of sleeping tasks, set anew from the log: the server may have lost them."""

from __future__ import annotations

import asyncio
import logging

from dspex.agents.vault import Vault
from dspex.agents.waiting import Waiting
from dspex.bus.client import Client
from dspex.bus.objects import NatsKeys, NatsObjects
from dspex.core import headers as h
from dspex.core.codec import decode_commit
from dspex.core.errors import InvalidInput, LogCorrupt, LogError
from dspex.core.events import TaskRetried, TaskSleeping
from dspex.core.ports import Log
from dspex.core.sealing import Guard
from dspex.core.standing import Standing
from dspex.core.subjects import Subjects, aggregate

__all__ = ["rearm"]

logger = logging.getLogger("dspex.agents")

AT_ONCE = 32


async def rearm(client: Client, log: Log, subjects: Subjects, standing: Standing) -> None:
    """Set the timer of every sleeping task; wake those that have a signal. One too many changes nothing. Raises
    LogError."""
    asleep = list(standing.asleep.items())
    for start in range(0, len(asleep), AT_ONCE):
        some = asleep[start : start + AT_ONCE]
        await asyncio.gather(*(_rearm(client, log, subjects, standing, task, program) for task, program in some))


async def _rearm(
    client: Client, log: Log, subjects: Subjects, standing: Standing, task: int, program: str
) -> None:
    name = str(task)
    vault = Vault(NatsKeys(client, subjects), NatsObjects(client, subjects))
    waiting = Waiting(client, log, subjects, program, "", vault, Guard())
    try:
        times = await _times(log, program, task)
        inbox = await log.last(aggregate("inbox", program, name))
    except (LogCorrupt, InvalidInput) as error:
        logger.warning("task %s sleeps, and it is not known until when: %s", name, error)
        return
    if standing.asleep.get(task) != program:
        return  # it woke up meanwhile
    if times:
        await waiting.arm(name, min(times))
    if inbox is not None:
        await waiting.wake(name)


async def _times(log: Log, program: str, task: int) -> list[float]:
    """When a sleeping task may go on: what its last commit says, and its deadline."""
    last, submission = await log.last(aggregate("task", program, task)), await log.entry(task)
    if last is None or submission is None:
        raise LogError(f"task {task} is open, and the log does not have it")
    times: list[float] = []
    for event in decode_commit(last.body, last.position):
        match event.data:
            case TaskSleeping(until=float() as until) | TaskRetried(until=float() as until):
                times.append(until)
            case _:
                pass
    deadline = h.deadline_of({name.title(): value for name, value in submission.headers.items()}, submission.time)
    return times if deadline is None else [*times, deadline]
