"""One task, worked on in this process by code that the system's agents need not have.

The task is claimed, recorded and committed as an agent would. What differs is that no consumer delivers it: the agents
hand its delivery back for as long as it has not ended, and when this process dies somebody begins another one.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from datetime import datetime
from typing import Any
from weakref import WeakKeyDictionary

from dspex.agents.patience import Patience
from dspex.agents.registered import Registered
from dspex.agents.waiting import Given
from dspex.agents.worker import Worker
from dspex.bus.client import Client
from dspex.core.codec import decode_commit
from dspex.core.effects import branching
from dspex.core.errors import LogError, NotFound
from dspex.core.events import Event
from dspex.core.ports import Entry, Log
from dspex.core.program import Program
from dspex.core.subjects import Subjects, aggregate
from dspex.core.task import TaskState, fold

__all__ = ["work_alone"]

logger = logging.getLogger("dspex.agents")

_at_work: WeakKeyDictionary[asyncio.AbstractEventLoop, tuple[int, Any]] = WeakKeyDictionary()
"""In which loops tasks are worked on, how many, and the task factory that the loop had before."""

LIMITS_WAIT = 2.0
"""Seconds for the limiter to answer."""
LOOK = 0.25
"""Seconds between two looks at a task that sleeps, or that another has taken."""


class _Room:
    """Slots for one who works on one task."""

    since = 0.0

    def release(self) -> None:
        """There is always room for the next attempt."""


async def work_alone(
    task: str, program: Program, *, code: str, client: Client, place: Registered, subjects: Subjects,
    again: bool = False, master: bytes = b"",
) -> TaskState:  # fmt: skip
    """Work on a task until it has ended, and give how. `again`: somebody has begun it before, and died; `master` is the
    master key of private values. Raises NotFound, LogError, ConnectionFailed, and whatever `setup` raises."""
    log = place.log(client, subjects, program.name)
    entry = await log.entry(int(task))
    if entry is None or subjects.door_of(entry.subject) != ("task", program.name):
        raise NotFound(f"{program.name} has no task {task}")
    await asyncio.to_thread(program.prepare)
    agent = f"{program.name}-fork-{secrets.token_hex(3)}"
    worker = Worker(
        program, agent=agent, code=code, client=client, log=log, subjects=subjects,
        on_worn=lambda why: logger.warning(why), place=place, master=master,
    )  # fmt: skip
    worker.keep_time()
    await worker.limits.begin(patience=LIMITS_WAIT)
    _number_branches(1)
    try:
        if not again:
            await _attempt(worker, entry, 1)
        while True:
            try:
                events = await _events(log, program.name, task)
                state = fold(events)
                if state.ended:
                    return state
                ready = again or _is_free(worker, state, events)
                if ready and not await _sleeps_on(worker, task, state, events):
                    again = False
                    # The agents look after it from here on: a task that slept has no delivery but its wakes.
                    await worker.waiting.wake(task)
                    await _attempt(worker, entry, 2)
            except LogError as error:
                logger.warning("task %s: %s It will be tried again.", task, error)
            await asyncio.sleep(LOOK)
    finally:
        await worker.drain(Patience(0.0))
        await worker.limits.finish()
        _number_branches(-1)


def _number_branches(change: int) -> None:
    """Have the loop number the branches of runs, for as long as one of us works in it."""
    loop = asyncio.get_running_loop()
    working, factory = _at_work.get(loop, (0, loop.get_task_factory()))
    if working + change:
        _at_work[loop] = working + change, factory
        loop.set_task_factory(branching)
    else:
        del _at_work[loop]
        loop.set_task_factory(factory)


async def _events(log: Log, program: str, task: str) -> list[Event]:
    entries = await log.read(aggregate("task", program, task))
    return [event for each in entries for event in decode_commit(each.body, each.position)]


async def _attempt(worker: Worker, entry: Entry, delivered: int) -> None:
    """One attempt, up to its commit. A connection that failed is waited for by the next look at the log."""
    nobody = f"_INBOX.{secrets.token_hex(11)}".encode()
    worker.take(Given(entry, nobody, delivered), _Room())
    while entry.position in worker.running:
        run = worker.running[entry.position]
        if run.task:
            await asyncio.wait([run.task], timeout=LOOK)
        if entry.position in worker.running:  # its end is still being written
            await asyncio.sleep(0.02)


async def _sleeps_on(worker: Worker, task: str, state: TaskState, events: list[Event]) -> bool:
    return state.status == "sleeping" and await worker.waiting.due(task, events) is None


def _is_free(worker: Worker, state: TaskState, events: list[Event]) -> bool:
    """Whether nobody else has the task, or has been silent for longer than a try may take."""
    if state.status != "running" or state.agent == worker.agent:
        return True
    since = datetime.fromisoformat(events[-1].time).timestamp()
    return time.time() - since > worker.program.timeout
