"""New code under load: nothing is lost, nobody is refused, and what cannot serve touches nobody."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.plain import Plain
from tests.e2e.running import Running, called, gone
from tests.e2e.versions import Crowd, soon, write

System = Callable[..., Running]
pytestmark = pytest.mark.timeout(600)


def agents(system: Running) -> set[int]:
    """The processes that serve the program."""
    return {pid for pid in system.below_supervisor() if called(pid).startswith("echo-")}


async def reload(plain: Plain, **body: object) -> dict[str, Any]:
    fleet = await plain.fleet("echo")
    return await plain.control(fleet["supervisor"], "reload", id=os.urandom(8).hex(), **body)


@pytest.mark.parametrize(("log", "reloads"), [("jetstream", 5), ("sqlite", 1)])
async def test_reloads_under_load_lose_nothing_and_refuse_nobody(
    systems: System, tmp_path: Path, log: str, reloads: int
) -> None:
    file = write(tmp_path / "app.py", 0)
    with systems((str(file), 2), log=log) as system:
        async with await system.plain() as plain, await system.plain() as teller:
            async with Crowd(plain) as crowd:
                for version in range(1, reloads + 1):
                    await crowd.more(10)
                    write(file, version)
                    answer = await reload(teller)
                    assert [it["program"] for it in answer.get("programs", ())] == ["echo"], answer
                    said = (await plain.ask("echo", {"n": 1})).json["version"]
                    assert said == version, "when it is done nobody begins with old code any more"
                await crowd.more(10)
            assert not crowd.refused
            story = await plain.until_ended("echo", crowd.tasks)
            story.check_once("echo", crowd.tasks)
            assert {output["version"] for output in story.outputs("echo").values()} == set(range(reloads + 1))
            codes = [event["data"] for event in story.all_of("ProgramReloaded")]
            assert len(codes) == reloads and all(it["was"] != it["code"] and it["by"] == "tester" for it in codes)
            assert [later["was"] for later in codes[1:]] == [sooner["code"] for sooner in codes[:-1]]
            await plain.until_fleet("echo", serving=2)
            await soon(lambda: len(agents(system)) == 2, what="an old agent stays")
            await soon(lambda: len([pid for pid in system.below_supervisor() if called(pid).startswith("loader")]) == 1)


async def test_a_supervisor_that_is_killed_in_the_middle_of_a_reload(systems: System, tmp_path: Path) -> None:
    file = write(tmp_path / "app.py", 0)
    with systems((str(file), 2)) as system:
        async with await system.plain() as plain, await system.plain() as teller:
            async with Crowd(plain) as crowd:
                await crowd.more(10)
                slow = "\n    def setup(self) -> None:\n        import time; time.sleep(1.0)\n"
                write(file, 1, slow)
                await teller.fleet("echo")
                asked = asyncio.create_task(reload(teller))
                await soon(lambda: len(agents(system)) == 3)
                os.kill(system.supervisor(), signal.SIGKILL)
                answer = await asked  # it was asked again, and the new supervisor rolled over to what it had already
                assert [it["program"] for it in answer.get("programs", ())] == ["echo"], answer
                await crowd.more(10)
            story = await plain.until_ended("echo")
            story.check_once("echo", crowd.tasks)
            assert (await plain.ask("echo", {"n": 1})).json["version"] == 1
            said = [event["data"] for event in story.all_of("ProgramReloaded")]
            assert said[0]["was"] != said[0]["code"], "that the new supervisor has loaded other code is in the log"


async def test_code_that_cannot_serve_is_refused_and_touches_nobody(systems: System, tmp_path: Path) -> None:
    file = write(tmp_path / "app.py", 0)
    with systems((str(file), 2)) as system:
        async with await system.plain() as plain:
            before = agents(system)
            file.write_text("class Echo(:\n")
            assert "app.py:1: SyntaxError" in (await reload(plain))["error"]["message"]
            write(file, 1, **{"n: int\n        seconds": "m: int\n        seconds"})
            assert "input field m is new" in (await reload(plain))["error"]["message"]
            write(file, 1, "\n    def setup(self) -> None:\n        raise OSError('no model')\n")
            refused = (await reload(plain))["error"]
            assert refused["type"] == "Conflict" and "setup raised OSError: no model" in refused["message"]
            write(file, 1, "\n    def setup(self) -> None:\n        os._exit(9)\n")
            assert "exit 9" in (await reload(plain))["error"]["message"]
            assert "serves no program" in (await reload(plain, program="nobody"))["error"]["message"]
            await soon(lambda: agents(system) == before, what="a new agent stays, or an old one is gone")
            assert (await plain.ask("echo", {"n": 1})).json["version"] == 0
            await soon(lambda: not any(called(pid).startswith("loader") for pid in system.below_supervisor()))
            story = await plain.story()
            assert not story.all_of("ProgramReloaded")
            write(file, 2, **{"n: int\n        seconds": "m: int = 0\n        n: int = 0\n        seconds"})
            assert (await reload(plain, replace=True))["programs"][0]["agents"] == 2
            assert (await plain.ask("echo", {"m": 1})).json["version"] == 2


async def test_what_runs_ends_on_the_code_it_began_with_and_the_only_agent_leaves_no_gap(
    systems: System, tmp_path: Path
) -> None:
    file, release = write(tmp_path / "app.py", 0), tmp_path / "release"
    with systems((str(file), 1)) as system:
        async with await system.plain() as plain:
            task = await plain.submit("echo", {"n": 1, "until": str(release)})
            (old,) = agents(system)
            reply = await plain.result("echo", task, wait="0.2")
            assert reply.code == 202
            write(file, 1)
            await reload(plain)
            assert (await plain.ask("echo", {"n": 2})).json["version"] == 1
            assert not gone(old), "it waits for its task"
            release.touch()
            output = (await plain.final("echo", task)).json
            assert (output["version"], output["pid"]) == (0, old)
            await soon(lambda: gone(old), what="it does not end when its task has")
            (await plain.until_ended("echo")).check_once("echo", [task])


async def test_an_agent_that_dies_comes_back_with_the_new_code_whatever_the_file_says(
    systems: System, tmp_path: Path
) -> None:
    file = write(tmp_path / "app.py", 0)
    with systems((str(file), 1)) as system:
        async with await system.plain() as plain:
            write(file, 1)
            await reload(plain)
            await soon(lambda: len(agents(system)) == 1)
            file.write_text("class Echo(:\n")
            for _ in range(3):
                (agent,) = agents(system)
                os.kill(agent, signal.SIGKILL)
                await soon(lambda agent=agent: agents(system) - {agent}, what="nobody comes")  # type: ignore[misc]
                assert (await plain.final("echo", await plain.submit("echo", {"n": 1}))).json["version"] == 1
            crashes = await plain.until(lambda story: len(story.all_of("AgentCrashed")) == 3)
            assert {event["data"]["reason"] for event in crashes.all_of("AgentCrashed")} == {"SIGKILL"}


async def test_the_files_of_the_author_are_watched(systems: System, tmp_path: Path) -> None:
    part = tmp_path / "part.py"
    part.write_text("WORD = 1\n")
    file = write(tmp_path / "app.py", 0, **{"from dspex": "from part import WORD\nfrom dspex", "version=0": "version=WORD"})
    with systems((str(file), 1), watch=True) as system:
        async with await system.plain() as plain:
            assert (await plain.ask("echo", {"n": 1})).json["version"] == 1
            part.write_text("WORD = 22\n")
            await asyncio.to_thread(system.event, "reloaded")
            assert (await plain.ask("echo", {"n": 1})).json["version"] == 22
            part.write_text("WORD = \n")
            await asyncio.to_thread(system.event, "not-reloaded")
            assert (await plain.ask("echo", {"n": 1})).json["version"] == 22
            seen = len(system.events)
            part.write_text("WORD = 3333\n")
            await asyncio.to_thread(system.event, "reloaded", after=seen)
            assert (await plain.ask("echo", {"n": 1})).json["version"] == 3333
