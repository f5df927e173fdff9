"""Whoever is killed, whenever: every acknowledged task completes exactly once, and the client's view agrees."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable

import pytest
from tests.e2e.plain import WRONG, Plain, Story
from tests.e2e.running import Running, gone, until

TASKS = 1000


class Submitter:
    """Submits `TASKS` tasks while something else goes on; only what was acknowledged counts."""

    def __init__(self, plain: Plain, count: int = TASKS, at_once: int = 16) -> None:
        self.plain, self.count, self.at_once = plain, count, at_once
        self.acknowledged: dict[int, int] = {}
        self.refused = 0
        self.allowed = float(count)
        self._numbers = iter(range(count))

    async def run(self) -> None:
        await asyncio.gather(*(self._submit() for _ in range(self.at_once)))

    async def _submit(self) -> None:
        for n in self._numbers:
            while n >= self.allowed:
                await asyncio.sleep(0.005)
            try:
                self.acknowledged[await self.plain.submit("nap", {"n": n, "seconds": 0.1}, timeout=1)] = n
            except WRONG:
                self.refused += 1
                await asyncio.sleep(0.05)

    async def reached(self, share: float) -> None:
        """Wait until this share of the tasks has been tried."""
        while len(self.acknowledged) + self.refused < share * self.count:
            await asyncio.sleep(0.005)


async def check(system: Running, plain: Plain, submitter: Submitter) -> Story:
    story = await plain.until_ended("nap", patience=60)
    acknowledged = submitter.acknowledged
    story.check_once("nap", list(acknowledged))
    assert len(acknowledged) > submitter.count / 2
    outputs = story.outputs("nap")
    assert {task: outputs[task]["n"] for task in acknowledged} == acknowledged
    for task in random.Random(0).sample(sorted(acknowledged), 50):
        reply = await plain.result("nap", task)
        assert reply.json == outputs[task] and reply.task == str(task)
    return story


def an_agent(system: Running) -> int:
    return system.below_supervisor()[-1]


VICTIMS: dict[str, Callable[[Running], int]] = {
    "agent": an_agent, "supervisor": Running.supervisor, "server": Running.server, "registrar": Running.registrar,
    "archivist": Running.archivist,
}  # fmt: skip


@pytest.mark.parametrize("victim", VICTIMS)
async def test_every_acknowledged_task_completes_once_when_a_process_is_killed(
    systems: Callable[..., Running], victim: str
) -> None:
    with systems(("Nap", 2)) as system:
        async with await system.plain() as plain:
            submitter = Submitter(plain)
            running = asyncio.create_task(submitter.run())
            await submitter.reached(0.4)
            os.kill(VICTIMS[victim](system), signal.SIGKILL)
            await running
            story = await check(system, plain, submitter)
            if victim == "agent":  # the others let the agents finish what they hold
                assert any(claim["data"]["attempt"] > 1 for claim in story.all_of("TaskClaimed"))


async def test_every_acknowledged_task_completes_once_when_all_are_killed_in_turn(
    systems: Callable[..., Running],
) -> None:
    chance = random.Random(20261123)
    order = list(VICTIMS) * 2
    chance.shuffle(order)
    with systems(("Nap", 2)) as system:
        async with await system.plain() as plain:
            submitter = Submitter(plain)
            running = asyncio.create_task(submitter.run())
            for number, victim in enumerate(order, 1):
                share = number / (len(order) + 1)
                submitter.allowed = share * TASKS  # so that every part is submitted while something is down
                await submitter.reached(share)
                await asyncio.sleep(chance.random() * 0.2)
                while not (pid := _try(VICTIMS[victim], system)):
                    await asyncio.sleep(0.01)
                os.kill(pid, signal.SIGKILL)
            submitter.allowed = TASKS
            await running
            await check(system, plain, submitter)


def _try(victim: Callable[[Running], int], system: Running) -> int:
    try:
        return victim(system)
    except (StopIteration, IndexError):
        return 0


async def test_a_killed_root_takes_all_with_it_and_a_new_start_finishes_the_work(
    systems: Callable[..., Running],
) -> None:
    first = systems(("Nap", 2)).start()
    async with await first.plain() as plain:
        submitter = Submitter(plain)
        running = asyncio.create_task(submitter.run())
        await submitter.reached(0.5)
        below = first.descendants()
        os.kill(first.root, signal.SIGKILL)
        second = systems(("Nap", 2)).start()  # at once: it waits for the orphans to let go
        running.cancel()
        acknowledged = dict(submitter.acknowledged)
    until(lambda: all(gone(pid) for pid in below), 10, "orphans live on")
    async with await second.plain() as plain:
        story = await plain.until_ended("nap")
        story.check_once("nap", list(acknowledged))
        outputs = story.outputs("nap")
        assert {task: outputs[task]["n"] for task in acknowledged} == acknowledged
