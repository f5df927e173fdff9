"""`to_agent_system`: in scripts of their own, because a system is forked from the process that asks for it."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import asyncio, json, os, signal, sys, time
from pathlib import Path
from dspex import ConfigurationError, InvalidInput, Program, Schema, System, TaskError, variable


class Echo(Program):
    class Input(Schema):
        text: str

    class Output(Schema):
        text: str
        pid: int

    times = variable(2, low=1, high=5)

    def predict(self, input: Input) -> Output:
        if input.text == "raise":
            raise ValueError("the secret")
        return self.Output(text=input.text * self.times, pid=os.getpid())


def say(**what):
    print(json.dumps(what))

"""

Script = Callable[..., dict[str, Any]]


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Runs a script in which Echo is defined and `data` is a folder; what it says as one dict."""

    def run(body: str, *, code: int = 0) -> dict[str, Any]:
        file = tmp_path / "script.py"
        file.write_text(PROGRAM + f"data = {str(tmp_path / 'data')!r}\n" + textwrap.dedent(body))
        done = subprocess.run([sys.executable, "-W", "error", str(file)], capture_output=True, text=True, timeout=100)
        assert done.returncode == code, done.stderr
        said: dict[str, Any] = {"stderr": done.stderr}
        for line in done.stdout.splitlines():
            said |= json.loads(line)
        return said

    return run


def test_the_blocking_way(script: Script) -> None:
    said = script("""
        with Echo.to_agent_system(agents=2, data=data, durability="process") as system:
            task = system.submit(text="b", key="order 7")
            result = system.result(task)
            system.score(task, 0.5, "fine")
            say(asked=system.ask(text="a").text, other=result.pid != os.getpid(), result=result.text,
                again=system.result("order 7").text, types=[e["type"] for e in system.events(task)],
                roles=[p.get("role") or p["program"] for p in system.processes()])
    """)
    assert (said["asked"], said["result"], said["again"], said["other"]) == ("aa", "bb", "bb", True)
    assert said["types"] == ["TaskSubmitted", "TaskClaimed", "TaskCompleted", "OutcomeReported"]
    assert said["roles"][:4] == ["root", "server", "supervisor", "registrar"] and said["roles"][-2:] == ["echo", "echo"]
    assert said["stderr"] == ""


def test_the_async_way(script: Script) -> None:
    said = script("""
        async def main():
            async with Echo.to_agent_system(data=data, durability="process") as system:
                answers = await asyncio.gather(*(system.aask(text=str(n)) for n in range(50)))
                task = await system.asubmit(text="b")
                await system.ascore(task, 1.0)
                say(answers=[a.text for a in answers], result=(await system.aresult(task)).text)
        asyncio.run(main())
    """)
    assert said["answers"] == [f"{n}{n}" for n in range(50)] and said["result"] == "bb"
    assert said["stderr"] == ""


def test_variables_are_set(script: Script) -> None:
    said = script("""
        with Echo.to_agent_system(data=data, durability="process", values={"times": 3}) as system:
            say(asked=system.ask(text="a").text)
    """)
    assert said["asked"] == "aaa"


def test_errors_are_the_errors_of_the_package(script: Script) -> None:
    said = script("""
        with Echo.to_agent_system(data=data, durability="process") as system:
            for name, fields in (("bad", {"text": 5}), ("raised", {"text": "raise"})):
                try:
                    system.ask(**fields)
                except TaskError as error:
                    say(**{name: [type(error).__name__, error.code, str(error)]})
            try:
                system.ask(Echo.Output(text="a", pid=1))
            except InvalidInput as error:
                say(wrong=str(error))
            try:
                system.result("999999")
            except TaskError as error:
                say(unknown=error.code)
    """)
    assert said["bad"][:2] == ["InvalidInput", 400]
    assert said["raised"][:2] == ["ProgramFailed", 500] and "secret" not in said["raised"][2]
    assert "Echo.Input" in said["wrong"] and said["unknown"] == 404


def test_nothing_is_left_when_it_is_over_and_the_next_one_goes_on_with_the_data(script: Script) -> None:
    said = script("""
        def below():
            return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        with Echo.to_agent_system(data=data, durability="process") as system:
            pids = [p["pid"] for p in system.processes()]
            task = system.submit(text="kept")
            system.result(task)
        def gone(pid):
            try:
                return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except FileNotFoundError:
                return True
        say(left=[pid for pid in pids if not gone(pid)], children=below())
        with Echo.to_agent_system(data=data, durability="process") as system:
            say(kept=system.result(task).text)
    """)
    assert said["left"] == [] and said["children"] == [] and said["kept"] == "keptkept"


def test_it_ends_when_the_body_raises(script: Script) -> None:
    said = script("""
        try:
            with Echo.to_agent_system(data=data, durability="process") as system:
                pid = system.processes()[0]["pid"]
                raise KeyError("mine")
        except KeyError as error:
            say(raised=str(error), gone=not Path(f"/proc/{pid}").exists())
    """)
    assert said["raised"] == "'mine'" and said["gone"]


def test_it_ends_when_its_process_is_killed(script: Script) -> None:
    said = script("""
        pid = os.fork()
        if not pid:
            with Echo.to_agent_system(data=data, durability="process") as system:
                Path(data + ".pids").write_text(json.dumps([p["pid"] for p in system.processes()]))
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(pid, 0)
        pids = json.loads(Path(data + ".pids").read_text())
        def lives(pid):
            try:
                return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            except FileNotFoundError:
                return False
        until = time.monotonic() + 20
        while time.monotonic() < until and any(map(lives, pids)):
            time.sleep(0.02)
        say(left=[pid for pid in pids if lives(pid)])
    """)
    assert said["left"] == []


def test_what_cannot_be_is_refused_in_one_sentence_before_anything_is_started(script: Script) -> None:
    said = script("""
        for name, options in (("agents", {"agents": 0}), ("folder", {"data": "/proc/dspex"})):
            try:
                with Echo.to_agent_system(**{"data": data} | options):
                    pass
            except ConfigurationError as error:
                say(**{name: str(error)})
        try:
            Echo.to_agent_system(values={"times": 99})
        except Exception as error:
            say(value=[type(error).__name__, str(error)])
        say(made=Path(data).exists())
    """)
    assert "agents = 0" in said["agents"] and "/proc/dspex" in said["folder"]
    assert said["value"][0] == "InvalidAssignment" and "times" in said["value"][1]
    assert said["made"] is False


def test_a_system_that_does_not_run_says_so(script: Script) -> None:
    said = script("""
        system = Echo.to_agent_system(data=data)
        try:
            system.ask(text="a")
        except ConfigurationError as error:
            say(blocking=str(error))
        async def main():
            try:
                await system.aask(text="a")
            except ConfigurationError as error:
                say(later=str(error))
        asyncio.run(main())
    """)
    assert "with" in said["blocking"] and "with" in said["later"]


def test_two_systems_with_two_folders_run_side_by_side(script: Script) -> None:
    said = script("""
        with Echo.to_agent_system(data=data + "1", durability="process") as one:
            with Echo.to_agent_system(data=data + "2", durability="process") as two:
                say(one=one.ask(text="a").pid, two=two.ask(text="a").pid, urls=one.url != two.url)
    """)
    assert said["one"] != said["two"] and said["urls"]


def test_a_program_whose_setup_fails_is_refused(script: Script) -> None:
    said = script("""
        class Broken(Echo):
            def setup(self):
                raise OSError("the model file is missing")
        try:
            with Broken.to_agent_system(data=data, durability="process"):
                pass
        except ConfigurationError as error:
            say(refused=str(error))
    """)
    assert "the model file is missing" in said["refused"] and "Broken" in said["refused"]


def test_a_system_with_access_rules_is_asked_as_its_console(script: Script) -> None:
    said = script("""
        with Echo.to_agent_system(secure=True, data=data, durability="process") as system:
            task = system.submit(text="c")
            say(asked=system.ask(text="ab").text, result=system.result(task).text, events=len(system.events(task)))
            system.score(task, 1.0)
            say(roles=[each["agent"].split("-")[0] for each in system.processes()], url=system.url)
            say(open=[file.name for file in (Path(data) / "secure").iterdir() if file.stat().st_mode & 0o077])
    """)
    assert (said["asked"], said["result"], said["open"]) == ("abab", "cc", [])
    assert said["events"] >= 2 and said["roles"][:3] == ["root", "server", "supervisor"] and said["url"].startswith("nats://")


def test_a_log_without_access_rules_is_refused_in_words(script: Script) -> None:
    said = script("""
        try:
            with Echo.to_agent_system(secure=True, log="sqlite", data=data):
                pass
        except ConfigurationError as error:
            say(refused=str(error))
    """)
    assert "a system whose log is sqlite has no access rules yet" in said["refused"]
