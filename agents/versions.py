"""Tasks that need other code than this agent has: handed back until an agent with that code takes them, or until their
time is over.

A task needs a code version when its submission names one (`Dspex-Code`), or when its program drains (`on_change`) and
another version has begun it. Nothing is written meanwhile, so whoever dies here leaves the task as it was.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Protocol

from dspex.agents import logtime
from dspex.agents.failures import failed
from dspex.agents.run import Run
from dspex.agents.waiting import Waiting, Woken, times_of
from dspex.bus.client import Client
from dspex.bus.pull import ACK
from dspex.core import headers as h
from dspex.core.codec import decode_commit
from dspex.core.errors import DeadlineExceeded, ProgramFailed, TaskError
from dspex.core.events import Event, Payload
from dspex.core.ports import Log
from dspex.core.program import Program
from dspex.core.task import TaskState, fold

__all__ = ["Versions"]

logger = logging.getLogger("dspex.agents")

SOONEST, LATEST = 0.25, 10.0
"""Seconds until a task that was handed back is delivered again: a quarter of what it has waited, within these."""
MAX_SAID = 1024
"""Tasks of which it is remembered that the log of the process has told of them."""


class Ends(Protocol):
    """Who ends attempts."""

    async def settle(self, run: Run, payload: Payload) -> None: ...
    def acknowledge(self, run: Run) -> None: ...


class Versions:
    """What one agent does with the tasks that its code may not run. `ends` is who ends attempts."""

    def __init__(
        self, program: Program, code: str, client: Client, log: Log, waiting: Waiting,
        ends: Ends,
    ) -> None:  # fmt: skip
        self._program, self._code, self._client, self._log, self._waiting = program, code, client, log, waiting
        self._ends = ends
        self._said: dict[str, None] = {}

    def other(self, headers: dict[str, str] | None, state: TaskState | None = None) -> str:
        """The code version that the task needs, when it is not ours; else ""."""
        wanted = headers.get(h.CODE, "") if headers else ""
        if not wanted and state and self._program.on_change == "drain":
            wanted = state.code_version
        return wanted if wanted and wanted != self._code else ""

    async def hand_back(self, run: Run, wanted: str, headers: dict[str, str] | None) -> None:
        """Have the task delivered again later, unless it has ended, sleeps on, or has waited for too long."""
        entries = await self._log.read(run.aggregate)
        events = [event for entry in entries for event in decode_commit(entry.body, entry.position)]
        state = fold(events)
        run.head = state.head
        since = run.delivery.stored_at
        if state.ended:
            self._ends.acknowledge(run)
            return
        try:
            self._check_deadline(headers, since, wanted)
        except TaskError as error:
            await self._give_up(run, error)
            return
        if events:
            since = max(since, datetime.fromisoformat(events[-1].time).timestamp())
        if state.status == "sleeping":
            due = await self._waiting.due(run.id, events)
            if due is None:
                await self._see_it_woken(run, headers, events)
                self._client.acknowledge(run.delivery.message, ACK)
                return
            since = max(since, due)
        patience = self._patience(state, headers)
        if logtime.now() - since >= patience:
            await self._give_up(run, self._unavailable(wanted, patience))
            return
        self._say(run.id, wanted)
        await self.put_off(run, min(max((logtime.now() - since) / 4, SOONEST), LATEST))

    async def put_off(self, run: Run, delay: float) -> None:
        """Have the task delivered again after so many seconds."""
        if isinstance(run.delivery, Woken) and run.delivery.asleep:
            # This one ends, and another one comes. Not when a claim names this one: no other may stand for it.
            await self._waiting.arm(run.id, logtime.now() + delay)
            self._client.acknowledge(run.delivery.message, ACK)
        else:
            self._client.acknowledge(run.delivery.message, b'-NAK {"delay": %d}' % (delay * 1e9))

    async def _see_it_woken(self, run: Run, headers: dict[str, str] | None, events: list[Event]) -> None:
        """Set the timer again: whoever put the task to sleep may have died before he could see that it holds. A signal
        wakes it without one."""
        times = times_of(events)
        deadline = h.deadline_of(headers, run.delivery.stored_at) if headers else None
        if deadline is not None:
            times.append(deadline)
        if times:
            await self._waiting.arm(run.id, min(times))

    def _check_deadline(self, headers: dict[str, str] | None, stored_at: float, wanted: str) -> None:
        deadline = h.deadline_of(headers, stored_at) if headers else None
        if deadline is not None and deadline <= logtime.now():
            name = self._program.name
            raise DeadlineExceeded(f"the deadline passed while {name} waited for an agent with code {wanted}")

    def _patience(self, state: TaskState, headers: dict[str, str] | None) -> float:
        """Seconds that the task waits."""
        if headers and h.CODE in headers and state.status == "running":
            # Whoever has that code may be at work on it without a delivery, and silent for as long as a try may take.
            return max(self._program.drain_time, self._program.timeout)
        return self._program.drain_time

    def _unavailable(self, wanted: str, patience: float) -> TaskError:
        return ProgramFailed(
            f"the task needs code {wanted} of {self._program.name}, the agents here run {self._code}, and none with "
            f"{wanted} took it within {patience:g} s", type="CodeUnavailable",
        )  # fmt: skip

    async def _give_up(self, run: Run, error: TaskError) -> None:
        run.claimed = True  # no attempt begins
        await self._ends.settle(run, failed(error, 0.0))

    def _say(self, task: str, wanted: str) -> None:
        if task in self._said:
            return
        self._said[task] = None
        if len(self._said) > MAX_SAID:
            del self._said[next(iter(self._said))]
        logger.warning(
            "task %s of %s waits for an agent with code %s; this one runs %s",
            task, self._program.name, wanted, self._code,
        )  # fmt: skip
