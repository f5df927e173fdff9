"""up: the summary, the one JSON line, deaths told, and everything that can be wrong at the start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field
from tests.console.shells import PROGRAM, Shell, stop, until

from dspex import Program, Schema
from dspex.console.bodies import example_of

Up = Callable[..., tuple[subprocess.Popen[str], dict[str, object]]]


@pytest.fixture
def up(shell: Shell) -> Iterator[Up]:
    """Starts `dspex up … --json` and waits for its line; all are stopped afterwards."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[str], dict[str, object]]:
        process = shell.start("up", *arguments, "--durability", "process", "--json")
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, stop(process)
        return process, json.loads(line)

    yield start
    for process in started:
        if process.stdout is not None and not process.stdout.closed:
            stop(process)


def test_one_line_of_json_then_nothing_and_sigterm_drains(shell: Shell, up: Up) -> None:
    process, told = up("echo.py")
    assert told == {"ready": True, "nats": told["nats"], "console": None, "data": str(shell.folder / ".dspex")}
    assert shell("ask", "echo", "text=a").json["output"]["text"] == "aa"
    assert stop(process)[:2] == (0, "")
    gone = shell("ps")
    assert (gone.code, "no system runs in .dspex, and no NATS server answers" in gone.err) == (3, True)


def test_the_summary_names_programs_and_lines_that_work(shell: Shell) -> None:
    process = shell.start("up", "echo.py:Echo", "--agents", "2", "--durability", "process")
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or "Ctrl-C" not in lines[-1]:
        lines.append(process.stdout.readline().rstrip())
    text = "\n".join(lines)
    assert "echo  2 agents  Say it again." in text
    (line,) = (line.strip() for line in lines if line.strip().startswith("dspex ask"))
    assert line == 'dspex ask echo text="Hello"'
    assert 'nats req dspex.ask.echo \'{"text":"Hello"}\' -s nats://127.0.0.1:' in text
    victim = next(row for row in shell("ps", "--json").lines if row["program"])
    os.kill(victim["pid"], signal.SIGKILL)
    assert f"{victim['agent']} (process {victim['pid']}) died: SIGKILL; starting it again" in process.stdout.readline()
    assert f"{victim['agent']} serves again" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, "drained and stopped" in out, err) == (0, True, "")


def test_programs_from_a_settings_file(shell: Shell, up: Up) -> None:
    (shell.folder / "other.py").write_text(PROGRAM.replace("class Echo", "class Other"))
    text = '[programs.echo]\napp = "echo.py"\nagents = 2\n[programs.other]\napp = "other.py:Other"\n'
    (shell.folder / "dspex.toml").write_text(text)
    up()
    served = [row["program"] for row in shell("ps", "--json").lines if row["program"]]
    assert sorted(served) == ["echo", "echo", "other"]


def test_a_table_serves_the_program_of_its_name_and_no_other(shell: Shell, up: Up) -> None:
    both = PROGRAM + PROGRAM.replace("class Echo", "class Other")
    (shell.folder / "both.py").write_text(both)
    (shell.folder / "wrong.toml").write_text('[programs.eco]\napp = "both.py"\n')
    ran = shell("up", "wrong.toml")
    assert (ran.code, "[programs.eco]: both.py has no program eco; it has echo, other" in ran.err) == (2, True)
    (shell.folder / "dspex.toml").write_text('[programs.other]\napp = "both.py"\n')
    up()
    assert [row["program"] for row in shell("ps", "--json").lines if row["program"]] == ["other"]


def test_the_programs_stand_in_columns_that_fit_80(shell: Shell) -> None:
    long = PROGRAM.replace("class Echo", "class LongName").replace("Say it again.", "Say it again and again. " * 9)
    (shell.folder / "both.py").write_text(PROGRAM + long)
    process = shell.start("up", "both.py")
    assert process.stdout is not None
    lines = []
    while not lines or "Ctrl-C" not in lines[-1]:
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    stop(process)
    first, second = (line.rstrip() for line in lines if " 1 agent " in line)
    assert first == "  echo      1 agent  Say it again."
    assert second.startswith("  longname  1 agent  Say it again and again.")
    assert (len(second) <= 80, second[-1]) == (True, "…")


def test_a_taken_port_means_the_next_one_said_aloud(shell: Shell, up: Up) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        process, told = up("echo.py", "--port", str(port))
        assert told["nats"] != f"nats://127.0.0.1:{port}"
        _, _, err = stop(process)
        assert f"port {port} is taken; the server listens on {str(told['nats']).rpartition(':')[2]} instead" in err


def test_a_second_up_on_the_same_folder_is_refused(shell: Shell, up: Up) -> None:
    process, _ = up("echo.py")
    ran = shell("up", "echo.py", "--json")
    assert (ran.code, ran.json["error"]["type"]) == (2, "ConfigurationError")
    assert f"another dspex (process {process.pid}) uses the data folder" in ran.err
    assert shell("ask", "echo", "text=a").code == 0, "the first one serves on"


def test_up_again_after_the_root_was_killed(shell: Shell, up: Up) -> None:
    process, _ = up("echo.py")
    task = shell("ask", "echo", "text=before").json["task"]
    process.kill()
    process.communicate()
    up("echo.py")
    assert shell("result", task).json["output"]["text"] == "beforebefore"
    assert until(lambda: len([row for row in shell("ps", "--json").lines if row["program"]])) == 1


def test_changed_schemas_are_refused_until_told_to_replace(shell: Shell, up: Up) -> None:
    process, _ = up("echo.py")
    stop(process)
    (shell.folder / "echo.py").write_text(PROGRAM.replace("n: int = 1", "n: int = 1\n        more: str = ''"))
    ran = shell("up", "echo.py", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, 409)
    assert "input field more is new" in ran.err
    assert "--replace" in ran.err
    up("echo.py", "--replace")
    assert shell("ask", "echo", "text=a", "more=b").code == 0


MISTAKES = {
    "missing": (None, "there is no file app.py"),
    "syntax": ("class Echo(:\n", "app.py:1: SyntaxError"),
    "raises": ("import dspex\n\nboom\n", "app.py:3: NameError"),
    "empty": ("x = 1\n", "app.py defines no program"),
    "definition": (PROGRAM.replace("variable(2, low=1, high=5", "variable(9, low=1, high=5"), "Echo.times = 9"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_app_with_a_mistake_is_one_line(shell: Shell, mistake: str) -> None:
    source, words = MISTAKES[mistake]
    if source is not None:
        (shell.folder / "app.py").write_text(source)
    ran = shell("up", "app.py", "--json")
    assert ran.code == 2
    assert words in ran.err
    assert ran.err.count("\n") == 1
    assert ran.json["error"]["type"] == "ConfigurationError"


def test_what_else_is_wrong_at_the_start(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (["echo.py:Ecko"], "has no program Ecko; it has Echo"),
        (["echo.py", "--data", "file/data"], "the data folder file/data cannot be used (Not a directory)"),
        (["echo.py", "--agents", "0"], "agents"),
        (["echo.py", "--port", "4222", "--nats", "nats://127.0.0.1:1"], "--port is for our own server"),
        (["nowhere.toml"], "there is no file nowhere.toml"),
        ([], "names no programs"),
    ):
        ran = shell("up", *arguments)
        assert (ran.code, words in ran.err, ran.err.count("\n")) == (2, True, 1), (arguments, ran.err)
        assert "Traceback" not in ran.err


def test_the_example_body_is_the_smallest_that_the_schema_admits() -> None:
    class Inner(Schema):
        kind: Literal["b", "c"]

    class Sample(Program):
        class Input(Schema):
            question: str
            long: Annotated[str, Field(min_length=5)]
            ratio: Annotated[float, Field(gt=0, lt=1)]
            count: Annotated[int, Field(gt=3)]
            flag: bool
            pixels: Annotated[list[float], Field(min_length=4)]
            inner: Inner
            maybe: str | None
            left_out: int = 3

        class Output(Schema):
            text: str

        def predict(self, input: Input) -> Output:
            return self.Output(text="")

    body = example_of(Sample.describe().input_schema)
    assert "left_out" not in body
    Sample.Input.decode(json.dumps(body).encode())


def test_a_server_that_does_not_answer_is_waited_for_and_ctrl_c_still_ends_it(shell: Shell) -> None:
    process = shell.start("up", "echo.py", "--nats", "nats://127.0.0.1:1", "--json")
    assert process.stderr is not None
    assert "no NATS server answers at nats://127.0.0.1:1" in process.stderr.readline()
    assert stop(process)[:2] == (0, "")


def test_one_process_says_for_all_that_no_server_answers(shell: Shell) -> None:
    process = shell.start("up", "echo.py", "--agents", "3", "--nats", "nats://127.0.0.1:1", "--json")
    assert process.stderr is not None
    process.stderr.readline()
    time.sleep(1)
    assert "no NATS server" not in stop(process)[2]


def test_a_setup_that_fails_is_told_once(shell: Shell) -> None:
    failing = PROGRAM + "    def setup(self):\n        raise OSError('no model here')\n"
    (shell.folder / "failing.py").write_text(failing)
    done = shell("up", "failing.py", "--agents", "3", "--durability", "process")
    assert done.code == 1 and done.err.count("no model here") == 1


def test_a_drain_says_what_it_waits_for(shell: Shell, up: Up) -> None:
    slow = PROGRAM.replace("asyncio.sleep(1.0)", "asyncio.sleep(5.0)").replace("timeout = 2.0", "timeout = 20.0")
    (shell.folder / "echo.py").write_text(slow)
    process, _ = up("echo.py")
    waiting = shell.start("ask", "echo", "text=nap")
    until(lambda: '"submitted"' in shell("tasks", "--json").out)
    code, _, err = stop(process)
    stop(waiting)
    assert code == 0 and "lets 1 task end, for at most" in err
