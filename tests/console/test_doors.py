"""ask, submit, result, score, signal from the shell, and their exit codes."""

from __future__ import annotations

import json
import re

import pytest
from tests.console.shells import Shell


def test_ask_with_fields_json_a_file_and_the_input(system: Shell) -> None:
    (system.folder / "body.json").write_text('{"text": "ab"}')
    ways = (["text=ab"], ['{"text": "ab"}'], ["@body.json"], ["-"])
    for body in ways:
        ran = system("ask", "echo", *body, input='{"text":"ab"}')
        assert (ran.code, ran.err) == (0, "")
        assert ran.json["output"] == {"text": "abab", "length": 4}
        assert int(ran.json["task"]) > 0


def test_a_field_that_looks_like_json_is_json(system: Shell) -> None:
    assert system("ask", "echo", "text=a=b", "n=3").json["output"]["text"] == "a=ba=b"
    ran = system("ask", "echo", "text=5")
    assert ran.code == 1
    assert "text: a string is due, 5 came" in ran.err


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (["hello"], "neither JSON nor a field"),
        (['{"text": NaN}'], "neither JSON nor a field"),
        (["text=a", "text=b"], "given twice"),
        (["@nowhere.json"], "cannot be read"),
        (["text=a", "--deadline", "soon"], "Dspex-Deadline"),
        (["text=a", "--timeout", "0"], "timeout"),
    ],
)
def test_a_body_or_flag_that_cannot_be_is_a_usage_error(system: Shell, body: list[str], words: str) -> None:
    ran = system("ask", "echo", *body)
    assert ran.code == 2
    assert words in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("body", "code", "kind"),
    [("text=raise", 500, "ValueError"), ("txt=a", 400, "InvalidInput"), ("text=sleep", 408, "DeadlineExceeded")],
)
def test_a_refused_ask_says_why_in_one_sentence_and_in_json(system: Shell, body: str, code: int, kind: str) -> None:
    ran = system("ask", "echo", body, "--json")
    assert ran.code == 1
    assert ran.err.startswith("dspex: ")
    assert ran.err.count("\n") == 1
    assert "a secret" not in ran.out + ran.err, "an exception's own words stay in the log"
    error = ran.json["error"]
    assert (error["code"], error["type"]) == (code, kind)
    assert set(error) == {"type", "message", "task", "code"}


def test_a_deadline_holds(system: Shell) -> None:
    ran = system("ask", "echo", "text=nap", "--deadline", "0.3", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, 408)


@pytest.mark.parametrize("command", [["ask"], ["submit"], ["vars"]])
def test_a_program_that_is_not_there_is_named_with_those_that_are(system: Shell, command: list[str]) -> None:
    ran = system(*command, "ecko")
    assert (ran.code, ran.err) == (1, "dspex: there is no program ecko; those known are echo\n")


def test_submit_then_result_by_id_alone_and_by_key(system: Shell) -> None:
    first = system("submit", "echo", "text=xy", "--key", "k1")
    assert first.out.strip().isdecimal()
    task = first.out.strip()
    assert system("result", task).json == {"task": task, "output": {"text": "xyxy", "length": 4}}
    assert system("result", "echo", "k1", "--json").json == {"task": task, "output": {"text": "xyxy", "length": 4}}
    assert system("submit", "echo", "text=xy", "--json").json["task"].isdecimal()


def test_a_result_that_is_not_there_yet_or_never(system: Shell) -> None:
    task = system("submit", "echo", "text=wait").out.strip()
    ran = system("result", task, "--wait", "0", "--json")
    assert (ran.code, ran.json["error"]["code"]) == (1, 202)
    assert system("result", "99999999").code == 1
    assert system("result", "echo", "no-such-key").code == 1
    assert system("result", "nobody", "5").err.startswith("dspex: there is no program nobody")
    ran = system("result", "a-key-alone")
    assert (ran.code, "give the program first" in ran.err) == (2, True)


def test_many_tasks_from_a_file_get_ids_in_order(system: Shell) -> None:
    lines = "\n".join(json.dumps({"text": f"t{number}"}) for number in range(300))
    (system.folder / "many.jsonl").write_text(lines + "\n\n")
    ran = system("submit", "echo", "--file", "many.jsonl", "--json")
    tasks = [int(line["task"]) for line in ran.lines]
    assert (ran.code, len(tasks)) == (0, 300)
    assert len(set(tasks)) == 300
    last = system("result", str(tasks[-1])).json["output"]["text"]
    assert last == "t299t299"


def test_a_file_with_a_key_is_submitted_once(system: Shell) -> None:
    first = system("submit", "echo", "--file", "-", "--key", "batch", input='{"text": "once"}\n').out.strip()
    again = system("submit", "echo", "--file", "-", "--key", "batch", input='{"text": "once"}\n').out.strip()
    assert system("result", "echo", "batch-1").json["task"] == first
    assert system("result", again).json["output"]["text"] == "onceonce"
    rows = {row["task"]: row for row in system("tasks", "echo", "--json").lines}
    assert (rows[again]["state"], rows[again]["of"]) == ("duplicate", first)


def test_a_file_with_a_mistake_submits_nothing(system: Shell) -> None:
    (system.folder / "bad.jsonl").write_text('{"text": "before the mistake"}\nnot json\n')
    ran = system("submit", "echo", "--file", "bad.jsonl")
    assert ran.code == 2
    assert "bad.jsonl:2 is not JSON; nothing was submitted" in ran.err
    assert "before the mistake" not in system("events", "--program", "echo").out
    (system.folder / "empty.jsonl").write_text("\n")
    assert system("submit", "echo", "--file", "empty.jsonl").code == 2
    assert system("submit", "echo", "--file", "nowhere.jsonl").code == 2


def test_scores_and_signals_are_in_the_task_s_events(system: Shell) -> None:
    task = str(system("submit", "echo", "text=wait", "--json").json["task"])
    assert system("score", task, "-0.5", "--feedback", "too short").code == 0
    scored = system("score", task, "0.75", "--json").json
    assert (scored["task"], scored["score"], scored["position"] > int(task)) == (task, 0.75, True)
    assert system("signal", task, "approval", "true", "--json").json["value"] is True
    assert system("signal", task, "note", "plain words", "--json").json["value"] == "plain words"
    assert system("result", task).code == 0
    events = system("events", task, "--json").lines
    assert [
        event["data"].get("outcome", {}).get("score") for event in events if event["type"] == "OutcomeReported"
    ] == [
        -0.5,
        0.75,
    ]
    assert [event["data"]["signal"]["name"] for event in events if event["type"] == "SignalSent"] == [
        "approval",
        "note",
    ]


def test_a_score_that_is_no_number_or_of_no_task(system: Shell, task: str) -> None:
    assert system("score", task, "nan").code == 2
    assert system("score", task, "good").code == 2
    assert system("score", "99999999", "1").code == 1
    assert system("score", "some-key", "1").code == 2
    assert system("score", "some-key", "1", "--program", "nobody").code == 1


@pytest.mark.parametrize("command", [["ps"], ["ask", "echo"], ["tasks"], ["replay", "5"], ["vars", "echo"]])
def test_no_server_is_exit_code_3_and_one_sentence(shell: Shell, command: list[str]) -> None:
    ran = shell(*command, "--nats", "nats://127.0.0.1:1", "--json")
    assert (ran.code, ran.json["error"]["type"]) == (3, "ConnectionFailed")
    assert ran.err.count("\n") == 1
    assert "nats://127.0.0.1:1" in ran.err


def test_settings_that_cannot_be_are_named_with_their_place(shell: Shell) -> None:
    (shell.folder / "dspex.toml").write_text("agents = 0\n")
    ran = shell("ps")
    assert (ran.code, ran.err.startswith("dspex: dspex.toml: agents = 0")) == (2, True)
    (shell.folder / "dspex.toml").unlink()
    ran = shell("ps", env={"DSPEX_PREFIX": "No Good"})
    assert (ran.code, "DSPEX_PREFIX" in ran.err) == (2, True)


def test_the_environment_names_the_server(system: Shell, shell: Shell) -> None:
    url = json.loads((system.folder / ".dspex" / "system.json").read_text())["nats"]
    assert shell("ask", "echo", "text=a", env={"NATS_URL": url}).json["output"]["text"] == "aa"
    assert shell("ask", "echo", "text=a", "--data", str(system.folder / ".dspex")).code == 0


def test_cancel_ends_a_task_once(system: Shell, task: str) -> None:
    ran = system("cancel", task)
    assert (ran.code, ran.out) == (1, "")
    assert f"task {task} has ended already: it is completed" in ran.err
    running = system("submit", "echo", "text=wait", "--key", "long", "--json").json["task"]
    assert system("cancel", "long", "--program", "echo", "--reason", "no need", "--json").json == {
        "task": running, "state": "cancelled"
    }  # fmt: skip
    ran = system("result", running)
    assert (ran.code, ran.err.strip().endswith("the task was cancelled: no need")) == (1, True)
    assert system("cancel", running).code == 1
    assert system("cancel", "long").code == 2
    assert system("cancel", "99999999").code == 1


def test_a_signal_to_nobody_is_refused(system: Shell, task: str) -> None:
    ended = system("signal", task, "go", "1")
    assert ended.code == 1 and f"task {task} has ended" in ended.err
    unknown = system("signal", "999999", "go", "1", "--program", "echo")
    assert unknown.code == 1 and "has no task 999999" in unknown.err


def test_an_ask_that_is_not_answered_in_time_names_its_task(system: Shell) -> None:
    late = system("ask", "echo", "text=nap", "--timeout", "0.4")
    assert late.code == 1
    [task] = re.findall(r"dspex result (\d+)", late.err)
    assert system("result", task).json["output"]["text"] == "napnap"
