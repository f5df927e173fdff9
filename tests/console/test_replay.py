"""replay: the state at any version, and today's code on what came in then."""

from __future__ import annotations

import pytest
from tests.console.shells import PROGRAM, Shell

from dspex.core.replay import difference_of


def test_a_task_replays_to_the_same_output(system: Shell, task: str) -> None:
    ran = system("replay", task, "--json")
    found = ran.json
    assert ran.code == 0
    assert (found["task"], found["same"], found["difference"]) == (task, True, None)
    assert (found["performed"], found["effects"], found["version"]) == (0, 0, 2)
    assert found["state"]["output"] == {"text": "abab", "length": 4}
    assert "same" in system("replay", task).out


def test_the_state_at_every_version(system: Shell, task: str) -> None:
    states = [system("replay", task, "--to", str(version), "--json").json for version in (0, 1, 2)]
    assert [state["state"]["state"] for state in states] == ["submitted", "running", "completed"]
    assert [state["same"] for state in states] == [None, None, None]  # it is only shown
    assert [state["version"] for state in states] == [0, 1, 2]
    ran = system("replay", task, "--to", "3")
    assert (ran.code, "versions 0 to 2" in ran.err) == (2, True)


def test_a_failure_replays_to_the_same_failure(system: Shell) -> None:
    for body in ("text=raise", "text=null"):
        task = system("submit", "echo", body).out.strip()
        system("result", task)
        found = system("replay", task, "--json").json
        assert (found["same"], found["state"]["state"]) == (True, "failed")


def test_a_deadline_is_not_replayed(system: Shell) -> None:
    task = system("submit", "echo", "text=nap", "--deadline", "0.2").out.strip()
    system("result", task)
    found = system("replay", task, "--json").json
    assert (found["same"], found["state"]["error"]["type"]) == (None, "DeadlineExceeded")
    assert "deadline" in found["why"]


def test_other_code_gives_the_first_difference_and_exit_code_1(system: Shell, task: str) -> None:
    (system.folder / "other.py").write_text(PROGRAM.replace("length=len(input.text)", "length=1 + len(input.text)"))
    ran = system("replay", task, "--app", "other.py", "--json")
    assert ran.code == 1
    assert ran.json["same"] is False
    difference = {"kind": "output", "place": "output.length", "expected": 4, "found": 5, "where": ""}
    assert ran.json["difference"] == difference
    assert "output.length" in system("replay", task, "--app", "other.py:Echo").out


def test_other_defaults_are_not_the_values_it_ran_on(system: Shell, task: str) -> None:
    # The running system still knows the values, so that code with new defaults is run on the old ones.
    (system.folder / "tuned.py").write_text(PROGRAM.replace("variable(2,", "variable(4,"))
    assert system("replay", task, "--app", "tuned.py", "--json").json["same"] is True
    (system.folder / "narrow.py").write_text(PROGRAM.replace("variable(2, low=1", "variable(4, low=3"))
    found = system("replay", task, "--app", "narrow.py", "--json").json
    assert (found["same"], "values" in found["why"]) == (None, True)


def test_what_a_program_prints_does_not_spoil_the_json(system: Shell, task: str) -> None:
    noisy = PROGRAM.replace(
        "async def predict(self, input):", "async def predict(self, input):\n        print('noise')"
    )
    (system.folder / "noisy.py").write_text("print('more noise')\n" + noisy)
    assert system("replay", task, "--app", "noisy.py", "--json").json["same"] is True


def test_without_the_code_the_state_is_shown_and_how_to_give_it(system: Shell, shell: Shell, task: str) -> None:
    (shell.folder / "echo.py").unlink()
    data = str(system.folder / ".dspex")
    ran = shell("replay", task, "--data", data, "--json")
    assert (ran.code, ran.json["same"], ran.json["state"]["state"]) == (0, None, "completed")
    assert f"dspex replay {task} --app" in ran.json["why"]
    (shell.folder / "dspex.toml").write_text(f'[programs.echo]\napp = "{system.folder}/echo.py"\n')
    assert shell("replay", task, "--data", data, "--json").json["same"] is True


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["99999999"], 1), (["a-key"], 2), (["TASK", "--app", "nowhere.py"], 2), (["TASK", "--app", "empty.py"], 2)],
)
def test_what_cannot_be_replayed(system: Shell, task: str, arguments: list[str], code: int) -> None:
    (system.folder / "empty.py").write_text("x = 1\n")
    ran = system("replay", *(task if argument == "TASK" else argument for argument in arguments))
    assert (ran.code, ran.err.count("\n")) == (code, 1)


@pytest.mark.parametrize(
    ("expected", "found", "difference"),
    [
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}, ("a[1].b", 2, 3)),
        ({"a": 1}, {}, ("a", 1, None)),
        ({}, {"b": 1}, ("b", None, 1)),
        ([1], [1, 2], ("[1]", None, 2)),
        ({"a": 1}, {"a": 1.0}, ("a", 1, 1.0)),
        ({"a": True}, {"a": 1}, ("a", True, 1)),
        ({"a": "x"}, {"a": ["x"]}, ("a", "x", ["x"])),
        ({"a": [1, None]}, {"a": [1, None]}, None),
    ],
)
def test_the_first_difference(expected: object, found: object, difference: tuple[object, ...] | None) -> None:
    told = difference_of(expected, found)
    assert (told and (told.place, told.expected, told.found)) == difference
