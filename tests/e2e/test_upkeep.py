"""How agents are looked after, as `dspex.toml` says it: seen from outside, through `dspex up`, with real deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.plain import Plain, Story
from tests.e2e.running import gone, until

import dspex
from dspex.compose.caller import Caller

TENDED = Path(__file__).with_name("tended.py")
SRC = str(Path(str(dspex.__file__)).parent.parent)


class Up:
    """`dspex up` on a `dspex.toml`, in a folder of its own."""

    def __init__(self, folder: Path, toml: str) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        (folder / "dspex.toml").write_text('durability = "process"\n' + toml.replace("APP", str(TENDED)))
        self.words = folder / "words"
        with self.words.open("wb") as words:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "dspex", "up", "--json"], cwd=folder, stdout=subprocess.PIPE, stderr=words,
                text=True, env={**os.environ, "PYTHONPATH": SRC},
            )  # fmt: skip

    def ready(self) -> Up:
        assert self.process.stdout
        self.url = json.loads(self.process.stdout.readline())["nats"]
        return self

    def end(self) -> int:
        self.process.terminate()
        code = self.process.wait(60)
        assert self.process.stdout
        self.process.stdout.close()
        return code

    async def ps(self) -> list[dict[str, Any]]:
        caller = await Caller.connect(self.url)
        try:
            return await caller.processes()
        finally:
            await caller.close()

    async def agents(self, program: str) -> list[dict[str, Any]]:
        return [process for process in await self.ps() if process["program"] == program]

    async def agent_that(self, program: str, true: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
        """The first agent of a program that is so, waited for."""
        for _ in range(300):
            for agent in await self.agents(program):
                if true(agent):
                    return agent
        raise AssertionError(f"no such agent: {await self.ps()}\n{self.words.read_text()}")


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Callable[[str], Up]]:
    made: list[Up] = []

    def make(toml: str) -> Up:
        made.append(Up(tmp_path / "folder", toml))
        return made[-1]

    yield make
    for one in made:
        one.end()


def reasons(story: Story, kind: str = "AgentCrashed") -> list[str]:
    return [event["data"]["reason"] for event in story.all_of(kind)]


async def test_who_cannot_start_is_given_up_and_the_others_serve(up: Callable[[str], Up], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "broken").touch()
    system = up(
        '[programs.fragile]\napp = "APP:Fragile"\ngive_up = 3\n[programs.steady]\napp = "APP:Steady"\n'
    )
    system.ready()
    agent = await system.agent_that("fragile", lambda it: it["state"] == "gave up")
    assert agent["why"].startswith("3 times in a row") and agent["why"].endswith("exit 3") and agent["restarts"] == 3
    async with await Plain.connect(system.url) as plain:
        assert (await plain.ask("steady", {"n": 5})).json["n"] == 5
        story = await plain.until(lambda story: story.all_of("AgentGaveUp"))
    (event,) = story.all_of("AgentGaveUp")
    assert event["data"] == {"reason": agent["why"], "restarts": 3} and event["aggregate"].startswith("agent.fragile.")
    assert f"gave up {agent['agent']}, because 3 times in a row" in system.words.read_text()
    assert system.end() == 0


def test_when_nothing_is_left_that_serves_up_ends(up: Callable[[str], Up], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "broken").touch()
    system = up('[programs.fragile]\napp = "APP:Fragile"\nagents = 2\ngive_up = 2\n')
    assert system.process.wait(120) == 1
    words = system.words.read_text()
    assert words.count("gave up fragile-") == 2 and "nothing is left that serves" in words


async def test_those_that_live_and_die_together(up: Callable[[str], Up]) -> None:
    system = up(
        '[programs.left]\napp = "APP:Left"\n[programs.right]\napp = "APP:Right"\n[programs.steady]\napp = "APP:Steady"\n'
        '[supervisors.pair]\nstrategy = "one_for_all"\nchildren = ["left", "right"]\nintensity = "5/5s"\n'
    ).ready()
    before = {it["agent"]: it["pid"] for it in await system.ps() if it["program"]}
    left, right, steady = (next(name for name in before if name.startswith(it)) for it in ("left", "right", "steady"))
    os.kill(before[right], signal.SIGKILL)
    after = await system.agent_that("left", lambda it: it["pid"] != before[left] and it["state"] == "serving")
    assert after["restarts"] == 1
    await system.agent_that("right", lambda it: it["restarts"] == 1 and it["state"] == "serving")
    async with await Plain.connect(system.url) as plain:
        story = await plain.until(lambda story: story.all_of("AgentCrashed"))
        assert [event["data"]["pid"] for event in story.all_of("AgentCrashed")] == [before[right]], "the other was stopped"
    assert [it["pid"] for it in await system.agents("steady")] == [before[steady]]


GREEDY = '[programs.greedy]\napp = "APP:Greedy"\n'


@pytest.fixture(scope="module")
def tended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    system = Up(
        tmp_path_factory.mktemp("tended"),
        f'{GREEDY}memory = "400MiB"\nblocked_after = 3\n'
        '[programs.steady]\napp = "APP:Steady"\nagents = 2\nrecycle_after = "10 tasks"\n'
        '[programs.left]\napp = "APP:Left"\nrestart = "transient"\n',
    ).ready()
    yield system
    system.end()


@pytest.fixture
async def plain(tended: Up) -> AsyncIterator[Plain]:
    async with await Plain.connect(tended.url) as client:
        yield client


async def test_one_huge_allocation_fails_the_task_and_not_the_agent(tended: Up, plain: Plain) -> None:
    first = await plain.ask("greedy", {"n": 1}, timeout=60)
    failed = await plain.ask("greedy", {"do": "allocate", "n": 4000}, timeout=60)
    assert failed.code == 500 and failed.error["type"] == "MemoryError"
    assert (await plain.ask("greedy", {"n": 2}, timeout=60)).json["pid"] == first.json["pid"]


async def test_a_blocked_loop_is_named_and_then_its_process_is_replaced(tended: Up, plain: Plain) -> None:
    await plain.submit("greedy", {"do": "block"})
    line = next(number for number, text in enumerate(TENDED.read_text().splitlines(), 1) if "THE BLOCKING LINE" in text)
    blocked = await tended.agent_that("greedy", lambda it: it["state"] == "blocked")
    assert f"tended.py:{line} (predict)" in blocked["why"]
    story = await plain.until(lambda story: reasons(story))
    assert "stood still for" in reasons(story)[0] and f"tended.py:{line} (predict)" in reasons(story)[0]
    assert f"in {TENDED}:{line} (predict) < " in tended.words.read_text(), "the warning has the stack"


async def test_more_memory_than_allowed_is_the_reason_of_the_death(tended: Up, plain: Plain) -> None:
    await plain.submit("greedy", {"do": "grow"})
    story = await plain.until(lambda story: [it for it in reasons(story) if "used more than" in it])
    (reason, *_) = (it for it in reasons(story) if "used more than" in it)
    assert reason.startswith("used more than 400MiB (it held ")


async def test_agents_are_replaced_after_so_many_tasks_and_none_is_lost(tended: Up, plain: Plain) -> None:
    tasks = [await plain.submit("steady", {"n": n}) for n in range(100)]
    story = await plain.until_ended("steady", tasks)
    assert all(story.endings("steady")[task] == ["TaskCompleted"] for task in tasks)
    pids = {(await plain.final("steady", task)).json["pid"] for task in tasks}
    assert len(pids) > 2
    story = await plain.until(lambda story: any("has served" in it for it in reasons(story, "AgentStopped")))
    assert not any(event["aggregate"].startswith("agent.steady") for event in story.all_of("AgentCrashed"))


async def test_a_transient_agent_that_ends_in_order_stays_ended(tended: Up, plain: Plain) -> None:
    (agent,) = await tended.agents("left")
    os.kill(agent["pid"], signal.SIGTERM)
    await tended.agent_that("left", lambda it: it["state"] == "stopped")
    assert (await plain.ask("steady", {"n": 1})).json["n"] == 1, "the rest goes on"


async def test_a_stopped_agent_is_not_there_twice_when_its_supervisor_is_killed(up: Callable[[str], Up]) -> None:
    """It cannot notice that its supervisor is gone; the new one waits for it, then ends it."""
    system = up('[programs.steady]\napp = "APP:Steady"\n').ready()
    (before,) = await system.agents("steady")
    supervisor = next(it for it in await system.ps() if it.get("role") == "supervisor")
    os.kill(before["pid"], signal.SIGSTOP)
    os.kill(supervisor["pid"], signal.SIGKILL)
    async with await Plain.connect(system.url) as plain:
        story = await plain.until(
            lambda story: [
                event for event in story.all_of("AgentStarted")
                if event["aggregate"].endswith(before["agent"]) and event["data"]["pid"] != before["pid"]
            ]
        )  # fmt: skip
        assert story and gone(before["pid"]), "two of one identity"
        assert (await plain.ask("steady", {"n": 3}, timeout=60)).json["n"] == 3
    until(lambda: "Traceback" not in system.words.read_text())
