"""One program at work: what becomes of each delivered task, from the message to the commit and the ack.

The order is what makes it safe. An attempt works, appends its commit under compare-and-set, and only when the log has
it does it answer and acknowledge. A process that dies anywhere in between leaves a task that is delivered again, and
whoever gets it looks it up in the log first. Two attempts can run; only one can commit.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from msgspec import Raw

from dspex.agents import keys
from dspex.agents.calls import Calls
from dspex.agents.recorder import Superseded, Suspended
from dspex.agents.results import Results, answer_of
from dspex.agents.run import Run, Seat
from dspex.agents.waiting import Waiting, Woken
from dspex.bus.client import Client
from dspex.bus.pull import ACK, NAK, Delivery, Puller
from dspex.bus.streams import consumer_name
from dspex.core import headers as h
from dspex.core.codec import decode_commit
from dspex.core.effects import Diverged, begin
from dspex.core.errors import ConnectionFailed, DeadlineExceeded, LogError, NotFound, ProgramFailed, TaskError
from dspex.core.events import (
    Payload,
    TaskCompleted,
    TaskDeadLettered,
    TaskDuplicate,
    TaskFailed,
    TaskRetried,
)
from dspex.core.ports import Appended, Conflict, Log
from dspex.core.program import Program
from dspex.core.subjects import Subjects
from dspex.core.task import fold, may_attempt

__all__ = ["MAX_OUTPUT", "Worker"]

logger = logging.getLogger("dspex.agents")

MAX_OUTPUT = 1 << 20
ENVELOPE = 4096
"""Bytes kept free beside an output for the rest of its commit."""
SWEEP = 0.05
MAX_COMMITS = 1024
"""Commits that may be under way beyond the slots."""
SIGNALS = 16
"""Signals that an agent puts into inboxes at once."""
STUBBORN = 1.0
"""Seconds a cancelled coroutine gets to end."""
DUPLICATE_WAIT = 60.0
TIMER_SLACK = 0.1
"""Seconds by which the server's clock may be ahead of ours when it fires a timer."""
MAX_WORDS = 2000
"""Characters of an error's message that a client gets."""
_INBOX = re.compile(r"(?:_INBOX|_R_)(?:\.[^\s.*>]+)+")


class Worker:
    """Works on the tasks of one program with one pinned assignment.

    Tasks up to the position `restored` came from an archive: that they are delivered for the first time says nothing.
    `on_worn` is called when there are runs that cannot be stopped and the process should be replaced: as soon as
    nothing else runs, or when they have piled up.
    """

    def __init__(
        self, program: Program, *, agent: str, code: str, client: Client, log: Log, subjects: Subjects,
        on_worn: Callable[[str], None], restored: int = 0,
    ) -> None:  # fmt: skip
        self.program, self.agent, self.code = program, agent, code
        self.name = program.name
        self.client, self.log, self.subjects, self._on_worn = client, log, subjects, on_worn
        self.assignment = program.assignment.hash
        self.restored = restored
        self.results = Results(client, log, subjects, self.name)
        self.running: dict[int, Run] = {}
        self.done = self.failed = self.stuck = 0
        self.pulse = time.monotonic()
        self.source = f"/agents/{agent}"
        self._slots = program.slots()
        self._pool: ThreadPoolExecutor | None = None
        if not program.is_async:
            self._pool = ThreadPoolExecutor(2 * self._slots, thread_name_prefix=f"{self.name}-predict")
        self.waiting = Waiting(client, log, subjects, self.name, self.source)
        self.calls = Calls(client, subjects)
        self._pullers: list[Puller] = []
        self._sweeper: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._side: set[asyncio.Task[None]] = set()
        self._last_try = asyncio.Lock()
        self._seat = Seat(
            agent, self.assignment, code, self.source, log, self.waiting, self.calls, self._limit, self._loop
        )

    # -- life

    def start(self, on_missing: Callable[[], None]) -> None:
        """Take tasks, and beside them a few sleeping tasks and signals. `on_missing`: a consumer is gone."""
        stream, few = self.subjects.stream, max(1, self._slots // 4)
        tasks = Puller(self.client, stream, consumer_name(self.name), self._slots, lambda it: self.take(it, tasks))
        wakes = Puller(
            self.client, self.subjects.timer_stream, consumer_name(self.name, "wake"), few,
            lambda it: self._spawn(self._wake(it, wakes), bounded=False),
        )  # fmt: skip
        signals = Puller(
            self.client, stream, consumer_name(self.name, "signal"), SIGNALS,
            lambda it: self._spawn(self._signal(it, signals), bounded=False),
        )  # fmt: skip
        self._pullers = [tasks, wakes, signals]
        self._sweeper = asyncio.create_task(self._sweep(), name="dspex-deadlines")
        for puller in self._pullers:
            puller.on_missing = on_missing
            puller.start()

    async def drain(self, grace: float) -> None:
        """Take no more, let what runs end for up to `grace` seconds, hand back the rest."""
        for puller in self._pullers:
            puller.stop()
        tasks = [run.task for run in self.running.values() if run.task]
        if tasks:
            await asyncio.wait(tasks, timeout=grace)
        for run in list(self.running.values()):
            run.abandoned = True
            self.client.acknowledge(run.delivery.message, NAK)
        if self._sweeper:
            self._sweeper.cancel()

    # -- one task

    def take(self, delivery: Delivery, puller: Puller) -> None:
        """A delivery came. Called from the reading loop, so it only starts the work."""
        position = delivery.position
        held = self.running.get(position)
        if held is not None:
            held.delivery = delivery  # ours already: the newer ack is the one that counts
            puller.release()
            return
        now = time.monotonic()
        run = Run(self._seat, delivery, puller, self.name, now, now + self.program.timeout)
        self.running[position] = run
        run.task = asyncio.Task(self._work(run), loop=self._loop)  # past the factory: this is no branch

    async def _wake(self, wake: Delivery, puller: Puller) -> None:
        """A sleeping task may go on."""
        woken = None
        try:
            woken = await self.waiting.woken(wake)
            held = woken and self.running.get(woken.position)
            if held and (held.suspended or held.settling) and held.task:  # it is just being put to sleep
                await asyncio.wait([held.task])
                woken = await self.waiting.woken(wake)
        except Exception as error:
            logger.warning("a wake will be delivered again: %s", error)
            puller.release()
            return
        held = woken and self.running.get(woken.position)
        if woken is None or (held and not (isinstance(held.delivery, Woken) and held.delivery.wake == woken.wake)):
            puller.release()
            self.client.acknowledge(wake.message, ACK)  # it runs already, and looks at the time and its inbox itself
        else:
            self.take(woken, puller)

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
            await self._attempt(run)
        except LogError as error:
            logger.warning("task %s: %s It will be delivered again.", run.id, error)
        except Superseded as error:
            logger.info("%s; this one ends without a trace", error)
        except ConnectionFailed as error:
            logger.info("task %s: %s", run.id, error)
        except Exception:
            logger.exception("task %s could not be worked on; it will be delivered again", run.id)
        finally:
            if run.alone:
                self._last_try.release()
            if not run.abandoned:
                self._forget(run)

    async def _attempt(self, run: Run) -> None:
        message = run.delivery.message
        headers = message.headers if message.has_headers else None
        if headers:
            reply = headers.get(h.REPLY, "")
            # Only an inbox: a stranger's submission must not make us publish anywhere else.
            run.reply = reply if len(reply) < 2000 and _INBOX.fullmatch(reply) else ""
        known = run.delivery.delivered > 1 or run.delivery.position <= self.restored
        if known and not await self._take_over(run):
            return
        started = time.perf_counter()
        payload: Payload
        try:
            if headers:
                self._check_headers(run, headers)
            input = self.program.decode(message.data)
            key = h.key_of(headers) if headers else None
            if key is not None:
                owner = await keys.bind(self.log, self.name, key, run.id, self.source)
                if owner != run.id:
                    await self._settle(run, TaskDuplicate(of=owner, key=key))
                    return
            output = await self._execute(run, input)
        except Suspended:
            if run.suspended and not run.abandoned:
                await self._put_to_sleep(run)
            return
        except TaskError as error:
            payload = _failure(error, time.perf_counter() - started)
            payload = self._retry(run, error) or payload
        else:
            payload = TaskCompleted(output=Raw(output), seconds=round(time.perf_counter() - started, 6))
        if not run.abandoned:
            self._free_slot(run)
            await self._settle(run, payload)

    def _check_headers(self, run: Run, headers: dict[str, str]) -> None:
        deadline = h.deadline_of(headers, run.delivery.stored_at)
        if deadline is not None:
            left = deadline - time.time()
            if left <= 0:
                raise DeadlineExceeded(f"the deadline had passed when {self.name} came to it")
            run.expires = min(run.expires, time.monotonic() + left)
            run.deadline = deadline
        wanted = headers.get(h.ASSIGNMENT)
        if wanted is not None and wanted != self.assignment:
            raise NotFound(f"{self.name} knows no assignment {wanted[:40]!r}; see `dspex vars {self.name}`")

    async def _execute(self, run: Run, input: Any) -> bytes:
        """The output of the program. However it ended, a run that was suspended or has lost its log did not end."""
        try:
            body = await self._predict(run, input)
        except BaseException:
            self._check_whole(run)
            raise
        self._check_whole(run)
        return body

    def _check_whole(self, run: Run) -> None:
        if run.abandoned:
            return
        broken = run.recorder.broken if run.recorder else None
        if isinstance(broken, Diverged):
            message = f"{self.name} has changed while the task was under way: {broken}"
            run.raised = False
            raise ProgramFailed(message, type="Diverged") from None
        if broken:
            raise broken from None
        if run.suspended:
            while run.task and run.task.uncancel():
                pass
            raise Suspended from None

    async def _predict(self, run: Run, input: Any) -> bytes:
        program = self.program
        begin(run)
        try:
            if self._pool is None:
                value = await program.predict(input)
            else:
                run.thread = self._loop.run_in_executor(self._pool, copy_context().run, self._in_thread, input)
                value = await asyncio.shield(run.thread)
            output = program.check_output(value)
            body: bytes = output.encode()
        except TaskError:
            run.raised = True
            raise
        except asyncio.CancelledError as error:
            if run.suspended or run.abandoned or asyncio.current_task().cancelling():  # type: ignore[union-attr] # we are in one
                raise
            raise _program_failed(self.name, error) from error
        except (Exception, SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            logger.debug("task %s failed", run.id, exc_info=True)
            run.raised = True
            raise _program_failed(self.name, error) from error
        if len(body) > self._limit:
            raise ProgramFailed(f"the output of {self.name} has {len(body):,} bytes; {self._limit:,} are allowed")
        return body

    @property
    def _limit(self) -> int:
        """The most bytes that an output or the result of an effect may have."""
        return min(MAX_OUTPUT, self.client.max_payload - ENVELOPE)

    def _in_thread(self, input: Any) -> Any:
        try:
            return self.program.predict(input)
        except StopIteration as error:  # no future can hold one
            raise RuntimeError("predict raised StopIteration") from error

    async def _take_over(self, run: Run) -> bool:
        """A task that was delivered before: look it up, and claim it if it is still to be done."""
        entries = await self.log.read(run.aggregate)
        run.history = [event for entry in entries for event in decode_commit(entry.body, entry.position)]
        state = fold(run.history)
        run.head, run.retries, run.rested = state.head, state.retries, state.rested
        if state.ended:
            self.client.acknowledge(run.delivery.message, ACK)
            return False
        if not may_attempt(state, self.program.attempts):
            reason = f"{state.attempts} attempts died or were lost before they came to an end"
            run.claimed = True  # no other attempt begins
            await self._settle(run, TaskDeadLettered(attempts=state.attempts, reason=reason))
            return False
        run.attempt = state.attempts + 1 if state.attempts else 2
        if run.attempt - run.rested >= self.program.attempts:
            await self._be_alone(run)
        events = run.events([run.claim()])
        result = await self.log.append(run.aggregate, events, run.head)
        run.head, run.claimed = result.head, True
        return isinstance(result, Appended)

    async def _be_alone(self, run: Run) -> None:
        """Last tries go one at a time: a task that ends the process must not use up the last try of its neighbours."""
        run.expires = math.inf
        await self._last_try.acquire()
        run.alone = True
        run.started = time.monotonic()
        run.expires = run.started + self.program.timeout

    async def _settle(self, run: Run, payload: Payload) -> None:
        """Commit how the task ended; when the log has it, acknowledge and answer."""
        room = self.client.max_payload - ENVELOPE
        if isinstance(payload, TaskCompleted):
            room -= len(bytes(payload.output))
        rest = await run.recorder.rest(room) if run.recorder else ()
        if isinstance(payload, TaskRetried):
            await self.waiting.arm(run.id, payload.until)
        events = run.events(run.claimed_by((*rest, payload)))
        result = await self.log.append(run.aggregate, events, run.head)
        message = run.delivery.message
        if not isinstance(result, Appended):
            logger.info("task %s: another attempt was first; this one ends without a trace", run.id)
            entry = await self.log.last(run.aggregate)
            if entry and fold(decode_commit(entry.body, entry.position)).ended:
                self.client.acknowledge(message, ACK)
            return
        if isinstance(payload, TaskRetried):
            await self._wake_if_late(run, payload.until)
            self.client.acknowledge(run.delivery.message, ACK)
            return
        self.client.acknowledge(message, ACK)
        self.done += 1
        if isinstance(payload, TaskDuplicate):
            if run.reply:
                self._spawn(self._answer_as(run.reply, payload.of))
            return
        if not isinstance(payload, TaskCompleted):
            self.failed += 1
        if run.reply:
            answer = answer_of(fold(events), run.id)
            assert answer is not None, "a task that ended has an answer"
            self.client.publish(run.reply, answer[0], headers=answer[1])

    async def _put_to_sleep(self, run: Run) -> None:
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
        if isinstance(await run.commit(run.claimed_by([*rest, *waits])), Conflict):
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
        if until < time.time() + TIMER_SLACK:
            await self.waiting.wake(run.id)

    def _retry(self, run: Run, error: TaskError) -> TaskRetried | None:
        """What the program's policy says of an error that the program raised."""
        policy, cause = self.program.retry, error.__cause__ or error
        if policy is None or not run.raised or not isinstance(cause, policy.on):
            return None
        delay = policy.delay(run.retries + 1, run.id)
        if delay is None or (run.deadline is not None and run.deadline < time.time() + delay):
            return None
        return TaskRetried(
            retry=run.retries + 1, type=_clean(error.type, 200), message=_clean(error.message, MAX_WORDS),
            until=time.time() + delay, clean=policy.clean,
        )  # fmt: skip

    async def _answer_as(self, reply: str, task: str) -> None:
        try:
            body, headers = await self.results.wait(task, DUPLICATE_WAIT)
            self.client.publish(reply, body, headers=headers)
        except (LogError, ConnectionFailed, NotFound) as error:
            logger.debug("a duplicate of task %s gets no reply: %s", task, error)

    def _free_slot(self, run: Run) -> None:
        """The program is done with it, only its commit is under way: make room for the next, within a bound."""
        run.settling = True
        if len(self.running) < self._slots + MAX_COMMITS:
            run.freed = True
            run.puller.release()

    def _forget(self, run: Run) -> None:
        if self.running.pop(run.delivery.position, None) is not None and not run.freed:
            run.puller.release()

    def _spawn(self, work: Any, *, bounded: bool = True) -> None:
        if len(self._side) < 1024 or not bounded:
            task = self._loop.create_task(work)
            self._side.add(task)
            task.add_done_callback(self._side.discard)
        else:
            work.close()
            logger.warning("1,024 duplicates wait for their originals; one more gets no reply")

    # -- time

    async def _sweep(self) -> None:
        """End runs that are past their time, and show that the loop is alive."""
        while True:
            await asyncio.sleep(SWEEP)
            self.pulse = now = time.monotonic()
            late = [run for run in self.running.values() if run.expires <= now]
            for run in [run for run in late if not (run.abandoned or run.settling)]:
                self._expire(run)
            if self.stuck and (not self.running or self.stuck >= self._slots):
                self._on_worn(f"{self.stuck} runs go on although their time is over, and cannot be stopped")

    def _expire(self, run: Run) -> None:
        run.abandoned = True
        if run.task:
            run.task.cancel()
        self._spawn(self._settle_expired(run), bounded=False)

    async def _settle_expired(self, run: Run) -> None:
        seconds = time.monotonic() - run.started
        error = DeadlineExceeded(f"{self.name} was not done after {seconds:.1f} s", task=run.id)
        try:
            await self._settle(run, _failure(error, seconds))
        except Exception as failure:  # whatever it was: what follows says whether the process must be replaced
            logger.warning("task %s: %s It will be delivered again.", run.id, failure)
        finally:
            self._forget(run)
        await asyncio.sleep(STUBBORN)
        if (run.thread and not run.thread.done()) or (run.task and not run.task.done()):
            logger.warning("task %s goes on although its time is over; its process will be replaced", run.id)
            self.stuck += 1


def _program_failed(name: str, error: BaseException) -> ProgramFailed:
    """What the client is told: the kind of error. Its words may hold anything, so they stay in the log."""
    kind = type(error).__name__
    failure = ProgramFailed(f"{name} raised {kind}; its events have the details", type=kind)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno} in {frames[-1].name}" if frames else ""
    failure.detail = f"{type(error).__name__}: {_words(error)[:1000]}{place}"
    return failure


def _failure(error: TaskError, seconds: float) -> TaskFailed:
    return TaskFailed(
        code=error.code, type=_clean(error.type, 200), message=_clean(error.message, MAX_WORDS),
        detail=_clean(error.detail, MAX_WORDS), seconds=round(seconds, 6),
    )  # fmt: skip


def _words(error: BaseException) -> str:
    """What an exception says, whose `__str__` may raise itself."""
    try:
        return str(error)
    except Exception:
        return "its words cannot be read"


def _clean(text: object, limit: int) -> str:
    """Text that JSON can hold, of bounded length."""
    return str(text)[:limit].encode("utf-8", "backslashreplace").decode()
