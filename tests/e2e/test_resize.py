"""More agents and fewer, by hand and by load; agents that are drained, replaced and ended; one `up` after another."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.running import Running, called, gone
from tests.e2e.versions import Crowd, soon, write

from dspex.bus.server import Server

System = Callable[..., Running]
pytestmark = pytest.mark.timeout(600)


def agents(system: Running) -> set[int]:
    """The processes that serve the program."""
    return {pid for pid in system.below_supervisor() if called(pid).startswith("echo-")}


async def test_more_and_fewer_agents_under_load(systems: System, tmp_path: Path) -> None:
    file = write(tmp_path / "app.py", 0)
    with systems((str(file), 1)) as system:
        async with await system.plain() as plain, await system.plain() as teller:
            supervisor = (await teller.fleet("echo"))["supervisor"]
            async with Crowd(plain) as crowd:
                was = 1
                for count in (4, 2, 3, 1):
                    await crowd.more(10)
                    answer = await teller.control(supervisor, "scale", program="echo", agents=count, why="a test")
                    assert (answer["agents"], answer["was"]) == (count, was)
                    await teller.until_fleet("echo", agents=count, serving=count)
                    await soon(lambda n=count: len(agents(system)) == n)  # type: ignore[misc]
                    was = count
                await crowd.more(10)
            assert not crowd.refused
            story = await plain.until_ended("echo", crowd.tasks)
            story.check_once("echo", crowd.tasks)
            said = [event["data"] for event in story.all_of("ProgramScaled")]
            assert [(it["agents"], it["by"], it["why"]) for it in said] == [
                (count, "tester", "a test") for count in (4, 2, 3, 1)
            ]


async def test_what_nobody_can_do_is_refused(systems: System, tmp_path: Path) -> None:
    file = write(tmp_path / "app.py", 0)
    with systems((str(file), 1)) as system:
        async with await system.plain() as plain:
            supervisor = (await plain.fleet("echo"))["supervisor"]

            async def refused(agent: str, verb: str, **body: object) -> str:
                return str((await plain.control(agent, verb, **body))["error"]["message"])

            assert "serves no program 'nobody'" in await refused(supervisor, "scale", program="nobody", agents=2)
            assert "no number of agents" in await refused(supervisor, "scale", program="echo", agents="many")
            assert "more than 1,000" in await refused(supervisor, "scale", program="echo", agents=1001)
            assert "does not know dance" in await refused(supervisor, "dance")
            assert "does not know dance" in await refused(supervisor.replace("supervisor", "echo") + "-1", "dance")
            assert "4,096 are enough" in await refused(supervisor, "scale", program="x" * 5000)
            broken = await plain.nc.request(f"dspex.control.{supervisor}.scale", b"[1", timeout=15)
            assert b"no JSON object" in broken.data
            assert len(agents(system)) == 1


async def test_a_number_set_by_hand_outlives_the_supervisor(systems: System, tmp_path: Path) -> None:
    file = write(tmp_path / "app.py", 0)
    with systems((str(file), 1)) as system:
        async with await system.plain() as plain:
            supervisor = (await plain.fleet("echo"))["supervisor"]
            await plain.control(supervisor, "scale", program="echo", agents=3)
            for _ in range(2):
                os.kill(system.supervisor(), signal.SIGKILL)
                await soon(lambda: len(agents(system)) == 3, what="not as many as before")
            await plain.until_fleet("echo", agents=3, serving=3, by="tester")
            story = await plain.until(lambda it: len(it.all_of("ProgramScaled")) > 0)
            assert len(story.all_of("ProgramScaled")) == 1, "it is said once, whoever says it again"
        system.stop()
        system.start()
        async with await system.plain() as plain:
            await plain.until_fleet("echo", agents=1, serving=1)


async def test_the_load_makes_more_agents_and_quiet_makes_fewer(systems: System, tmp_path: Path) -> None:
    file, release = write(tmp_path / "app.py", 0), tmp_path / "release"
    with systems((str(file), "1..3"), scale={"wait": 0.2, "quiet": 3.0}) as system:
        async with await system.plain() as plain:
            tasks = [await plain.submit("echo", {"n": n, "until": str(release)}) for n in range(40)]
            await plain.until_fleet("echo", agents=3, serving=3, by="load")
            await soon(lambda: len(agents(system)) == 3)
            release.touch()
            await plain.until_fleet("echo", agents=1, serving=1, by="load")
            story = await plain.until_ended("echo", tasks)
            story.check_once("echo", tasks)
            said = [event["data"] for event in story.all_of("ProgramScaled")]
            assert [it["agents"] for it in said][:2] == [2, 3] and said[-1]["agents"] == 1
            assert "tasks wait, the oldest for" in said[0]["why"] and "would have done for 3 s" in said[-1]["why"]
            assert all((it["least"], it["most"]) == (1, 3) for it in said)


async def test_agents_are_drained_replaced_and_ended_by_name(systems: System, tmp_path: Path) -> None:
    file = write(tmp_path / "app.py", 0)
    with systems((str(file), 2)) as system:
        async with await system.plain() as plain, await system.plain() as teller:
            supervisor = (await teller.fleet("echo"))["supervisor"]
            first = supervisor.replace("supervisor", "echo") + "-1"
            async with Crowd(plain) as crowd:
                await crowd.more(10)
                before = agents(system)
                assert (await teller.control(first, "restart"))["agents"] == 2
                await soon(lambda: len(agents(system) - before) == 1 and len(agents(system)) == 2)
                async with asyncio.timeout(60):
                    names = [first]
                    while len(names) != 2 or first in names:
                        for voice in await teller.discover("STATS.dspex-registrar", enough=1):
                            names = [it["agent"] for it in voice["data"]["processes"] if it["program"]]
                assert (await teller.control(names[0], "drain"))["agents"] == 1
                await teller.until_fleet("echo", agents=1, serving=1)
                await crowd.more(10)
            assert not crowd.refused
            assert (await teller.control(names[1], "stop"))["agents"] == 0
            await soon(lambda: not agents(system))
            waiting = await plain.submit("echo", {"n": 7})
            await teller.control(supervisor, "scale", program="echo", agents=1)
            assert (await plain.final("echo", waiting)).json["n"] == 7
            story = await plain.until_ended("echo", [*crowd.tasks, waiting])
            story.check_once("echo", crowd.tasks)
            await teller.control(supervisor, "stop")
            assert system.wait() == 0


async def test_a_new_up_takes_over_from_an_old_one(systems: System, tmp_path: Path, server: Server) -> None:
    """As two machines on one server do: the new one comes up beside the old one, which is drained and ends."""
    server.start()
    old, new = write(tmp_path / "old.py", 1), write(tmp_path / "new.py", 2)
    first = systems((str(old), 2), folder="old", nats=server.url).start()
    async with await first.plain() as plain, await first.plain() as teller:
        async with Crowd(plain) as crowd:
            await crowd.more(10)
            leaving = (await teller.fleet("echo"))["supervisor"]
            second = systems((str(new), 2), folder="new", nats=server.url)
            await asyncio.to_thread(second.start)
            await crowd.more(10)
            before = agents(first)
            await teller.control(leaving, "drain")
            await soon(lambda: all(gone(pid) for pid in before))
            await crowd.more(10)
            await teller.control(leaving, "stop")
            assert await asyncio.to_thread(first.wait) == 0
            seen = len(crowd.versions)
            await crowd.more(10)
        assert set(crowd.versions[seen + 2 :]) == {2} and not crowd.refused
        story = await plain.until_ended("echo", crowd.tasks)
        story.check_once("echo", crowd.tasks)
        assert {output["version"] for output in story.outputs("echo").values()} == {1, 2}
        assert len(agents(second)) == 2
