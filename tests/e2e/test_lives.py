"""Being told to stop, dying, being started again: what a client notices and what the log says of it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from tests.e2e.running import Running, gone, until


async def test_what_runs_when_the_system_is_told_to_stop_is_finished(systems: Callable[..., Running]) -> None:
    first = systems(("Nap", 2)).start()
    async with await first.plain() as plain:
        tasks = [await plain.submit("nap", {"n": n, "seconds": 1.0}) for n in range(40)]
        await plain.ask("nap", {"n": 0})  # so that they are being worked on
        below = first.descendants()
    assert first.stop() == 0
    assert all(gone(pid) for pid in below)
    with systems(("Nap", 1)) as second:
        async with await second.plain() as plain:
            story = await plain.until_ended("nap")
            story.check_once("nap", tasks)
            assert {claim["data"]["attempt"] for claim in story.all_of("TaskClaimed")} == {1}, "one was cut off"
            assert Counter(e["data"]["reason"] for e in story.all_of("AgentStopped")) == {"told to stop": 2}
            assert not story.all_of("AgentCrashed")


async def test_what_waits_when_the_system_is_told_to_stop_is_kept(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 1)) as system:
        async with await system.plain() as plain:
            tasks = [await plain.submit("nap", {"n": n, "seconds": 0.2}) for n in range(500)]
    with systems(("Nap", 2)) as system:
        async with await system.plain() as plain:
            (await plain.until_ended("nap")).check_once("nap", tasks)


async def test_a_task_that_outlasts_the_drain_is_handed_on(systems: Callable[..., Running]) -> None:
    first = systems(("Nap", 1)).start()
    async with await first.plain() as plain:
        task = await plain.submit("nap", {"n": 1, "seconds": 15})
        await plain.ask("nap", {"n": 0})
    assert first.stop() == 0
    second = systems(("Nap", 1)).start()
    async with await second.plain() as plain:
        story = await plain.until(lambda story: any(e["data"]["attempt"] == 2 for e in story.all_of("TaskClaimed")))
        assert task not in story.endings("nap")
        assert len(story.all_of("AgentStopped")) == 1
    second.kill()


async def test_an_agent_told_to_stop_is_replaced_and_loses_nothing(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 2)) as system:
        async with await system.plain() as plain:
            agents = await system.agents(plain, "nap")
            asked = [asyncio.create_task(plain.ask("nap", {"n": n, "seconds": 0.5})) for n in range(30)]
            await asyncio.sleep(0.1)
            for pid in agents.values():
                os.kill(pid, signal.SIGTERM)
            replies = await asyncio.gather(*asked)
            assert [reply.json["n"] for reply in replies] == list(range(30))
            until(lambda: all(gone(pid) for pid in agents.values()))
            now = await system.agents(plain, "nap")
            assert not set(now.values()) & set(agents.values())


async def test_an_ask_whose_agent_is_killed_is_answered_by_another(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 2)) as system:
        async with await system.plain() as plain:
            agents = await system.agents(plain, "nap")
            asked = [asyncio.create_task(plain.ask("nap", {"n": n, "seconds": 0.5})) for n in range(30)]
            await plain.until(lambda story: len(story.submitted("nap")) == 30)
            victim = next(iter(agents.values()))
            os.kill(victim, signal.SIGKILL)
            replies = await asyncio.gather(*asked)
            assert [reply.json["n"] for reply in replies] == list(range(30))
            assert victim not in {reply.json["pid"] for reply in replies}


async def test_a_result_that_waits_is_answered_when_its_agent_stops(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 2)) as system:
        async with await system.plain() as plain:
            agents = await system.agents(plain, "nap")
            task = await plain.submit("nap", {"n": 1, "seconds": 4})
            waiting = [asyncio.create_task(plain.result("nap", task)) for _ in range(10)]
            await asyncio.sleep(0.2)
            os.kill(next(iter(agents.values())), signal.SIGTERM)
            codes = [(await waiter).code for waiter in waiting]
            assert set(codes) <= {None, 202}, codes


WHO = ["agent", "registrar", "supervisor", "server"]


@pytest.mark.parametrize("who", WHO)
async def test_a_death_is_written_down_once(systems: Callable[..., Running], who: str) -> None:
    with systems(("Nap", 1)) as system:
        async with await system.plain() as plain:
            pids = {"agent": system.below_supervisor()[-1], "registrar": system.registrar(),
                    "supervisor": system.supervisor(), "server": system.server()}  # fmt: skip
            os.kill(pids[who], signal.SIGKILL)
            def deaths(story: Any) -> list[Any]:
                return [event for event in story.all_of("AgentCrashed") if event["data"]["pid"] == pids[who]]

            (crashed,) = deaths(await plain.until(deaths))
            assert crashed["data"] == {"pid": pids[who], "reason": "SIGKILL"}
            kind = "nap" if who == "agent" else who
            assert crashed["aggregate"].startswith(f"agent.{kind}.")
            task = await plain.submit("nap", {"n": 1})
            assert (await plain.final("nap", task)).json["n"] == 1
            os.kill(system.registrar(), signal.SIGKILL)  # the next one must not say it again
            story = await plain.until(lambda story: len(story.all_of("AgentCrashed")) > 1)
            assert [event["data"]["pid"] for event in story.all_of("AgentCrashed")].count(pids[who]) == 1


async def test_every_death_of_many_is_written_down_once(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 4)) as system:
        async with await system.plain() as plain:
            killed = []
            for _ in range(3):
                agents = await system.agents(plain, "nap")
                for pid in agents.values():
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                until(lambda agents=agents: all(gone(pid) for pid in agents.values()))
            story = await plain.until(lambda story: len(story.all_of("AgentCrashed")) >= len(killed))
            assert Counter(e["data"]["pid"] for e in story.all_of("AgentCrashed")) == Counter(killed)
            story.check_versions()


async def test_an_agent_that_is_killed_again_and_again_always_comes_back(systems: Callable[..., Running]) -> None:
    """Its restarts are counted, the others go on, and nothing is given up: it was not its own fault."""
    with systems(("Nap", 1), ("Work", 1)) as system:
        async with await system.plain() as plain:
            for _ in range(5):
                seen = len(system.events)
                (pid,) = (await system.agents(plain, "nap")).values()
                os.kill(pid, signal.SIGKILL)
                system.event("crashed", after=seen)
            told: list[tuple[int, str]] = []
            while (5, "nap") not in told:  # the registrar hears of it a moment later; pytest's timeout ends this
                (registrar,) = await plain.discover("STATS.dspex-registrar", enough=1)
                agents = [p for p in registrar["data"]["processes"] if p["program"] == "nap"]
                told = [(agent["restarts"], agent["supervisor"]) for agent in agents]
            assert not any(event["event"] == "gave-up" for event in system.events)
            assert (await plain.ask("work", {"text": "on"})).json["text"] == "on"
