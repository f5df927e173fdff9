"""Tasks that end their process are found after a bounded number of deaths, and nobody else is taken for one.

`benchmarks/poison.py` does the same at length.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

from tests.e2e.conftest import Launch
from tests.e2e.plain import Story
from tests.e2e.running import Running, freeze

from dspex.core.suspicion import LOST

APP = f"{Path(__file__).parent / 'poisonous.py'}:Careful"
STEADY = APP.replace("Careful", "Steady")
ATTEMPTS = 1
REASONS = {"exit": "exit 3", "kill": "SIGKILL", "segfault": "SIGSEGV"}


def deaths(story: Story, task: int, program: str = "careful") -> list[tuple[str, bool]]:
    events = story.events(f"task.{program}.{task}")
    return [(e["data"]["reason"], e["data"]["alone"]) for e in events if e["type"] == "AttemptDied"]


async def test_three_poisonous_tasks_are_set_aside_and_two_hundred_others_complete_once(systems: Launch) -> None:
    with systems((APP, 3)) as system:
        async with await system.plain() as plain:
            numbers = iter(range(1000))
            good = {await plain.submit("careful", {"n": n}): n for n in (next(numbers) for _ in range(100))}
            bad = {await plain.submit("careful", {"n": 0, "do": do}): do for do in REASONS}
            good |= {await plain.submit("careful", {"n": n}): n for n in (next(numbers) for _ in range(100))}
            story = await plain.until_ended("careful", [*good, *bad], patience=240)
            endings = story.endings("careful")
            assert {task: endings[task] for task in bad} == {task: ["TaskDeadLettered"] for task in bad}
            assert {task: endings[task] for task in good} == {task: ["TaskCompleted"] for task in good}
            assert {task: story.outputs("careful")[task]["n"] for task in good} == good
            for task, do in bad.items():
                died = deaths(story, task)
                alone = sum(alone for _, alone in died)
                assert {reason for reason, _ in died if reason} >= {REASONS[do]}
                assert alone == (2 * ATTEMPTS if do == "kill" else ATTEMPTS)
                claims = story.types(f"task.careful.{task}").count("TaskClaimed")
                assert claims < LOST * ATTEMPTS, "found by its deaths, not by the last bound"
            assert not any(alone for task in good for _, alone in deaths(story, task))
            reply = await plain.result("careful", next(iter(bad)))
            assert reply.code == 500 and "with nothing else in its process" in reply.error["message"]


async def test_agents_killed_from_outside_make_no_dead_letter(systems: Launch) -> None:
    """Each kill takes whatever the agent held, alone or in company; the tasks are long enough to be hit often."""
    chance = random.Random(23)
    with systems((STEADY, 3)) as system:
        async with await system.plain() as plain:
            tasks = [await plain.submit("steady", {"n": n, "seconds": 1.0}) for n in range(30)]
            for number in range(8):
                pid = await _some_agent(system, chance)
                if number % 4 == 3:
                    freeze(pid)
                    await asyncio.sleep(1.0)
                os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.4 + chance.random() * 0.4)
            story = await plain.until_ended("steady", tasks, patience=240)
            assert {task: story.endings("steady")[task] for task in tasks} == {t: ["TaskCompleted"] for t in tasks}
            assert any(deaths(story, task, "steady") for task in tasks)


async def _some_agent(system: Running, chance: random.Random) -> int:
    while not (pids := system.agent_pids()):
        await asyncio.sleep(0.02)
    return chance.choice(pids)


async def test_a_frozen_agent_is_no_death(systems: Launch) -> None:
    with systems((APP, 2)) as system:
        async with await system.plain() as plain:
            agents = await system.agents(plain, "careful")
            tasks = [await plain.submit("careful", {"n": n, "seconds": 1.0}) for n in range(4)]
            await asyncio.sleep(0.5)
            frozen = next(iter(agents.values()))
            freeze(frozen)
            story = await plain.until_ended("careful", tasks, patience=120)
            os.kill(frozen, signal.SIGCONT)
            assert {task: story.endings("careful")[task] for task in tasks} == {t: ["TaskCompleted"] for t in tasks}
            assert not any(deaths(story, task) for task in tasks)


async def test_one_that_dies_after_each_wake_is_found_too(systems: Launch) -> None:
    with systems((APP, 1)) as system:
        async with await system.plain() as plain:
            task = await plain.submit("careful", {"n": 1, "do": "sleep"})
            story = await plain.until_ended("careful", [task], patience=240)
            assert story.endings("careful")[task] == ["TaskDeadLettered"]
            assert sum(alone for _, alone in deaths(story, task)) == ATTEMPTS
