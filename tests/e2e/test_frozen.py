"""Two attempts on one task: a frozen agent that wakes up, a second delivery, a foreign append. One completion."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable

import pytest
from msgspec import Raw
from tests.e2e.plain import Plain
from tests.e2e.running import Running

from dspex.bus.client import Client
from dspex.core.codec import rfc3339
from dspex.core.events import Event, Head, TaskClaimed, TaskCompleted
from dspex.core.ports import Appended, Conflict
from dspex.core.subjects import Subjects
from dspex.store.jetstream import JetStreamLog

PLANS = [("Nap", 2)]


async def test_a_task_of_a_frozen_agent_completes_elsewhere_and_once(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 2)) as system:
        async with await system.plain() as plain:
            agents = await system.agents(plain, "nap")
            tasks = [await plain.submit("nap", {"n": n, "seconds": 0.5}) for n in range(40)]
            frozen = next(iter(agents.values()))
            os.kill(frozen, signal.SIGSTOP)
            try:
                story = await plain.until_ended("nap", tasks)
            finally:
                os.kill(frozen, signal.SIGCONT)
            elsewhere = {output["pid"] for output in story.outputs("nap").values()}
            assert elsewhere <= set(agents.values())
            late = [await plain.submit("nap", {"n": n}) for n in range(40)]
            for task in late:
                await plain.final("nap", task)
            await asyncio.sleep(1)  # time for late commits and acks, which must change nothing
            story = await plain.until_ended("nap")
            story.check_once("nap", tasks + late)
            assert await system.agents(plain, "nap") == agents, "being frozen for a while is no reason to die"


async def test_a_lone_agent_that_was_frozen_goes_on_with_what_it_had(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 1)) as system:
        async with await system.plain() as plain:
            agents = await system.agents(plain, "nap")
            tasks = [await plain.submit("nap", {"n": n, "seconds": 0.5}) for n in range(10)]
            (agent,) = agents.values()
            os.kill(agent, signal.SIGSTOP)
            await asyncio.sleep(2)  # past the time after which its tasks are anybody's
            os.kill(agent, signal.SIGCONT)
            story = await plain.until_ended("nap", tasks)
            story.check_once("nap", tasks)
            assert await system.agents(plain, "nap") == agents


@pytest.fixture
async def log(shared: Running) -> AsyncIterator[JetStreamLog]:
    """A writer beside the agents, as one that believes it holds the task."""
    async with await Client.connect(shared.url) as client:
        yield JetStreamLog(client, Subjects(), "")


def finish(task: int, number: int, version: int = 1) -> list[Event]:
    """The commit with which an attempt ends a task."""
    claim = TaskClaimed(attempt=1, agent="somebody", assignment="")
    done = TaskCompleted(output=Raw(b'{"n":%d,"pid":0}' % number))
    return [
        Event(
            aggregate=f"task.nap.{task}", version=version + offset, time=rfc3339(0), source="/somebody",
            correlation=str(task), causation=str(task), data=data,
        )
        for offset, data in enumerate((claim, done))
    ]  # fmt: skip


async def test_a_conflicting_append_while_a_task_runs_wins_and_the_agent_ends_without_a_trace(
    plain: Plain, log: JetStreamLog
) -> None:
    task = await plain.submit("nap", {"n": 1, "seconds": 0.5})
    assert isinstance(await log.append(f"task.nap.{task}", finish(task, 99), Head()), Appended)
    assert (await plain.result("nap", task)).json["n"] == 99
    await plain.ask("nap", {"n": 2, "seconds": 0.7})  # longer than the first would have taken
    story = await plain.story()
    assert story.types(f"task.nap.{task}") == ["TaskClaimed", "TaskCompleted"]
    assert story.outputs("nap")[task]["n"] == 99


async def test_a_late_commit_is_refused(plain: Plain, log: JetStreamLog) -> None:
    task = await plain.submit("nap", {"n": 3})
    await plain.result("nap", task)
    assert isinstance(await log.append(f"task.nap.{task}", finish(task, 99), Head()), Conflict)
    assert (await plain.result("nap", task)).json["n"] == 3


async def test_an_append_after_a_stale_read_is_refused(plain: Plain, log: JetStreamLog) -> None:
    task = await plain.submit("nap", {"n": 4})
    await plain.result("nap", task)
    stale = Head(version=1, position=task)
    assert isinstance(await log.append(f"task.nap.{task}", finish(task, 99, version=2), stale), Conflict)
    (await plain.story()).check_once("nap", [task])


async def test_an_ended_task_that_is_delivered_again_is_acknowledged_and_not_run(
    plain: Plain, log: JetStreamLog
) -> None:
    """The attempt's ack is lost: here its commit comes from somebody who never acknowledges."""
    task = await plain.submit("nap", {"n": 5, "seconds": 0.3})
    await log.append(f"task.nap.{task}", finish(task, 98), Head())
    js = plain.nc.jetstream()
    for _ in range(200):
        info = await js.consumer_info("DSPEX", "task-nap")
        if info.num_ack_pending == 0 and info.num_pending == 0:
            break
        await asyncio.sleep(0.05)
    assert info.num_ack_pending == 0
    assert (await plain.story()).types(f"task.nap.{task}") == ["TaskClaimed", "TaskCompleted"]


async def test_all_tasks_delivered_anew_change_nothing(shared: Running, plain: Plain) -> None:
    """A consumer that forgot everything: made again, it delivers every task from the first on."""
    tasks = [await plain.submit("nap", {"n": n}) for n in range(100)]
    before = await plain.until_ended("nap")
    js = plain.nc.jetstream()
    config = (await js.consumer_info("DSPEX", "task-nap")).config
    await js.delete_consumer("DSPEX", "task-nap")
    await js.add_consumer("DSPEX", config)
    marker = await plain.submit("nap", {"n": 7})
    await plain.until_ended("nap", [marker])
    after = await plain.until_ended("nap")
    after.check_once("nap", [*tasks, marker])
    assert {t: types for t, types in after.endings("nap").items() if t != marker} == before.endings("nap")


async def test_a_consumer_that_is_gone_comes_back(plain: Plain) -> None:
    await plain.nc.jetstream().delete_consumer("DSPEX", "task-nap")
    task = await plain.submit("nap", {"n": 8})
    assert (await plain.final("nap", task)).json["n"] == 8
