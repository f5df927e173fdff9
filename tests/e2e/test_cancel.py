"""Tasks that nobody wants any more: they end at once, wherever they stand, and do nothing more."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.plain import Plain, Story
from tests.e2e.running import Running, freeze
from tests.e2e.test_durable import PLANS

Launch = Callable[..., Running]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book"
    path.touch()
    return path


async def cancel(plain: Plain, program: str, task: int, reason: object = None, by: str = "") -> None:
    body = {"task": task, "name": "cancel", "value": reason}
    await plain.store("signal", program, body, {"Dspex-Actor": by} if by else None)


def lines(book: Path) -> list[str]:
    return book.read_text().splitlines()


def types(story: Story, program: str, task: int) -> list[str]:
    return story.types(f"task.{program}.{task}")


async def test_a_cancelled_task_ends_wherever_it_stands(systems: Launch, book: Path) -> None:
    made: dict[str, Any] = {"book": str(book)}
    with systems(*PLANS) as system:
        async with await system.plain() as plain:
            asleep = await plain.submit("waits", made | {"task": "asleep", "do": "signal"})
            thread = await plain.submit("threaded", made | {"task": "thread", "seconds": 1.5})
            asking = asyncio.ensure_future(plain.ask("steps", made | {"task": "asked", "seconds": 30}))
            story = await plain.until(
                lambda s: "TaskSleeping" in types(s, "waits", asleep) and len(lines(book)) == 3
            )
            (asked,) = story.submitted("steps")
            tasks = [("waits", asleep), ("steps", asked), ("threaded", thread)]
            for program, task in tasks:
                await cancel(plain, program, task, "the customer has gone", "eve")
            reply = await asking
            assert (reply.code, reply.error["type"], reply.task) == (409, "TaskCancelled", str(asked))
            found = await plain.final("waits", asleep)
            assert (found.code, found.error["message"]) == (409, "the task was cancelled: the customer has gone")
            await asyncio.sleep(2.5)  # the thread's next effect, or a late wake, would come by now
            story = await plain.story(story)
            for program, task in tasks:
                story.check_once(program, [task])
                last = story.events(f"task.{program}.{task}")[-1]
                assert (last["type"], last["data"]) == (
                    "TaskCancelled", {"reason": "the customer has gone", "by": "eve"}
                )  # fmt: skip
            done = sorted(line.split()[:2] for line in lines(book))
            assert done == [["asked", "0"], ["asleep", "0"], ["thread", "0"]]


async def test_what_a_cancelled_task_has_called_is_cancelled_too(systems: Launch, book: Path) -> None:
    with systems(*PLANS) as system:
        async with await system.plain() as plain:
            caller = await plain.submit("calls", {"book": str(book), "task": "t", "seconds": 30})
            story = await plain.until(lambda s: bool(lines(book)))
            (called,) = story.submitted("steps")
            await cancel(plain, "calls", caller)
            story = await plain.until(lambda s: "TaskCancelled" in types(s, "steps", called))
            assert f"task {caller}" in story.events(f"task.steps.{called}")[-1]["data"]["reason"]
            assert types(story, "calls", caller)[-1] == "TaskCancelled"


async def test_a_cancellation_waits_for_an_agent_and_a_task_that_has_ended_stays_as_it_is(
    systems: Launch, book: Path
) -> None:
    made = {"book": str(book), "task": "t"}
    first = systems(PLANS[1]).start()
    async with await first.plain() as plain:
        ended = await plain.submit("waits", made)
        await plain.final("waits", ended)
        await cancel(plain, "waits", ended)
        await cancel(plain, "waits", 10**15)
        held = await plain.submit("waits", made | {"do": "signal"})
        await plain.until(lambda s: "TaskSleeping" in types(s, "waits", held))
        freeze(first.below_supervisor()[-1])
        fresh = await plain.submit("waits", made | {"do": "signal"})
        await cancel(plain, "waits", held)
        await cancel(plain, "waits", fresh)
    first.kill()
    with systems(PLANS[1]) as second:
        async with await second.plain() as plain:
            story = await plain.until_ended("waits", [ended, held, fresh])
            assert types(story, "waits", ended)[-1] == "TaskCompleted"
            assert types(story, "waits", held)[-1] == "TaskCancelled"
            assert types(story, "waits", fresh)[-1] == "TaskCancelled"
            story.check_once("waits", [ended, held, fresh])
