"""Circuit breakers between real processes: shared windows, shared states, a quota that holds and comes back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.breaking import QUOTA
from tests.e2e.guarded import connect, identities, refusals
from tests.e2e.plain import Plain
from tests.e2e.running import Running

from dspex.core.access import Role

BREAKING = Path(__file__).parent / "breaking.py"
LOGS = ["jetstream", "sqlite"]


class Bank:
    """A folder that says what the effects do, and in which they write down what they did."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.be("up")

    def be(self, mode: str) -> None:
        fresh = self.folder / "mode.new"
        fresh.write_text(mode)
        fresh.replace(self.folder / "mode")

    def called(self, what: str = "pay") -> list[list[str]]:
        """Task and pid of each call."""
        book = self.folder / "book"
        lines = book.read_text().splitlines() if book.exists() else []
        return [line.split()[1:] for line in lines if line.split()[0] == what]

    def input(self, task: object = "", **more: object) -> dict[str, object]:
        return {"folder": str(self.folder), "task": str(task), **more}

    async def until_called(self, times: int, what: str = "pay") -> None:
        async with asyncio.timeout(60):
            while len(self.called(what)) < times:
                await asyncio.sleep(0.02)


@pytest.fixture
def bank(tmp_path: Path) -> Bank:
    return Bank(tmp_path)


def launch(systems: Callable[..., Running], agents: int, program: str = "Pay", **options: Any) -> Running:
    return systems((f"{BREAKING}:{program}", agents), **options).start()


async def said(plain: Plain, bank: Bank, task: object = "", program: str = "pay", **more: object) -> dict[str, Any]:
    return dict((await plain.ask(program, bank.input(task, **more), timeout=60)).json)


async def fail_together(plain: Plain, bank: Bank, tasks: int) -> list[dict[str, Any]]:
    """Have so many calls under way at once, and then let all of them fail."""
    bank.be("hang")
    before = len(bank.called())
    asked = [asyncio.create_task(said(plain, bank, f"f{number}")) for number in range(tasks)]
    await bank.until_called(before + tasks)
    bank.be("down")
    return list(await asyncio.gather(*asked))


async def changes(plain: Plain, effect: str = "pay", program: str = "pay") -> list[str]:
    return (await plain.story()).types(f"breaker.{program}.{effect}")


async def several(plain: Plain, bank: Bank, tasks: int, **more: object) -> list[dict[str, Any]]:
    """The outputs of some tasks at once, also when agents have just been killed."""
    stored = [await plain.submit("pay", bank.input("u", **more)) for _ in range(tasks)]
    return [dict(reply.json) for reply in await asyncio.gather(*(plain.final("pay", task) for task in stored))]


async def until_said(plain: Plain, bank: Bank, start: str, agents: int = 1, **more: object) -> None:
    """Submit until so many agents have answered like this, and none otherwise any more."""
    heard: dict[int, str] = {}
    async with asyncio.timeout(60):
        while len(heard) < agents:
            for answer in await several(plain, bank, 3 * agents, **more):
                if answer["said"].startswith(start):
                    heard[answer["pid"]] = answer["said"]
                else:
                    heard.pop(answer["pid"], None)


def dspex(*words: str) -> dict[str, Any]:
    """What a command prints."""
    command = [sys.executable, "-m", "dspex", *words, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(done.stdout or "{}"))


async def until_listed(state: str, *at: str) -> None:
    async with asyncio.timeout(60):
        while (await asyncio.to_thread(dspex, "breakers", "ls", "pay", *at)).get("state") != state:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("log", LOGS)
async def test_three_failures_in_each_of_four_agents_open_it_in_all(
    systems: Callable[..., Running], bank: Bank, log: str
) -> None:
    system = launch(systems, 4, log=log)
    async with await system.plain() as plain:
        answers = await fail_together(plain, bank, 12)
        assert [a["said"] for a in answers] == ["down: the bank is down"] * 12
        assert {tuple(sorted(pid for _, pid in bank.called()).count(str(a["pid"])) for a in answers)} == {(3,) * 12}
        await plain.until(lambda story: story.types("breaker.pay.pay"))
        heard = await until_open_everywhere(plain, bank, 4)
        assert all("and is tried again in" in words or "only trial calls" in words for words in heard)
        opened = (await plain.story()).events("breaker.pay.pay")[0]
        assert opened["type"] == "BreakerOpened" and opened["data"]["reason"] == "failures"
        assert opened["data"]["failures"] == opened["data"]["calls"] >= 10


async def until_open_everywhere(plain: Plain, bank: Bank, agents: int) -> set[str]:
    """Keep it open (what is tried fails) until every agent has refused a call."""
    heard: dict[int, str] = {}
    async with asyncio.timeout(60):
        while len(heard) < agents:
            for answer in await several(plain, bank, 3 * agents):
                if answer["said"].startswith("open: pay is not called: its breaker opened at "):
                    heard[answer["pid"]] = answer["said"]
            await asyncio.sleep(0.05)
    return set(heard.values())


async def test_it_closes_after_trial_calls_that_never_exceed_the_quota(
    systems: Callable[..., Running], bank: Bank
) -> None:
    system = launch(systems, 4)
    async with await system.plain() as plain:
        await fail_together(plain, bank, 12)
        await until_open_everywhere(plain, bank, 4)  # who has not heard of it would still call
        bank.be("hang")
        before = len(bank.called())
        asked = []
        async with asyncio.timeout(60):
            while len(bank.called()) < before + QUOTA:  # all agents try at once, again and again
                asked.append(asyncio.create_task(said(plain, bank, "t")))
                await asyncio.sleep(0.02)
        asked += [asyncio.create_task(said(plain, bank, "t")) for _ in range(20)]
        _, trying = await asyncio.wait(asked, timeout=1.0)
        while len(trying) > QUOTA:
            _, trying = await asyncio.wait(trying, return_when=asyncio.FIRST_COMPLETED)
        assert len(bank.called()) == before + QUOTA, "more than the quota were let through"
        bank.be("up")
        assert {(await task)["said"] for task in trying} == {"paid"}
        await until_said(plain, bank, "paid", 4)
        found = await changes(plain)
        assert found[0] == "BreakerOpened" and found[-1] == "BreakerClosed"
        assert set(found[1:-1]) == {"BreakerHalfOpened"}


async def test_permits_of_killed_agents_come_back(systems: Callable[..., Running], bank: Bank) -> None:
    system = launch(systems, 2)
    async with await system.plain() as plain:
        bank.be("down")
        while not await changes(plain, "brief"):
            await several(plain, bank, 6, do="brief")
        bank.be("hang")
        before = len(bank.called())
        async with asyncio.timeout(60):
            while len(bank.called()) < before + QUOTA:
                await plain.submit("pay", bank.input("held", do="brief"))
                await asyncio.sleep(0.1)
        for pid in system.agent_pids():
            os.kill(pid, signal.SIGKILL)
        bank.be("up")
        await until_said(plain, bank, "paid", 2, do="brief")
        assert (await changes(plain, "brief"))[-1] == "BreakerClosed"
        (await plain.until_ended("pay")).check_once("pay", [])


async def test_a_refusal_is_recorded_and_a_replay_gives_the_same(
    systems: Callable[..., Running], bank: Bank
) -> None:
    system = launch(systems, 1)
    async with await system.plain() as plain:
        for _ in range(4):
            await fail_together(plain, bank, 3)
        bank.be("hang")  # so that no trial call can close it meanwhile
        async with asyncio.timeout(60):
            while True:
                task = await plain.submit("pay", bank.input("r", do="anywhere"))
                reply = await plain.result("pay", task, timeout=60)
                if reply.code is None and reply.json["said"].startswith("open: "):
                    break
        [record] = [e for e in (await plain.story()).events(f"task.pay.{task}") if e["type"] == "EffectRecorded"]
        assert record["data"]["error"] == "dspex.core.errors:BreakerOpen"
        bank.be("up")
        found = await asyncio.to_thread(dspex, "replay", str(task), "--nats", system.url)
        assert (found["same"], found["effects"], found["performed"]) == (True, 1, 0)


async def test_a_retry_waits_until_the_breaker_is_due(systems: Callable[..., Running], bank: Bank) -> None:
    system = launch(systems, 1, "Insistent")
    async with await system.plain() as plain:
        bank.be("down")
        task = await plain.submit("insistent", bank.input("i"))
        story = await plain.until(lambda story: story.types("breaker.insistent.pay"))
        due = story.events("breaker.insistent.pay")[0]["data"]["due"]

        def refused(story: Any) -> list[dict[str, Any]]:
            events = story.events(f"task.insistent.{task}")
            return [e["data"] for e in events if e["type"] == "TaskRetried" and e["data"]["type"] == "BreakerOpen"]

        story = await plain.until(refused, patience=60)
        assert refused(story)[0]["until"] >= due
        bank.be("up")
        assert (await plain.final("insistent", task)).json["said"] == "paid"
        calls = len(bank.called())
        assert calls <= 10 + QUOTA * (len(story.types("breaker.insistent.pay")) + 4), "it was called while it was open"


async def test_a_task_that_ends_with_the_refusal_says_so_and_calls_of_it_do_not_wait(
    systems: Callable[..., Running], bank: Bank
) -> None:
    system = systems((f"{BREAKING}:Hasty", 1), (f"{BREAKING}:Caller", 1)).start()
    async with await system.plain() as plain:
        bank.be("down")
        async with asyncio.timeout(60):
            while (reply := await plain.ask("hasty", bank.input("h"))).code != 503:
                pass
        assert reply.json["error"]["type"] == "BreakerOpen" and reply.json["error"]["task"]
        assert "pay is not called: its breaker opened at" in reply.json["error"]["message"]
        words = [(await said(plain, bank, "c", program="caller"))["said"] for _ in range(3)]
        assert words[2].startswith("open: call.hasty is not called"), words
        assert all(each.startswith("open: pay is not called") for each in words[:2]), words
        assert await changes(plain, "call-hasty", "caller") == ["BreakerOpened"]


async def test_a_call_that_takes_too_long_is_ended_and_too_many_left_behind_replace_the_agent(
    systems: Callable[..., Running], bank: Bank
) -> None:
    system = launch(systems, 1)
    async with await system.plain() as plain:
        first = await said(plain, bank, "a", do="patient")
        assert first["said"] == "late: patient took longer than 0.2 s"
        assert bank.called("cancelled") == [["a", str(first["pid"])]]
        for number in range(16):
            answer = await said(plain, bank, number, do="plain")
            assert answer["said"] == "late: plain took longer than 0.2 s"
        async with asyncio.timeout(60):
            while True:
                task = await plain.submit("pay", bank.input("z", do="patient", seconds=0.0))
                if (await plain.final("pay", task)).json["pid"] != first["pid"]:
                    break
        assert not (await plain.story()).all_of("AgentCrashed"), "being replaced is no crash"


async def test_by_hand_and_under_access_rules(systems: Callable[..., Running], bank: Bank) -> None:
    system = systems((f"{BREAKING}:Pay", 2), secure=True)
    secured = identities(system.data, "alice")
    system.start()

    at = ["--data", str(system.data)]
    async with await connect(system.url, secured.context(Role.CLIENT, "alice")) as plain:
        await fail_together(plain, bank, 6)
        await fail_together(plain, bank, 6)
        await until_listed("open", *at)
        bank.be("hang")
        before = len(bank.called())
        async with asyncio.timeout(60):  # two trial calls hang, so everybody else is refused
            while len(bank.called()) < before + QUOTA:
                await plain.submit("pay", bank.input("t"))
                await asyncio.sleep(0.05)
        await until_listed("half_open", *at)
        closed = await asyncio.to_thread(dspex, "breakers", "reset", "pay", "pay", *at)
        assert (closed["before"], closed["state"]) == ("half_open", "closed")
        bank.be("up")
        await until_said(plain, bank, "paid", 2)
        again = await asyncio.to_thread(dspex, "breakers", "reset", "pay", "pay", *at)
        assert again["before"] == "closed"
    assert refusals(system.data / "server" / "nats.log") == []


async def test_one_that_is_open_stays_so_when_everything_is_killed(systems: Callable[..., Running], bank: Bank) -> None:
    system = launch(systems, 1, "Hasty")
    async with await system.plain() as plain:
        bank.be("down")
        async with asyncio.timeout(60):
            while (await plain.ask("hasty", bank.input("h"))).code != 503:
                pass
        calls, [pid] = len(bank.called()), system.agent_pids()
        os.kill(pid, signal.SIGKILL)
        await plain.until(lambda story: story.all_of("AgentCrashed"))
        task = await plain.submit("hasty", bank.input("after"))
        story = await plain.until_ended("hasty", [task])
        assert story.endings("hasty")[task] == ["TaskFailed"]
        # Whoever came after it knew: it was refused, or was one of the trial calls.
        trials = sum(e["type"] == "BreakerHalfOpened" for e in story.events("breaker.hasty.pay"))
        assert len(bank.called()) - calls <= trials
