"""Deliveries in any order, several times, to two agents at once: each task ends once, and no record is made twice."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.json import decode

from dspex import Program, Schema, effect
from dspex.agents.worker import Worker
from dspex.bus.pull import Delivery
from dspex.bus.wire import Message
from dspex.core.codec import decode_commit
from dspex.core.effects import branching
from dspex.core.events import EffectRecorded, Event, Head, TaskClaimed, TaskCompleted
from dspex.core.ports import Appended, Conflict, Entry
from dspex.core.subjects import Subjects
from dspex.store.memory import MemoryLog

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


class SlowLog(MemoryLog):
    """A log that takes some turns of the loop to answer, and to be reached."""

    def __init__(self, turns: Sequence[int]) -> None:
        super().__init__()
        self._turns, self._asked = list(turns) or [0], 0

    async def _wait(self) -> None:
        self._asked += 1
        for _ in range(self._turns[self._asked % len(self._turns)]):
            await asyncio.sleep(0)

    async def append(self, aggregate: str, events: Sequence[Event], expected: Head) -> Appended | Conflict:
        await self._wait()
        result = await super().append(aggregate, events, expected)
        await self._wait()
        return result

    async def read(self, aggregate: str) -> list[Entry]:
        await self._wait()
        return await super().read(aggregate)

    def known(self, aggregate: str) -> list[Entry]:
        return list(self._of.get(f"dspex.event.{aggregate}", ()))


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


class Client:
    """Takes what an agent says, and counts the acknowledgements."""

    max_payload = 1 << 20

    def acknowledge(self, message: Message, word: bytes) -> None:
        pass


class Slots:
    since = 0.0

    def release(self) -> None:
        pass


def agent(name: str, log: SlowLog) -> Worker:
    client: Any = Client()
    return Worker(
        Counting(), agent=name, code="", client=client, log=log, subjects=Subjects(), on_worn=lambda why: None
    )


def deliver(worker: Worker, position: int, n: int, times: int) -> None:
    slots: Any = Slots()
    reply = b"$JS.ACK.DSPEX.task-counting.%d.%d.1.1700000000000000000.0" % (times, position)
    worker.take(Delivery(Message(DOOR.encode(), reply, b'{"n": %d}' % n, None)), slots)


async def idle(*workers: Worker) -> None:
    async with asyncio.timeout(20):
        while any(worker.running for worker in workers):
            await asyncio.sleep(0)


async def play(plan: list[tuple[int, int, int, int]], turns: list[int]) -> None:
    global book
    asyncio.get_running_loop().set_task_factory(branching)
    book = Book()
    book.log = log = SlowLog(turns)
    for n in range(TASKS):
        book.place[n] = await log.store(DOOR, b'{"n": %d}' % n, {})
    workers = [agent("one", log), agent("two", log)]
    for n, who, times, pause in plan:
        deliver(workers[who], book.place[n], n, times)
        for _ in range(pause):
            await asyncio.sleep(0)
    await idle(*workers)
    for n in range(TASKS):  # a task that nobody has ended is delivered again, and what has ended, too
        deliver(workers[n % 2], book.place[n], n, 9)
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
