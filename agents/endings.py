"""How an attempt ends: the commit, and what may leave the process only when the log has it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from dspex.agents import logtime
from dspex.agents.guards import erase_entry
from dspex.agents.results import Results
from dspex.agents.run import Run
from dspex.agents.waiting import TIMER_SLACK, Waiting
from dspex.agents.writer import Superseded
from dspex.bus.client import Client
from dspex.bus.pull import ACK
from dspex.core.codec import decode_commit
from dspex.core.errors import ConnectionFailed, LogError, NotFound
from dspex.core.events import Payload, TaskCompleted, TaskDuplicate, TaskRetried
from dspex.core.ports import Appended, Conflict, Log
from dspex.core.sealing import INLINE
from dspex.core.subjects import Subjects
from dspex.core.task import fold

__all__ = ["ENVELOPE", "Endings"]

logger = logging.getLogger("dspex.agents")

ENVELOPE = 4096
"""Bytes kept free beside an output for the rest of its commit."""
DUPLICATE_WAIT = 60.0
"""Seconds that a duplicate's caller waits for the original's answer."""
ERASE_AGAIN = 10.0
"""Seconds until a message that could not be erased is tried again."""


class Endings:
    """Ends attempts, and counts the tasks that ended: `done` of all, `failed` of those without an output.

    `beside` runs what nobody waits for, within a bound; `on_done` hears of each that ended, `on_death` when a death of
    an earlier attempt was found.
    """

    def __init__(
        self, client: Client, log: Log, subjects: Subjects, results: Results, waiting: Waiting,
        beside: Callable[[Coroutine[Any, Any, None]], None],
    ) -> None:  # fmt: skip
        self.client, self.log, self.results, self.waiting, self._beside = client, log, results, waiting, beside
        self._subjects = subjects
        self.done = self.failed = 0
        self.on_done: Callable[[], None] = lambda: None
        self.on_death: Callable[[], object] = lambda: None

    async def settle(self, run: Run, payload: Payload) -> None:
        """Commit how the task ended; when the log has it, acknowledge and answer."""
        rest: Sequence[Payload] = ()
        if run.recorder:
            taken = min(len(bytes(payload.output)), 3 * INLINE) if isinstance(payload, TaskCompleted) else 0
            rest = await run.recorder.rest(max(0, self.client.max_payload - ENVELOPE - taken))
        if isinstance(payload, TaskRetried):
            await self.waiting.arm(run.id, payload.until)
        payloads = run.claimed_by((*rest, payload))
        kept = await run.put_away(payloads)
        events = run.events(kept)
        result = await self.log.append(run.aggregate, events, run.head)
        if not isinstance(result, Appended):
            logger.info("task %s: another attempt was first; this one ends without a trace", run.id)
            entry = await self.log.last(run.aggregate)
            if entry and fold(decode_commit(entry.body, entry.position)).ended:
                self.acknowledge(run)
            return
        if isinstance(payload, TaskRetried):
            await self._wake_if_late(run, payload.until)
            self.client.acknowledge(run.delivery.message, ACK)
            return
        self.acknowledge(run)
        self.done += 1
        self.on_done()
        if isinstance(payload, TaskDuplicate):
            if run.reply:
                self._beside(self._answer_as(run.reply, payload.of))
            return
        if not isinstance(payload, TaskCompleted):
            self.failed += 1
        if run.reply:
            whole = events if kept is payloads else run.events([payload])
            answer = self.results.answer(fold(whole), kept[-1], run.id)
            assert answer is not None, "a task that ended has an answer"
            self.client.publish(run.reply, answer[0], headers=answer[1])

    def acknowledge(self, run: Run) -> None:
        """Acknowledge a task that has ended. A message with a private input in the open is erased before that: who dies
        in between leaves one that is delivered again, to somebody who finds the task ended and erases it."""
        if run.erase:
            self._beside(self._erase(run))
        else:
            self.client.acknowledge(run.delivery.message, ACK)

    async def _erase(self, run: Run) -> None:
        try:
            await erase_entry(self.log, self.client, self._subjects, int(run.id))
        except (LogError, ConnectionFailed, TimeoutError) as error:
            logger.warning("the input of task %s is to be erased, and that will be tried again: %s", run.id, error)
            self.client.acknowledge(run.delivery.message, b'-NAK {"delay": %d}' % (ERASE_AGAIN * 1e9))
        else:
            self.client.acknowledge(run.delivery.message, ACK)

    def hand_back(self, run: Run, seconds: float) -> None:
        """Have the task delivered again, here or elsewhere, in a while."""
        self.client.acknowledge(run.delivery.message, b'-NAK {"delay": %d}' % (seconds * 1e9))

    async def rest(self, run: Run, until: float) -> None:
        """A task whose retry is planned was delivered again: whoever planned it died before the acknowledgement, and
        maybe before the wake that a timer needs which fired too early."""
        await self.waiting.arm(run.id, until)
        await self._wake_if_late(run, until)
        self.client.acknowledge(run.delivery.message, ACK)

    async def put_to_sleep(self, run: Run) -> None:
        """Commit what the task waits for; from then on it holds nothing here. It is acknowledged last, so that whoever
        dies in between leaves a task that is delivered again."""
        assert run.recorder, "only an effect puts a task to sleep"
        run.settling = True
        waits = list(run.recorder.waits.values())
        rest = await run.recorder.rest()
        times = [wait.until for wait in waits if wait.until is not None]
        if run.deadline is not None:
            times.append(run.deadline)
        if times:
            await self.waiting.arm(run.id, min(times))
        if isinstance(await run.commit(run.events(run.claimed_by([*rest, *waits]))), Conflict):
            raise Superseded(f"task {run.id} was taken over by another attempt")
        # A signal that came while we were writing found no one waiting: look once more, now that everybody can see it.
        for name in {wait.signal for wait in waits if wait.signal}:
            taken = run.recorder.taken(name)
            if any(each.position not in taken for each in await self.waiting.received(run.id, name)):
                await self.waiting.wake(run.id)
                break
        else:
            await self._wake_if_late(run, min(times, default=math.inf))
        self.client.acknowledge(run.delivery.message, ACK)

    async def _wake_if_late(self, run: Run, until: float) -> None:
        """A timer that fired before the commit woke a task that was not asleep yet, and was dropped: wake it again."""
        if until < logtime.now() + TIMER_SLACK:
            await self.waiting.wake(run.id)

    async def _answer_as(self, reply: str, task: str) -> None:
        try:
            body, headers = await self.results.wait(task, DUPLICATE_WAIT)
            self.client.publish(reply, body, headers=headers)
        except (LogError, ConnectionFailed, NotFound) as error:
            logger.debug("a duplicate of task %s gets no reply: %s", task, error)
