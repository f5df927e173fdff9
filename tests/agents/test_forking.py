"""Forks as an agent begins them: the copy survives any death, and with nothing changed a fork ends like its parent."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET
from tests.agents.delivering import nothing_private

from dspex import InvalidInput, NotFound, Program, Schema, effect, idempotency_key
from dspex.agents import forking
from dspex.agents.forking import begin_fork
from dspex.agents.run import Run, Seat
from dspex.agents.writer import Superseded
from dspex.bus.pull import Delivery
from dspex.core import effects
from dspex.core.codec import decode_commit
from dspex.core.errors import LogError
from dspex.core.events import EffectRecorded, Event, Head, Payload, TaskCompleted, TaskForked, Usage
from dspex.core.history import remembered
from dspex.core.ports import Appended, Conflict
from dspex.core.subjects import Subjects
from dspex.store.memory import MemoryLog

SUBJECTS = Subjects()
keys: list[tuple[int, str]] = []


@effect
async def step(n: int) -> int:
    keys.append((n, idempotency_key()))
    return n + 1


class In(Schema):
    plan: list[int]


class Out(Schema):
    found: list[float]


class Plans(Program):
    """Does what its input says: one step, some at once, a random number, an id."""

    Input, Output = In, Out

    async def predict(self, input: In) -> Out:
        found: list[float] = []
        for what in input.plan:
            if what == 0:
                found.append(self.random().random())
            elif what == 1:
                found.append(await step(len(found)))
            else:
                found += await asyncio.gather(*(self._branch(n, what) for n in range(what)))
        return Out(found=found)

    async def _branch(self, n: int, what: int) -> float:
        total = await step(n)
        for _ in range(what - 2):
            total += await step(total)
        return total + self.random().random()


class Log(MemoryLog):
    """Dies after so many appends."""

    left: float = float("inf")

    async def append(self, aggregate: str, events: Sequence[Event], expected: Any) -> Appended | Conflict:
        if self.left <= 0:
            raise LogError("the log is away")
        self.left -= 1
        return await super().append(aggregate, events, expected)


def run_of(log: MemoryLog, task: int) -> Run:
    """An attempt on a task, with nothing but a log."""
    delivery = cast(Delivery, type("Given", (), {"position": task, "wake": 0})())
    none, loop = cast(Any, None), asyncio.get_running_loop()
    seat = Seat("a", "x", "c", "/agents/a", log, none, none, 1 << 20, loop, *nothing_private())
    return Run(seat, delivery, cast(Any, None), "plans", 0.0, 1e9)


async def submit(log: MemoryLog, program: str = "plans") -> int:
    return await log.store(SUBJECTS.door("task", program), b"{}", {})


async def events_of(log: MemoryLog, task: int) -> list[Event]:
    entries = await log.read(f"task.plans.{task}")
    return [event for entry in entries for event in decode_commit(entry.body, entry.position)]


async def write(run: Run, *payloads: Payload) -> None:
    await run.commit(run.events(run.claimed_by(list(payloads))))


async def ran(run: Run, plan: list[int]) -> list[float]:
    """Run the program for an attempt, up to its last commit."""
    async def main() -> Out:
        effects.begin(run)
        return await Plans().predict(In(plan=plan))

    output = await asyncio.Task(main())
    rest = await run.recorder.rest() if run.recorder else []
    await write(run, *rest, TaskCompleted(output=msgspec.Raw(output.encode())))
    return output.found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=5), st.data())
def test_a_fork_with_nothing_changed_ends_like_its_parent(plan: list[int], data: st.DataObject) -> None:
    async def work() -> None:
        asyncio.get_running_loop().set_task_factory(effects.branching)
        log = Log(subjects=SUBJECTS)
        parent = await submit(log)
        keys.clear()
        ended = await ran(run_of(log, parent), plan)
        before, theirs = await log.read(f"task.plans.{parent}"), list(keys)
        story = await events_of(log, parent)
        places = {event.data.key: event.version for event in story if isinstance(event.data, EffectRecorded)}
        at = data.draw(st.integers(0, story[-1].version))
        task = await submit(log)
        run = run_of(log, task)
        await begin_fork(run, str(parent), at, log, SUBJECTS)
        keys.clear()
        found = await ran(run, plan)
        # With nothing shared there is nothing of the parent in it, also not its random numbers.
        assert found == ended or at == 0
        copied = await events_of(log, task)
        own = [event.data.key for event in copied if isinstance(event.data, EffectRecorded) and "/" not in event.causation]
        assert sorted(own) == sorted(key for key, version in places.items() if version > at)
        assert len(keys) == len(own) and not {key for _, key in keys} & {key for _, key in theirs}
        assert await log.read(f"task.plans.{parent}") == before
        again = run_of(log, await submit(log))
        await begin_fork(again, str(task), copied[-1].version, log, SUBJECTS)
        assert await ran(again, plan) == found

    asyncio.run(work())


async def test_a_copy_is_gone_on_with_wherever_it_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forking, "MAX_COMMIT", 2100)  # three of them each, so there are three commits behind the first
    for appends in range(5):
        log = Log(subjects=SUBJECTS)
        parent = await submit(log)
        await write(run_of(log, parent), *(EffectRecorded(key=f"k{n}", name="k", digest="d") for n in range(9)))
        task = await submit(log)
        run, log.left = run_of(log, task), appends
        try:
            await begin_fork(run, str(parent), 8, log, SUBJECTS)
            assert appends == 4
        except LogError:
            run, log.left = run_of(log, task), float("inf")
            if appends:
                await take_over(run)
            await begin_fork(run, str(parent), 8, log, SUBJECTS)
        story = await events_of(log, task)
        memory = remembered(story)
        assert list(memory.records) == [f"k{n}" for n in range(7)] and memory.missing == 0
        assert [event.type for event in story].count("TaskForked") == 1
        assert remembered(run.history).records == memory.records
        assert [event.causation for event in story if event.type == "EffectRecorded"] == [
            f"task.plans.{parent}/{version}" for version in range(2, 9)
        ]


async def take_over(run: Run) -> None:
    """As the worker does for a task that was delivered before."""
    last = (await events_of(cast(MemoryLog, run.seat.log), int(run.id)))[-1]
    run.head, run.attempt = Head(last.version, last.position), 2
    await write(run)
    run.history = await events_of(cast(MemoryLog, run.seat.log), int(run.id))


async def test_a_fork_that_was_copied_needs_its_parent_no_more() -> None:
    log = Log(subjects=SUBJECTS)
    run = run_of(log, await submit(log))
    run.claimed = True
    forked = TaskForked(parent="99", at=3, seed="99", records=1)
    history = [forked, EffectRecorded(key="a", name="a", digest="d")]
    run.history = [Event("task.plans.1", n, "", "", "", "", data) for n, data in enumerate(history, 1)]
    await begin_fork(run, "99", 3, log, SUBJECTS)  # reads nothing, and finds no fault with a parent that is gone


async def test_another_attempt_that_was_first_ends_the_copy() -> None:
    log = Log(subjects=SUBJECTS)
    parent, task = await submit(log), await submit(log)
    await write(run_of(log, task), TaskForked(parent=str(parent), at=0, seed=str(parent)))
    with pytest.raises(Superseded):
        await begin_fork(run_of(log, task), str(parent), 0, log, SUBJECTS)


async def test_a_parent_that_is_none_is_refused() -> None:
    log = Log(subjects=SUBJECTS)
    other, parent, task = await submit(log, "other"), await submit(log), await submit(log)
    run = run_of(log, task)
    with pytest.raises(NotFound, match="plans has no task 99 to fork"):
        await begin_fork(run, "99", 0, log, SUBJECTS)
    with pytest.raises(NotFound, match=f"plans has no task {other} to fork"):
        await begin_fork(run, str(other), 0, log, SUBJECTS)
    with pytest.raises(InvalidInput, match=f"task {parent} has versions 0 to 0, there is no 1"):
        await begin_fork(run, str(parent), 1, log, SUBJECTS)
    assert await events_of(log, task) == []


async def test_a_fork_pays_nothing_for_what_it_shares() -> None:
    log = Log(subjects=SUBJECTS)
    parent = await submit(log)
    usage = Usage(0.5, 10, 1, "small")
    await write(run_of(log, parent), EffectRecorded(key="k", name="e", digest="", result=msgspec.Raw(b"1"), usage=usage))
    task = await submit(log)
    await begin_fork(run_of(log, task), str(parent), 2, log, SUBJECTS)
    for story, paid in ((await events_of(log, parent), [usage]), (await events_of(log, task), [UNSET])):
        assert [event.data.usage for event in story if isinstance(event.data, EffectRecorded)] == paid
