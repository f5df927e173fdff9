"""Deliveries in any order, several times, to two agents at once: each task ends once, and no record is made twice."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.json import decode
from tests.agents.delivering import SlowLog, agent, deliver, idle

from dspex import Program, Schema, effect
from dspex.agents.journal import events_for
from dspex.agents.patience import Patience
from dspex.bus.pull import ACK, NAK
from dspex.core.codec import decode_commit
from dspex.core.effects import branching
from dspex.core.events import EffectRecorded, Event, Head, TaskClaimed, TaskCompleted, TaskRetried, TaskSleeping

TASKS, STEPS = 3, 3
DOOR = "dspex.task.counting"


class Counting(Program):
    """Adds up what its effects give."""

    attempts = 10_000

    class Input(Schema):
        n: int

    class Output(Schema):
        total: int

    async def predict(self, input: Input) -> Output:
        total = 0
        for number in range(STEPS):
            total += await step(input.n, number)
        return self.Output(total=total)


class Book:
    """What was performed, and what the log had by then."""

    def __init__(self) -> None:
        self.performed: Counter[tuple[int, int]] = Counter()
        self.late: list[tuple[int, int]] = []
        self.log = SlowLog([])
        self.place: dict[int, int] = {}

    def events(self, n: int) -> list[Event]:
        entries = self.log.known(f"task.counting.{self.place[n]}")
        return [event for entry in entries for event in decode_commit(entry.body, entry.position)]


book = Book()


@effect
async def step(n: int, number: int) -> int:
    book.performed[n, number] += 1
    if any(isinstance(e.data, EffectRecorded) and e.data.key.endswith(f"#{number}") for e in book.events(n)):
        book.late.append((n, number))
    await asyncio.sleep(0)
    return n * 10 + number


async def play(plan: list[tuple[int, int, int, int]], turns: list[int]) -> None:
    global book
    asyncio.get_running_loop().set_task_factory(branching)
    book = Book()
    book.log = log = SlowLog(turns)
    for n in range(TASKS):
        book.place[n] = await log.store(DOOR, b'{"n": %d}' % n, {})
    workers = [agent(Counting(), log), agent(Counting(), log, "two")]
    for n, who, times, pause in plan:
        deliver(workers[who], book.place[n], b'{"n": %d}' % n, times)
        for _ in range(pause):
            await asyncio.sleep(0)
    await idle(*workers)
    for n in range(TASKS):  # a task that nobody has ended is delivered again, and what has ended, too
        deliver(workers[n % 2], book.place[n], b'{"n": %d}' % n, 9)
    await idle(*workers)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, TASKS - 1), st.integers(0, 1), st.integers(1, 3), st.integers(0, 40)), max_size=16
    ),
    st.lists(st.integers(0, 7), max_size=7),
)
def test_duplicate_and_shuffled_deliveries_change_nothing(
    plan: list[tuple[int, int, int, int]], turns: list[int]
) -> None:
    asyncio.run(play(plan, turns))
    assert not book.late, "an effect was performed although the log had its record"
    for n in range(TASKS):
        events = book.events(n)
        assert [event.version for event in events] == list(range(1, len(events) + 1))
        ends = [event.data for event in events if isinstance(event.data, TaskCompleted)]
        assert len(ends) == 1 and events[-1].data is ends[0]
        assert decode(bytes(ends[0].output)) == {"total": sum(n * 10 + number for number in range(STEPS))}
        records = Counter(event.data.key for event in events if isinstance(event.data, EffectRecorded))
        assert len(records) == STEPS and set(records.values()) == {1}
        claims = sum(isinstance(event.data, TaskClaimed) for event in events)
        assert all(1 <= book.performed[n, number] <= claims for number in range(STEPS)), "at most once for each claim"


# -- what an agent leaves to the next one


async def test_a_planned_retry_that_is_delivered_again_waits_for_its_time() -> None:
    """Its agent died after the commit, before the acknowledgement."""
    global book
    asyncio.get_running_loop().set_task_factory(branching)
    book = Book()
    log = book.log
    position = book.place[0] = await log.store(DOOR, b'{"n": 0}', {})
    name = f"task.counting.{position}"

    async def plan(head: Head, until: float) -> Head:
        claim = TaskClaimed(attempt=1, agent="dead", assignment="")
        planned = [claim, TaskRetried(retry=1, type="X", message="", until=until)]
        return (await log.append(name, events_for(name, head, planned, source="/x", correlation="1"), head)).head

    head = await plan(Head(), time.time() + 30)
    worker = agent(Counting(), log)
    client: Any = worker.client
    deliver(worker, position, b'{"n": 0}', 2)
    await idle(worker)
    assert not book.performed and client.said == [ACK]
    [(subject, headers)] = client.requests
    assert subject == f"dspex.timer.counting.{position}" and headers["Nats-Schedule"]
    await plan(head, time.time() - 1)
    deliver(worker, position, b'{"n": 0}', 2)
    await idle(worker)
    assert not book.performed and client.said == [ACK, ACK], "an old acknowledgement may end this delivery at any time"
    assert client.requests[-1][0] == "dspex.wake.counting"


async def test_a_sleeping_task_that_is_delivered_again_is_not_claimed_by_that() -> None:
    """Whoever put it to sleep may acknowledge it any moment; then only its timer or a wake would bring it back."""
    asyncio.get_running_loop().set_task_factory(branching)
    log = SlowLog([0])
    position = await log.store(DOOR, b'{"n": 0}', {})
    name = f"task.counting.{position}"
    asleep = [TaskClaimed(attempt=1, agent="dead", assignment=""), TaskSleeping(key="k", until=time.time() + 30)]
    await log.append(name, events_for(name, Head(), asleep, source="/x", correlation="1"), Head())
    worker = agent(Counting(), log)
    client: Any = worker.client
    deliver(worker, position, b'{"n": 0}', 2)
    await idle(worker)
    assert client.said == [ACK]
    assert [subject for subject, _ in client.requests] == [f"dspex.timer.counting.{position}"]
    assert len(log.known(name)) == 1, "nothing is written"


@effect
async def quick() -> int:
    return 1


class Lingering(Program):
    class Input(Schema):
        n: int = 0

    class Output(Schema):
        n: int = 0

    async def predict(self, input: Input) -> Output:
        await quick()
        await asyncio.sleep(60)
        return self.Output()


async def test_a_drain_writes_down_what_was_done_before_it_hands_a_run_back() -> None:
    asyncio.get_running_loop().set_task_factory(branching)
    log = SlowLog([20])
    position = await log.store("dspex.task.lingering", b"{}", {})
    worker = agent(Lingering(), log)
    client: Any = worker.client
    deliver(worker, position, b"{}", 1)
    [run] = worker.running.values()
    while not (run.recorder and run.recorder.writer.size):  # done, and not written yet
        await asyncio.sleep(0)
    await worker.drain(Patience(0.0))
    entries = log.known(f"task.lingering.{position}")
    kinds = [type(event.data).__name__ for entry in entries for event in decode_commit(entry.body, entry.position)]
    assert kinds == ["TaskClaimed", "EffectRecorded"] and client.said == [NAK]
    assert run.task
    run.task.cancel()
