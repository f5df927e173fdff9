"""Idempotency keys: the same program and key never run twice, whenever they come."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.plain import Plain, Story
from tests.e2e.running import Running, until

LASTING = Path(__file__).with_name("lasting.py")
PLANS = [("Nap", 2), ("Work", 2)]


def check_one_run(story: Story, program: str, tasks: list[int]) -> int:
    """Of tasks with one key one has completed and the others are its duplicates; return it."""
    endings = story.endings(program)
    kinds = sorted(endings[task][0] for task in tasks)
    assert kinds == ["TaskCompleted"] + ["TaskDuplicate"] * (len(tasks) - 1)
    original = next(task for task in tasks if endings[task] == ["TaskCompleted"])
    for task in tasks:
        if task != original:
            assert story.events(f"task.{program}.{task}")[-1]["data"]["of"] == str(original)
    return original


async def test_the_same_key_submitted_at_once_runs_once_and_all_find_the_result(plain: Plain) -> None:
    key = {"Dspex-Key": "at once"}
    tasks = await asyncio.gather(*(plain.submit("nap", {"n": n}, key) for n in range(20)))
    original = check_one_run(await plain.until_ended("nap", tasks), "nap", tasks)
    replies = [await plain.result("nap", task) for task in tasks] + [await plain.result("nap", "at once")]
    assert {reply.body for reply in replies} == {replies[0].body}
    assert {reply.task for reply in replies} == {str(original)}


async def test_the_same_key_long_after_runs_once_over_restarts_of_everything(systems: Callable[..., Running]) -> None:
    tasks = []
    for _ in range(3):
        with systems(("Nap", 1)) as system:
            async with await system.plain() as plain:
                tasks.append(await plain.submit("nap", {"n": len(tasks)}, {"Dspex-Key": "long after"}))
                story = await plain.until_ended("nap")
                assert (await plain.result("nap", tasks[-1])).json["n"] == 0
    assert check_one_run(story, "nap", tasks) == tasks[0]


async def test_asks_with_the_same_key_get_the_same_output(plain: Plain) -> None:
    key = {"Dspex-Key": "asked"}
    replies = await asyncio.gather(*(plain.ask("nap", {"n": n, "seconds": 0.2}, key) for n in range(10)))
    again = await plain.ask("nap", {"n": 99}, key)
    assert {reply.body for reply in [*replies, again]} == {again.body}
    assert {reply.task for reply in replies} == {again.task}


async def test_an_ask_and_a_submission_with_the_same_key_are_one_run(plain: Plain) -> None:
    key = {"Dspex-Key": "mixed"}
    task = await plain.submit("nap", {"n": 1, "seconds": 0.3}, key)
    reply = await plain.ask("nap", {"n": 2}, key)
    assert (reply.json["n"], reply.task) == (1, str(task))


async def test_the_message_id_is_the_short_way_to_the_same_end(plain: Plain) -> None:
    headers = {"Dspex-Key": "order-1", "Nats-Msg-Id": "nap/order-1"}
    tasks = [await plain.submit("nap", {"n": n}, headers) for n in range(3)]
    assert len(set(tasks)) == 1
    late = await plain.submit("nap", {"n": 9}, {"Dspex-Key": "order-1"})
    check_one_run(await plain.until_ended("nap", [tasks[0], late]), "nap", [tasks[0], late])


async def test_a_key_belongs_to_one_program(plain: Plain) -> None:
    key = {"Dspex-Key": "shared"}
    assert (await plain.ask("nap", {"n": 1}, key)).json["n"] == 1
    assert (await plain.ask("work", {"text": "mine"}, key)).json["text"] == "mine"


async def test_the_key_of_a_task_that_was_no_input_is_not_bound(plain: Plain) -> None:
    key = {"Dspex-Key": "try again"}
    bad = await plain.submit("nap", {"n": "one"}, key)
    assert (await plain.result("nap", bad)).code == 400
    assert (await plain.result("nap", "try again")).code == 404
    good = await plain.submit("nap", {"n": 1}, key)
    assert (await plain.result("nap", good)).json["n"] == 1


async def test_the_key_of_a_task_that_failed_stays_with_it(plain: Plain) -> None:
    key = {"Dspex-Key": "failed"}
    first = await plain.ask("work", {"do": "raise"}, key)
    second = await plain.ask("work", {"text": "fine"}, key)
    assert (first.code, second.code) == (500, 500)
    assert second.error == first.error


async def test_a_key_may_hold_any_text(plain: Plain) -> None:
    for number, key in enumerate(["a b", "../../x", "*.>", "ü€", "k" * 256, "1", '"', "{}"]):
        headers = {"Dspex-Key": key}
        first = await plain.ask("nap", {"n": number}, headers)
        second = await plain.ask("nap", {"n": -1}, headers)
        assert second.json == first.json and first.json["n"] == number


async def test_a_key_runs_once_although_agents_are_killed(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 3)) as system:
        async with await system.plain() as plain:
            tasks = []
            for number in range(4):
                keys = [{"Dspex-Key": f"key {n}"} for n in range(10)]
                tasks += [(n, await plain.submit("nap", {"n": n, "seconds": 0.3}, key)) for n, key in enumerate(keys)]
                agents = until(lambda: system.below_supervisor()[2:])  # those that are there just now
                os.kill(agents[number % len(agents)], signal.SIGKILL)
            story = await plain.until_ended("nap")
            story.check_once("nap", [task for _, task in tasks])
            for key in range(10):
                check_one_run(story, "nap", [task for n, task in tasks if n == key])


@pytest.mark.parametrize("name", ["go", "cancel"])
async def test_a_signal_to_a_duplicate_is_for_the_task_that_runs(
    systems: Callable[..., Running], tmp_path: Path, name: str
) -> None:
    book = tmp_path / "book"
    book.touch()
    body = {"book": str(book), "task": "one", "do": "signal"}
    with systems((f"{LASTING}:Waits", 1)) as system:
        async with await system.plain() as plain:
            # Twice right after the submissions, when nobody may know yet which of the two runs, and once when all do.
            for n in range(3):
                key = {"Dspex-Key": f"{name} {n}"}
                first, second = [await plain.submit("waits", body, key) for _ in range(2)]
                if n == 2:
                    await plain.until_ended("waits", [second])
                await plain.store("signal", "waits", {"task": second, "name": name, "value": n})
                story = await plain.until_ended("waits", [first, second])
                endings = story.endings("waits")
                wanted = "TaskCancelled" if name == "cancel" else "TaskCompleted"
                assert sorted(endings[first] + endings[second]) == sorted([wanted, "TaskDuplicate"])
                story.check_versions()
