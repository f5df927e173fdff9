"""One program at work: what becomes of each delivered task, from the message to the commit and the ack.

The order is what makes it safe. An attempt works, appends its commit under compare-and-set, and only when the log has
it does it answer and acknowledge. A process that dies anywhere in between leaves a task that is delivered again, and
whoever gets it looks it up in the log first. Two attempts can run; only one can commit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from dspex.agents import logtime
from dspex.agents.assignments import Assignments
from dspex.agents.attempts import Attempts
from dspex.agents.backpressure import Backlog
from dspex.agents.breakers import MAX_ABANDONED, Breakers
from dspex.agents.calls import Calls
from dspex.agents.cancelling import CANCEL, cancelled_task
from dspex.agents.endings import ENVELOPE, Endings
from dspex.agents.failures import failed
from dspex.agents.isolation import Isolation
from dspex.agents.journal import record
from dspex.agents.limits import Limits
from dspex.agents.patience import Patience
from dspex.agents.registered import Registered
from dspex.agents.results import Results
from dspex.agents.run import Run, Seat
from dspex.agents.runner import Runner
from dspex.agents.vault import Vault
from dspex.agents.versions import Versions
from dspex.agents.waiting import Waiting, Woken
from dspex.agents.writer import Superseded
from dspex.bus.client import Client, Message
from dspex.bus.objects import NatsKeys, NatsObjects
from dspex.bus.pull import ACK, NAK, Delivery, Puller, Slots
from dspex.bus.streams import consumer_name
from dspex.core.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    LogError,
)
from dspex.core.events import EffectsInterrupted, Interrupted
from dspex.core.ports import Log
from dspex.core.program import Program
from dspex.core.sealing import INLINE, guard_of
from dspex.core.subjects import Subjects, aggregate

__all__ = ["MAX_OUTPUT", "Worker"]

logger = logging.getLogger("dspex.agents")

MAX_OUTPUT = 63 << 20
"""The most bytes that an output or the result of an effect may have; a private output must fit into a message, too, and
under access rules every output."""
SWEEP = 0.05
"""Seconds between two looks for runs that are past their time."""
MAX_COMMITS = 1024
"""Commits that may be under way beyond the slots."""
WRITE_DOWN = 0.5
"""Seconds for the last records of the runs that a drain hands back."""
SIGNALS = 16
"""Signals that an agent puts into inboxes at once."""
TIMER_GRAIN = 2.0
"""Seconds by which a timer may be late: it is of whole ones, and the agent has to hear of it."""
PUT_OFF = 1.0
"""Seconds until a task is woken again that found no permit to go on."""
STUBBORN = 1.0
"""Seconds a cancelled coroutine gets to end."""
MAX_CANCELLED = 1000
"""Cancelled tasks that are remembered until they are delivered; others are run, and their commit is refused."""
MAX_TOLD = 100
"""Effects under way at its end that are told of one task."""
MAX_SIDE = 1024
"""Duplicates that may wait for their originals."""


class Worker:
    """Works on the tasks of one program with one pinned assignment.

    `place` is where its tasks are. Those up to its position `restored` came from an archive, and those stored before
    its `since` are older than the consumer that delivers them: that they are delivered for the first time says nothing.
    `max_queue` stands for the program's own, when it is given.

    `on_worn` is called when there are runs that cannot be stopped and the process should be replaced: as soon as
    nothing else runs, or when they have piled up.
    """

    def __init__(
        self, program: Program, *, agent: str, code: str, client: Client, log: Log, subjects: Subjects,
        on_worn: Callable[[str], None], place: Registered, master: bytes = b"",
        max_queue: int | None = None,
    ) -> None:  # fmt: skip
        self.program, self.agent, self.code = program, agent, code
        self.name = program.name
        self.client, self.log, self.subjects, self._on_worn = client, log, subjects, on_worn
        self.assignment = program.assignment.hash
        self.place, self._master = place, master
        about = program.describe()
        self.guard = guard_of(about.input_schema, about.output_schema)
        self.vault = self.vault_on(client)
        self.results = Results(client, log, subjects, self.name, self.vault)
        self.running: dict[int, Run] = {}
        self.stuck = 0
        self._cancelled: dict[int, None] = {}
        self.pulse = time.monotonic()
        self.source = f"/agents/{agent}"
        self._slots = program.slots()
        self.waiting = Waiting(client, log, subjects, self.name, self.source, self.vault, self.guard)
        self.calls = Calls(client, subjects)
        self.breakers = Breakers(client, log, subjects, self.name, agent)
        self._pullers: list[Puller] = []
        self.limits = Limits(client, subjects, self.name, agent, self._slots, lambda: self.held)
        self.limits.on_change.append(self._repace)
        queue = program.max_queue if max_queue is None else max_queue
        self.backlog = Backlog(
            client, (place.stream, place.consumer), self.name, queue,
            lambda: bool(self._pullers) and self._pullers[0].hungry,
        )  # fmt: skip
        self._sweeper: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._side: set[asyncio.Task[None]] = set()
        self.endings = Endings(client, log, subjects, self.results, self.waiting, self._spawn)
        # What is private cannot be fetched from the object store; under access rules no client can fetch anything.
        in_reply = self.guard.private or subjects.tenants
        limit = min(MAX_OUTPUT, client.max_payload - ENVELOPE) if in_reply else MAX_OUTPUT
        self.assignments = Assignments(program, log, subjects, self.source)
        self.isolation = Isolation(self._slots, self.running, self._hold, lambda: self.stuck > 0)
        self._attempts = Attempts(
            program, code=code, source=self.source, place=place, client=client, log=log, subjects=subjects,
            guard=self.guard, vault=self.vault, endings=self.endings, runner=Runner(program, limit, self._loop),
            assignments=self.assignments, versions=Versions(program, code, client, log, self.waiting, self.endings),
            cancelled=self._cancelled, done=self._free_slot, isolation=self.isolation,
            limits=self.limits,
        )  # fmt: skip
        self._seat = Seat(
            agent, self.assignment, code, self.source, log, self.waiting, self.calls, MAX_OUTPUT, self._loop,
            self.vault, self.guard, breakers=self.breakers, timeout=program.timeout,
            lenient=program.on_change == "finish", limits=self.limits,
        )  # fmt: skip

    def vault_on(self, client: Client) -> Vault:
        """Keys and objects over a connection."""
        subjects, owner = self.subjects, self.name if self.subjects.tenants else ""
        keys, objects = NatsKeys(client, subjects), NatsObjects(client, subjects, program=self.name)
        inline = min(INLINE, client.max_payload // 4)
        return Vault(keys, objects, inline=inline, master=self._master, owner=owner)

    # -- life

    def keep_time(self) -> None:
        """Begin to end runs that are past their time, or cancelled. Enough for a worker that is given its tasks."""
        self._sweeper = asyncio.create_task(self._sweep(), name="dspex-deadlines")
        self.client.subscribe(self.subjects.control(self.name, CANCEL), self._cancellation)

    def start(self, on_missing: Callable[[], None]) -> None:
        """Take tasks, and beside them a few sleeping tasks and signals. `on_missing`: a consumer is gone."""
        self.keep_time()
        stream, kind, few = self.place.stream, self.place.delivery, max(1, self._slots // 4)

        def take(delivery: Delivery) -> None:
            self.backlog.seen(delivery)
            self.take(delivery, tasks)

        tasks = Puller(self.client, stream, self.place.consumer, self._slots, take, kind)
        wakes = Puller(
            self.client, self.subjects.timers(self.name), consumer_name(self.name, "wake"), few,
            lambda it: self._spawn(self._wake(it, wakes), bounded=False),
        )  # fmt: skip
        signals = Puller(
            self.client, stream, consumer_name(self.name, "signal"), SIGNALS,
            lambda it: self._spawn(self._signal(it, signals), bounded=False), kind,
        )  # fmt: skip
        tasks.since = self.place.since
        self._pullers = [tasks, wakes, signals]
        tasks.gate = self.limits if self.limits.paced else None
        for puller in self._pullers:
            puller.on_missing = on_missing
            puller.start()

    @property
    def held(self) -> int:
        """Deliveries of tasks and wakes that are held."""
        return sum(puller.held for puller in self._pullers[:2])

    @property
    def pending(self) -> int:
        """About how many tasks wait to be delivered to anybody."""
        return self._pullers[0].pending if self._pullers else 0

    def _repace(self) -> None:
        """Another limit is in force, or there is more or less room under it."""
        if self._pullers:
            tasks = self._pullers[0]
            tasks.gate = self.limits if self.limits.paced else None
            tasks.nudge()

    def _hold(self, still: bool) -> None:
        """Take no tasks for a while, or again: somebody has to be alone."""
        for puller in self._pullers[:2]:
            if still:
                puller.pause()
            else:
                puller.resume()

    def leave(self) -> None:
        """Take no more."""
        for puller in self._pullers:
            puller.stop()

    async def drain(self, patience: Patience) -> None:
        """Take no more, let what runs end while there is patience, hand back the rest."""
        self.leave()
        for run in [run for run in self.running.values() if run.waiting]:
            run.abandoned = True
            self.client.acknowledge(run.delivery.message, NAK)
            if run.task:
                run.task.cancel()
            self._forget(run)
        tasks = [run.task for run in self.running.values() if run.task]
        await patience.wait(tasks)
        await self._write_down()
        for run in list(self.running.values()):
            run.abandoned = True
            self.client.acknowledge(run.delivery.message, NAK)
        if self._sweeper:
            self._sweeper.cancel()

    async def _write_down(self) -> None:
        """What the runs that are handed back have recorded, so that nobody does it again."""
        recorders = [run.recorder for run in self.running.values() if run.recorder and not run.settling]
        writing = [asyncio.create_task(it.writer.flush()) for it in recorders if it.writer.size]
        if writing:
            done, late = await asyncio.wait(writing, timeout=WRITE_DOWN)
            for task in late:
                task.cancel()
            for error in filter(None, (task.exception() for task in done)):
                logger.info("a run was handed back without its last records: %s", error)

    # -- one task

    def take(self, delivery: Delivery, puller: Slots) -> None:
        """A delivery came. Called from the reading loop, so it only starts the work."""
        logtime.at_least(delivery.stored_at)
        position = delivery.position
        held = self.running.get(position)
        if held is not None:
            held.delivery = delivery  # ours already: the newer ack is the one that counts
            puller.release()
            return
        self.pulse = now = time.monotonic()  # a loop with much to read does not stand still
        run = Run(self._seat, delivery, puller, self.name, now, now + self.program.timeout)
        self.running[position] = run
        run.task = asyncio.Task(self._work(run), loop=self._loop)  # past the factory: this is no branch

    async def _wake(self, wake: Delivery, puller: Puller) -> None:
        """A sleeping task may go on."""
        woken = None
        logtime.at_least(wake.stored_at)
        try:
            woken = await self.waiting.woken(wake, self.code)
            held = woken and self.running.get(woken.position)
            if held and (held.suspended or held.settling) and held.task:  # it is just being put to sleep
                await asyncio.wait([held.task])
                woken = await self.waiting.woken(wake, self.code)
        except Exception as error:
            logger.warning("a wake will be delivered again: %s", error)
            puller.release()
            return
        held = woken and self.running.get(woken.position)
        if woken is None or (held and not (isinstance(held.delivery, Woken) and held.delivery.wake == woken.wake)):
            puller.release()
            self.client.acknowledge(wake.message, ACK)  # it runs already, and looks at the time and its inbox itself
        elif self.limits.crowded:
            await self._put_off(woken, puller)
        else:
            self.take(woken, puller)

    async def _put_off(self, woken: Woken, puller: Puller) -> None:
        """So many tasks as may be are at work: this one is woken again, and a place is kept for it."""
        try:
            await self.waiting.arm(str(woken.position), logtime.now() + PUT_OFF)
            self.client.acknowledge(woken.message, ACK)
        except LogError as error:
            logger.warning("a wake will be delivered again: %s", error)
        puller.release()
        self.limits.let_pass(PUT_OFF + TIMER_GRAIN)

    async def _signal(self, delivery: Delivery, puller: Puller) -> None:
        try:
            await self.waiting.receive(delivery)
        except (LogError, ConnectionFailed) as error:
            logger.warning("a signal will be delivered again: %s", error)
        finally:
            puller.release()

    async def _work(self, run: Run) -> None:
        if run.abandoned:  # handed back before it began, because the loop had no time for it
            self._forget(run)
            return
        run.begun = True
        try:
            await self._attempts.attempt(run)
        except LogError as error:
            logger.warning("task %s: %s It will be delivered again.", run.id, error)
        except Superseded as error:
            logger.info("%s; this one ends without a trace", error)
        except ConnectionFailed as error:
            logger.info("task %s: %s", run.id, error)
        except Exception:
            logger.exception("task %s could not be worked on; it will be delivered again", run.id)
        finally:
            if not run.abandoned:
                self._forget(run)

    def _free_slot(self, run: Run) -> None:
        """The program is done with it, only its commit is under way: make room for the next, within a bound."""
        run.settling = True
        if len(self.running) < self._slots + MAX_COMMITS:
            run.freed = True
            self._release(run)

    def _forget(self, run: Run) -> None:
        if self.running.pop(run.delivery.position, None) is not None and not run.freed:
            self._release(run)

    def _release(self, run: Run) -> None:
        run.puller.release()
        if self.limits.paced:  # then the slot of a wake is room for a task
            self._repace()

    def _spawn(self, work: Coroutine[Any, Any, None], *, bounded: bool = True) -> None:
        if len(self._side) < MAX_SIDE or not bounded:
            task = self._loop.create_task(work)
            self._side.add(task)
            task.add_done_callback(self._side.discard)
        else:
            work.close()
            logger.warning("%s duplicates wait for their originals; one more gets no reply", MAX_SIDE)

    # -- the end of runs that did not come to an end

    def _cancellation(self, message: Message) -> None:
        """Somebody says that a task is cancelled. Called from the reading loop."""
        position = cancelled_task(message.data)
        if position in self.running:
            self._spawn(self._stop_cancelled(position))
        elif position:
            self._cancelled[position] = None
            if len(self._cancelled) > MAX_CANCELLED:
                del self._cancelled[next(iter(self._cancelled))]

    async def _stop_cancelled(self, position: int) -> None:
        """Stop a run, if it is true: anybody could have said so."""
        state = await self.waiting.state(str(position))
        run = self.running.get(position)
        if run and state.ended and not (run.abandoned or run.settling or run.suspended):
            self._abandon(run)
            self.endings.acknowledge(run)
            self._forget(run)
            await self._count_stuck(run)

    def _abandon(self, run: Run) -> None:
        """Its program goes no further here, and what it has called elsewhere need not either."""
        run.abandoned = True
        effects = run.recorder.stop() if run.recorder else []
        if run.thread:
            run.thread.add_done_callback(_overheard)
        if run.task:
            run.task.cancel()
        self.calls.cancel(run.id)
        if effects:
            self._spawn(self._tell_interrupted(run, effects), bounded=False)

    async def _tell_interrupted(self, run: Run, effects: list[Interrupted]) -> None:
        """Write down what was under way: somebody may have to find out what it did."""
        event = EffectsInterrupted(attempt=run.attempt, agent=self.agent, effects=effects[:MAX_TOLD])
        try:
            await record(self.log, aggregate("dlq", self.name, run.id), [event], source=self.source, causation=run.id)
        except LogError as error:
            logger.warning("task %s was stopped, and what was under way is not in the log: %s", run.id, error)

    async def _count_stuck(self, run: Run) -> None:
        """A run that was told to end and does not can only end with its process."""
        await asyncio.sleep(STUBBORN)
        if (run.thread and not run.thread.done()) or (run.task and not run.task.done()):
            logger.warning("task %s goes on although it is over; its process will be replaced", run.id)
            self.stuck += 1

    async def _sweep(self) -> None:
        """End runs that are past their time, and show that the loop is alive."""
        while True:
            await asyncio.sleep(SWEEP)
            self.pulse = now = time.monotonic()
            late = [run for run in self.running.values() if run.expires <= now]
            for run in [run for run in late if not (run.abandoned or run.settling)]:
                self._expire(run)
            if self.stuck and (not self.running or self.stuck >= self._slots):
                self._on_worn(f"{self.stuck} runs go on although they are over, and cannot be stopped")
            if self.breakers.abandoned >= MAX_ABANDONED:
                self._on_worn(f"{self.breakers.abandoned} effects go on although their time is over")

    def _expire(self, run: Run) -> None:
        self._abandon(run)
        self._spawn(self._settle_expired(run), bounded=False)

    async def _settle_expired(self, run: Run) -> None:
        seconds = time.monotonic() - run.started
        error = DeadlineExceeded(f"{self.name} was not done after {seconds:.1f} s", task=run.id)
        try:
            await self.endings.settle(run, failed(error, seconds))
        except Exception as failure:  # whatever it was: what follows says whether the process must be replaced
            logger.warning("task %s: %s It will be delivered again.", run.id, failure)
        finally:
            self._forget(run)
        await self._count_stuck(run)


def _overheard(thread: asyncio.Future[Any]) -> None:
    """What a thread ended with that nobody waits for any more."""
    if not thread.cancelled():
        thread.exception()
