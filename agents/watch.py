"""Beats for the tasks that are held, from a thread of its own: whoever keeps the event loop busy keeps its tasks.

The thread has its own connection, made when the first task is held for long enough to need a beat. When the loop is
blocked it says where, breaks the loop's connection so that the server looks elsewhere, hands back what has not begun
and answers the doors in the loop's place. When a run outlives its time on a blocked loop, it commits the failure itself
and ends the process, because nothing inside can. It also ends a process that holds more memory than it may, or whose
supervisor has been gone for a while.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from dspex.agents.assignments import Assignments
from dspex.agents.doors import Doors
from dspex.agents.link import Link
from dspex.agents.resources import resident, spoken
from dspex.agents.results import Results, answer_of
from dspex.agents.run import Run
from dspex.agents.worker import Worker
from dspex.bus.client import Client
from dspex.bus.pull import ACK, IN_PROGRESS, NAK
from dspex.bus.service import Service
from dspex.core.errors import ConnectionFailed, LogError
from dspex.core.events import TaskFailed
from dspex.core.ports import Appended, Log
from dspex.core.task import fold
from dspex.core.upkeep import Upkeep

__all__ = ["EXIT_BLOCKED", "EXIT_MEMORY", "EXIT_ORPHANED", "Watch"]

logger = logging.getLogger("dspex.agents")

TICK = 0.2
HELD = 0.15
BLOCKED = 1.0
GRACE = 0.3
"""Seconds a run may be over its time before the thread steps in: the loop's own sweep comes first."""
EXIT_BLOCKED, EXIT_MEMORY, EXIT_ORPHANED = 86, 87, 88
ORPHANED = 1.0
"""Seconds without a supervisor after which a process that has not ended by itself is ended."""
FRAMES = 8
"""Frames of a blocked loop's stack that are told, the innermost first."""


class Watch:
    """The watching thread of one worker. It tells the supervisor over `link`, and calls `on_full` (in its
    own thread) when the process holds as much memory as it should be replaced at.

    `stalls` counts how often the loop stood still, `longest` is the most seconds, `where` the last place.
    """

    def __init__(
        self, worker: Worker, link: Link | None = None, upkeep: Upkeep | None = None,
        on_full: Callable[[str], None] = lambda why: None,
    ) -> None:  # fmt: skip
        self._worker, self._link, self._upkeep, self._on_full = worker, link, upkeep or Upkeep(), on_full
        self._parent, self._orphaned_at, self._is_full = os.getppid(), 0.0, False
        self.stalls, self.longest, self.where, self._stalled_at = 0, 0.0, "", 0.0
        self._loop_thread = threading.get_ident()
        self._stopped = threading.Event()
        self._client: Client | None = None
        self._stand_in: Service | None = None
        self._said = self._spoke = 0.0
        self._failed = False

    def start(self) -> None:
        threading.Thread(target=self._run, name="dspex-watch", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        asyncio.run(self._watch())

    async def _watch(self) -> None:
        last = time.monotonic()
        while not self._stopped.is_set():
            await asyncio.sleep(TICK)
            now = time.monotonic()
            suspended, last = now - last > 5 * TICK, now
            self._look_above(now)
            self._look_at_memory()
            if suspended:
                continue  # the whole process stood still (SIGSTOP, a sleeping machine): the loop needs a moment too
            try:
                await self._look(now)
            except Exception as error:  # without beats every task that takes long would be given to others
                await self._begin_anew(error)
        if self._client:
            await self._client.close()

    async def _look(self, now: float) -> None:
        held = [run for run in list(self._worker.running.values()) if now - run.started > HELD]
        pulse = self._worker.pulse
        if now - pulse > BLOCKED:
            self._say_blocked(now - pulse, pulse)
        if held:
            await self._beat(held, now)
        if self._stand_in and now - self._worker.pulse < BLOCKED:
            self._stand_in.stop()
            self._stand_in = None

    async def _begin_anew(self, error: Exception) -> None:
        """Go on after what nobody expected, with another connection."""
        if not self._failed:
            logger.error("the watch over %s stumbled and goes on", self._worker.agent, exc_info=error)
        self._failed = True
        client, self._client, self._stand_in = self._client, None, None
        if client:
            with suppress(Exception):
                await client.close()

    async def _beat(self, held: list[Run], now: float) -> None:
        try:
            if self._client is None:
                worker = self._worker
                self._client = await Client.connect(
                    worker.client.url, name=f"{worker.agent} beats", wait=0, credentials=worker.client.credentials
                )
            for run in held:
                if not run.abandoned:
                    self._client.respond(run.delivery.message, IN_PROGRESS)
        except ConnectionFailed as error:
            logger.debug("no beat: %s", error)
        if now - self._worker.pulse > BLOCKED:
            if self._client and now - self._spoke > BLOCKED:
                self._spoke = now
                self._worker.limits.speak_for(self._client)
            self._stand_in_for_loop(held)
            over = [run for run in held if run.expires + GRACE <= now and not run.settling]
            if over:
                await self._end_process(over)

    def _stand_in_for_loop(self, held: list[Run]) -> None:
        """Give back what the loop has no time to begin, and answer in its place until it runs again."""
        if self._client is None:
            return
        for run in held:
            if not run.begun and not run.abandoned:
                run.abandoned = True
                self._client.respond(run.delivery.message, NAK)
        if self._stand_in is None:
            worker = self._worker
            worker.client.cut()
            self._stand_in = Service(self._client, name=worker.name, id=worker.agent, version="")
            log, vault = self._log(self._client), worker.vault_on(self._client)
            results = Results(self._client, log, worker.subjects, worker.name, vault)
            assignments = Assignments(worker.program, log, worker.subjects, worker.source)
            Doors(worker, self._client, worker.subjects, self._stand_in, results, assignments)

    def _log(self, client: Client) -> Log:
        return self._worker.place.log(client, self._worker.subjects, self._worker.name, patience=5.0)

    def _say_blocked(self, seconds: float, pulse: float) -> None:
        now, stack = time.monotonic(), self._stack()
        self.longest = max(self.longest, seconds)
        if pulse != self._stalled_at:
            self._stalled_at, self.where = pulse, stack[0]
            self.stalls += 1
            if self._link:
                self._link.send({"blocked": stack[0]})
        if now - self._said > 10:
            self._said = now
            place = " < ".join(stack)
            logger.warning("the event loop of %s has stood still for %.1f s, in %s", self._worker.agent, seconds, place)

    def _place(self) -> str:
        return f"in {self._stack()[0]}"

    def _stack(self) -> list[str]:
        """Where the loop is, the innermost frame first."""
        frame = sys._current_frames().get(self._loop_thread)
        stack = traceback.extract_stack(frame)[: -FRAMES - 1 : -1] if frame else []
        return [f"{it.filename}:{it.lineno} ({it.name})" for it in stack] or ["an unknown place"]

    def _look_above(self, now: float) -> None:
        """A loop that is blocked cannot see that its supervisor is gone."""
        if os.getppid() == self._parent:
            return
        self._orphaned_at = self._orphaned_at or now
        if now - self._orphaned_at > ORPHANED and now - self._worker.pulse > BLOCKED:
            logger.error("%s ends itself: its supervisor is gone, and its event loop stands still", self._worker.agent)
            os._exit(EXIT_ORPHANED)

    def _look_at_memory(self) -> None:
        most, enough = self._upkeep.memory, self._upkeep.recycle_memory
        held = resident() if most or enough else 0
        if most and held > most:
            why = f"used more than {spoken(most)} (it held {spoken(held)})"
            logger.error("%s ends itself: it %s", self._worker.agent, why)
            if self._link:
                self._link.send({"why": why})
            sys.stderr.flush()
            os._exit(EXIT_MEMORY)
        if enough and held > enough and not self._is_full:
            self._is_full = True
            self._on_full(f"holds {spoken(held)}, more than {spoken(enough)}")

    async def _end_process(self, over: list[Run]) -> None:
        worker = self._worker
        try:
            assert self._client is not None
            log = self._log(self._client)
            for run in over:
                seconds = time.monotonic() - run.started
                message = f"{worker.name} was not done after {seconds:.1f} s"
                failure = TaskFailed(
                    code=408, type="DeadlineExceeded", message=message, seconds=round(seconds, 6),
                    detail=f"it kept the event loop busy {self._place()}; such a program should use `def predict`",
                )  # fmt: skip
                events = run.events(run.claimed_by([failure]))
                if isinstance(await log.append(run.aggregate, events, run.head), Appended):
                    if not run.erase:  # else it is delivered again, to somebody with the time to erase it
                        self._client.respond(run.delivery.message, ACK)
                    answer = answer_of(fold(events), run.id)
                    if run.reply and answer:
                        self._client.publish(run.reply, answer[0], headers=answer[1])
            for run in list(worker.running.values()):
                if run not in over and not run.abandoned:
                    self._client.respond(run.delivery.message, NAK)
            if self._stand_in:
                self._stand_in.stop()
                await self._stand_in.finish(0.2)
            await self._client.flush()
        except (ConnectionFailed, LogError, AssertionError) as error:
            logger.warning("a run that is over its time could not be ended in the log: %s", error)
        logger.error("%s ends itself: a run that is over its time keeps its event loop busy", worker.agent)
        sys.stderr.flush()
        os._exit(EXIT_BLOCKED)
