"""Replay: the same code is the same, and each kind of change is named for what it is."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.core.recording import history, record

from dspex import Program, Schema, effect
from dspex.core.events import EffectRecorded, TaskCompleted, TaskFailed, TaskRetried, TaskSleeping
from dspex.core.replay import Report, replay

performed: list[Any] = []


@effect
async def step(n: int) -> int:
    performed.append(n)
    return n * 10


@effect
def slow(n: int) -> int:
    performed.append(n)
    return n + 1


@effect
async def bad() -> int:
    raise KeyError("nope")


class In(Schema):
    n: int = 1


class Out(Schema):
    value: Any = None


Body = Callable[[Any], Awaitable[Any]]


def program(body: Body) -> Program:
    """A program named `work` that does what `body` does."""

    class Work(Program):
        Input, Output = In, Out

        async def predict(self, input: In) -> Out:
            return Out(value=await body(self))

    return Work()


def again(before: Body, after: Body, **how: Any) -> Report:
    """Record one body, replay another; nothing may be performed."""
    events = record(program(before), **how)
    performed.clear()
    report = asyncio.run(replay(program(after), events, "7"))
    assert performed == []
    assert report.performed == 0
    return report


async def one_two(self: Any) -> Any:
    return [await step(1), await step(2)]


async def everything(self: Any) -> Any:
    found: list[Any] = [self.now(), self.random().random(), self.new_id(), await step(1), await slow(2)]
    found += await asyncio.gather(*(step(n) for n in (3, 4, 5)))
    found += await asyncio.gather(two(6), two(8))
    try:
        await bad()
    except KeyError as error:
        found.append(repr(error))
    await self.sleep(3600)
    found.append(await self.signal("approval"))
    return found


async def two(n: int) -> int:
    one, other = await asyncio.gather(step(n), step(n + 1))
    return one + other + await slow(n)


def test_the_same_code_gives_the_same_bytes_and_performs_nothing() -> None:
    report = again(everything, everything, signals={"approval": {"by": "me"}})
    assert (report.same, report.effects, report.difference) == (True, 16, None)


async def two_more(n: int) -> int:
    return await two(n) + await slow(n)


async def one(self: Any) -> Any:
    return [await step(1), 20]


async def two_one(self: Any) -> Any:
    second = await step(2)
    return [await step(1), second]


async def one_three(self: Any) -> Any:
    return [await step(1), await step(3)]


async def inserted(self: Any) -> Any:
    await slow(1)
    return await one_two(self)


async def inserted_alike(self: Any) -> Any:
    await step(9)
    return await one_two(self)


async def only_two(self: Any) -> Any:
    return [10, await step(2)]


async def other_output(self: Any) -> Any:
    return [await step(1), 1 + await step(2)]


async def raises(self: Any) -> Any:
    await one_two(self)
    raise LookupError("today")


async def catches(self: Any) -> Any:
    try:
        return [await step(1), await step(3)]
    except Exception:
        return "caught"


@pytest.mark.parametrize(
    ("after", "kind", "place"),
    [
        (one, "removed", "work.step#1"),
        (only_two, "removed", "work.step#0"),
        (two_one, "reordered", "work.step#0"),
        (one_three, "arguments", "work.step#1"),
        (catches, "arguments", "work.step#1"),
        (inserted, "added", "work.slow#0"),
        (inserted_alike, "added", "work.step#0"),
        (other_output, "output", "output.value[1]"),
        (raises, "error", "output"),
    ],
)
def test_each_kind_of_change_is_named(after: Body, kind: str, place: str) -> None:
    difference = again(one_two, after).difference
    assert difference is not None
    assert (difference.kind, difference.place) == (kind, place)


def test_a_difference_says_what_was_expected_what_was_found_and_where() -> None:
    difference = again(one_two, one_three).difference
    assert difference is not None
    assert (difference.expected, difference.found) == ("step(2)", "step(3)")
    assert difference.where.startswith(f"{__file__}:")
    assert difference.where.endswith(" in one_three")


def test_another_error_is_named_with_its_line() -> None:
    async def other(self: Any) -> Any:
        await one_two(self)
        raise ValueError("x")

    difference = again(raises, other).difference
    assert difference is not None
    assert (difference.kind, difference.expected, difference.found) == ("error", "LookupError", "ValueError: x")
    assert difference.where.endswith(" in other")
    assert again(raises, raises).same
    now_fine = again(raises, one_two).difference
    assert now_fine is not None
    assert now_fine.kind == "output"


def test_a_change_in_one_branch_of_a_gather_is_named_there() -> None:
    async def both(self: Any) -> Any:
        return await asyncio.gather(two(1), two(3))

    async def changed(self: Any) -> Any:
        return await asyncio.gather(two(1), two_more(3))

    difference = again(both, changed).difference
    assert difference is not None
    assert (difference.kind, difference.place) == ("added", "~1/work.slow#1")


def test_branches_may_finish_in_any_order() -> None:
    def waits(*seconds: float) -> Body:
        async def branch(n: int, pause: float) -> Any:
            await asyncio.sleep(pause)
            return [await step(n), await step(n + 10)]

        async def body(self: Any) -> Any:
            return await asyncio.gather(*(branch(n, pause) for n, pause in enumerate(seconds)))

        return body

    assert again(waits(0.03, 0.0, 0.01), waits(0.0, 0.02, 0.0)).same


def test_effects_that_were_under_way_together_may_be_recorded_in_any_order() -> None:
    async def gathered(self: Any) -> Any:
        return await asyncio.gather(step(1), slow(1), step(2))

    work = program(gathered)
    claim, *effects, done = [event.data for event in record(work)[1:]]
    assert asyncio.run(replay(work, history(work, "7", {}, [claim, *reversed(effects), done]), "7")).same

    async def one_by_one(self: Any) -> Any:
        second = await slow(1)
        return [await step(1), second, await step(2)]

    ordered = history(work, "7", {}, [claim, *sorted(effects, key=lambda e: e.digest != effects[0].digest), done])
    difference = asyncio.run(replay(program(one_by_one), ordered, "7")).difference
    assert difference is not None
    assert difference.kind == "reordered"


@effect
async def branches_inside() -> int:
    return sum(await asyncio.gather(asyncio.sleep(0, 1), asyncio.sleep(0, 2)))


def test_tasks_that_an_effect_starts_take_no_branch_of_the_run() -> None:
    async def body(self: Any) -> Any:
        return [await branches_inside(), await asyncio.gather(two(1), two(3))]

    assert again(body, body).same


def test_a_task_that_sleeps_replays_up_to_where_its_record_stops() -> None:
    async def sleeps(self: Any) -> Any:
        first = await step(1)
        await self.sleep(3600)
        return [first, await step(2)]

    report = again(sleeps, sleeps, stop="sleep")
    assert (report.same, report.effects, report.stopped) == (True, 1, "work.sleep#0")
    difference = again(sleeps, one_three, stop="sleep").difference
    assert difference is None  # what comes behind the record is not known

    async def starts_otherwise(self: Any) -> Any:
        return await step(2)

    found = again(sleeps, starts_otherwise, stop="sleep").difference
    assert found is not None
    assert found.kind == "arguments"


def test_a_branch_that_sleeps_does_not_hide_what_others_recorded() -> None:
    async def half(self: Any) -> Any:
        async def nap() -> None:
            await self.sleep(60)

        async def other() -> int:
            return await step(1) + await step(2)

        return await asyncio.gather(nap(), other())

    events = record(program(half), stop="nothing")
    kept = [event for event in events if getattr(event.data, "name", "") != "sleep"]
    kept = [event for event in kept if not isinstance(event.data, TaskCompleted)]
    report = asyncio.run(replay(program(half), kept, "7"))
    assert (report.same, report.effects, report.stopped) == (True, 2, "~0/work.sleep#0")


def test_sub_programs_have_places_of_their_own() -> None:
    class Inner(Program):
        Input, Output = In, Out

        async def predict(self, input: In) -> Out:
            return Out(value=await step(input.n))

    class Outer(Program):
        Input, Output = In, Out
        left = Inner()
        right = Inner()

        async def predict(self, input: In) -> Out:
            one = await self.left(n=1)
            return Out(value=[one.value, (await self.right(n=2)).value])

    class Swapped(Outer):
        name = "outer"

        async def predict(self, input: In) -> Out:
            two = await self.right(n=2)
            return Out(value=[(await self.left(n=1)).value, two.value])

    events = record(Outer())
    assert asyncio.run(replay(Outer(), events, "7")).same
    difference = asyncio.run(replay(Swapped(), events, "7")).difference
    assert difference is not None
    assert (difference.kind, difference.place) == ("reordered", "outer.right.step#0")


class Plain(Program):
    Input, Output = In, Out

    def predict(self, input: In) -> Out:
        found = [slow(1), step(2), self.now(), self.new_id(), self.random().random()]
        self.sleep(100)
        return Out(value=[*found, self.signal("go"), slow(3)])


def test_a_plain_program_replays_in_its_thread() -> None:
    events = record(Plain(), signals={"go": True})
    performed.clear()
    report = asyncio.run(replay(Plain(), events, "7"))
    assert (report.same, report.effects, performed) == (True, 7, [])
    asleep = record(Plain(), stop="sleep")
    report = asyncio.run(replay(Plain(), asleep, "7"))
    assert (report.same, report.effects, report.stopped) == (True, 4, "plain.sleep#0")


def test_a_retry_sees_the_records_that_its_attempt_saw() -> None:
    work = program(one_two)
    events = record(work)
    effects = [event.data for event in events if isinstance(event.data, EffectRecorded)]
    retried = TaskRetried(retry=1, type="E", message="m", until=0.0)
    gone = EffectRecorded(key="work.slow#0", name="slow", digest="x")
    kept = history(work, "7", {}, [gone, effects[0], retried, effects[1], events[-1].data])
    assert asyncio.run(replay(work, kept, "7")).same  # what an earlier attempt asked need not be asked again
    clean = TaskRetried(retry=1, type="E", message="m", until=0.0, clean=True)
    kept = history(work, "7", {}, [gone, clean, *effects, events[-1].data])
    assert asyncio.run(replay(work, kept, "7")).same


def test_what_no_program_gave_is_not_run_again() -> None:
    late = TaskFailed(code=408, type="DeadlineExceeded", message="late")
    report = asyncio.run(replay(program(one_two), history(program(one_two), "7", {}, [late]), "7"))
    assert (report.same, "deadline" in report.why) == (None, True)


def test_a_signal_that_did_not_come_in_time_is_a_timeout_again() -> None:
    async def hopes(self: Any) -> Any:
        try:
            return await self.signal("go", timeout=1)
        except TimeoutError as error:
            return str(error)

    work = program(hopes)
    late = "builtins:TimeoutError"
    gone = EffectRecorded(key="work.signal.go#0", name="signal.go", digest="", error=late, arguments=["late"])
    sleeping = TaskSleeping(key=gone.key, until=1.0, signal="go")
    done = record(program(hopes), signals={"go": "late"})[-1].data
    assert asyncio.run(replay(work, history(work, "7", {}, [sleeping, gone, done]), "7")).same
