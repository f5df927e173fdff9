"""ps, tasks, events, vars, doctor: what one sees of a running system, on a terminal and in a pipe."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys

import pytest
from tests.console.shells import Shell, environment, until


def on_a_terminal(shell: Shell, *arguments: str, **env: str) -> str:
    """A command's output as a terminal of 80 columns gets it."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "dspex", *arguments],
        cwd=shell.folder,
        env=environment(TERM="xterm", **env),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b""
    try:
        while chunk := os.read(ours, 65536):
            output += chunk
    except OSError:
        pass  # the other end is closed
    os.close(ours)
    assert process.wait(30) == 0
    return output.decode()


def test_ps_names_every_process(system: Shell) -> None:
    rows = system("ps", "--json").lines
    agents = [row for row in rows if row["program"] == "echo"]
    assert len(agents) == 2
    fields = {"agent", "program", "pid", "state", "restarts", "tasks", "supervisor", "why"}
    assert all(set(row) == fields and row["supervisor"] == "echo" for row in agents)
    roles = {row["role"] for row in rows if not row["program"]}
    assert roles == {"root", "server", "supervisor", "registrar", "archivist"}
    for row in rows:
        os.kill(row["pid"], 0)
    table = system("ps").out.splitlines()
    assert len(table) == 1 + len(rows)
    assert table[0].split() == [
        "agent", "serves", "supervisor", "pid", "state", "restarts", "tasks", "why",
    ]  # fmt: skip


def test_tasks_are_folded_from_the_log(system: Shell, task: str) -> None:
    system("ask", "echo", "text=raise")
    rows = {row["task"]: row for row in system("tasks", "echo", "--json").lines}
    mine = rows[task]
    assert (mine["state"], mine["program"], mine["attempts"]) == ("completed", "echo", 1)
    assert (mine["input"], mine["output"]["text"], mine["error"]) == ({"text": "ab"}, "abab", None)
    failed = system("tasks", "--state", "failed", "--limit", "1", "--json").lines
    assert [(row["state"], row["error"]["type"]) for row in failed] == [("failed", "ValueError")]
    assert system("tasks", "nobody").code == 1


def test_events_of_a_task_are_cloudevents(system: Shell, task: str) -> None:
    events = system("events", task, "--json").lines
    assert [event["type"] for event in events] == ["TaskSubmitted", "TaskClaimed", "TaskCompleted"]
    assert {event["specversion"] for event in events} == {"1.0"}
    assert [event["version"] for event in events] == [0, 1, 2]
    assert events[0]["position"] == int(task)
    table = system("events", task).out.splitlines()
    assert len(table) == 4
    assert "TaskCompleted" in table[3]


def test_events_can_be_cut_at_both_ends(system: Shell, task: str) -> None:
    behind = system("events", "--after", task, "--json").lines
    assert all(event["position"] > int(task) for event in behind)
    assert len(system("events", "--limit", "2", "--json").lines) == 2
    everything = system("events", "--json").lines
    assert everything[0]["position"] == 1
    assert system("events", "--limit", "2", "--json").lines == everything[-2:]
    mine = system("events", "--program", "echo", "--after", "0", "--limit", "3", "--json").lines
    assert len(mine) == 3
    assert system("events", "--program", "nobody").code == 1
    assert system("events", "99999999").code == 1
    assert system("events", task, "--program", "echo").code == 2


def test_followed_events_come_as_they_happen(system: Shell) -> None:
    process = system.start("events", "--follow", "--program", "echo", "--limit", "1", "--json")
    assert process.stdout is not None
    process.stdout.readline()
    task = system("submit", "echo", "text=followed").out.strip()
    seen = []
    while "TaskCompleted" not in seen:
        event = json.loads(process.stdout.readline())
        if event["aggregate"] == f"task.echo.{task}":
            seen.append(event["type"])
    assert seen == ["TaskSubmitted", "TaskClaimed", "TaskCompleted"]
    process.send_signal(2)
    _, complaints = process.communicate(timeout=10)
    assert (process.returncode, complaints) == (130, ""), "Ctrl-C is quiet"


def test_a_closed_pipe_is_quiet(system: Shell) -> None:
    process = system.start("events", "--json")
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(20) in (0, 141)
    process.stderr.close()


def test_vars_show_values_ranges_and_conditions(system: Shell) -> None:
    found = system("vars", "echo", "get", "--json").json
    assert found["values"] == {"times": 2, "style": "plain"}
    table = {line.split()[0]: line for line in system("vars", "echo").out.splitlines() if line}
    assert "1 to 5" in table["times"]
    assert "how often" in table["times"]
    assert "plain, loud" in table["style"]
    assert "not active" in table["marks"]
    assert "style = loud" in table["marks"]
    assert system("vars", "echo", "set").code == 2, "a verb of a later version is not promised"


@pytest.mark.parametrize("command", [["ps"], ["tasks", "--limit", "5"], ["events", "--limit", "5"], ["vars", "echo"]])
def test_tables_fit_80_columns_and_colour_can_be_switched_off(system: Shell, task: str, command: list[str]) -> None:
    plain = on_a_terminal(system, *command, NO_COLOR="1")
    assert "\x1b" not in plain
    lines = [line for line in plain.splitlines() if not line.startswith("dspex:")]
    assert max(map(len, lines)) <= 80
    assert "\x1b[" in on_a_terminal(system, *command)


def test_what_is_piped_has_neither_colour_nor_boxes(system: Shell, task: str) -> None:
    for command in (["ps"], ["tasks"], ["events"], ["vars", "echo"], ["replay", task], ["doctor"]):
        out = system(*command).out
        assert out
        assert not set("\x1b─│┃━") & set(out)


def test_an_answer_on_a_terminal_is_its_fields(system: Shell) -> None:
    shown = on_a_terminal(system, "ask", "echo", "text=ab", NO_COLOR="1").splitlines()
    assert shown[0].split() == ["text", "abab"]
    assert shown[1].split() == ["length", "4"]


def test_what_the_log_holds_cannot_steer_a_terminal(system: Shell) -> None:
    system("ask", "echo", '{"text": "\\u001b[2Jgone"}')
    shown = on_a_terminal(system, "tasks", "--limit", "1", NO_COLOR="1")
    assert "\x1b" not in shown
    assert "gone" in shown


def test_doctor_is_content_with_a_running_system(system: Shell) -> None:
    # Other tests' tasks may still be under way; what waits is no fault.
    ran = until(lambda: (done := system("doctor", "--json")).code == 0 and done)
    found = {check["check"]: check for check in ran.lines}
    assert {
        "python",
        "packages",
        "nats-server",
        "data",
        "disk",
        "connection",
        "jetstream",
        "clock",
        "log",
        "echo",
    } <= set(found)
    assert {check["status"] for check in found.values()} <= {"ok", "warn", "info"}
    assert found["echo"]["message"].startswith("2 agents serving")
    assert "all is well" in system("doctor").out


def test_doctor_without_a_system_and_with_a_dead_one(shell: Shell) -> None:
    ran = shell("doctor", "--json")
    assert (ran.code, ran.lines[-1]["check"], ran.lines[-1]["status"]) == (0, "connection", "info")
    ran = shell("doctor", "--nats", "nats://127.0.0.1:1")
    assert (ran.code, "fail  connection" in ran.out) == (3, True)
    (shell.folder / "taken").write_text("a file")
    ran = shell("doctor", "--data", "taken", "--json")
    failed = [check["check"] for check in ran.lines if check["status"] == "fail"]
    assert (ran.code, failed) == (1, ["data"])
