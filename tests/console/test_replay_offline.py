"""replay, tasks and events on a file, with no server: verdicts, states, steps, whole programs."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.console.offline import APP, BARE, PATIENT, SHOP, changed, dspex, ids
from tests.console.shells import environment

from dspex.core.ports import Entry
from dspex.store import SqliteLog
from dspex.store.export import import_entries

LINE = 'price("bb", count=2)'


@pytest.fixture(scope="module")
def task() -> str:
    return ids(SHOP)[1]


def test_the_same_code_is_the_same(task: str) -> None:
    ran = dspex("replay", task, "--log", SHOP, "--app", APP, "--json")
    assert ran.code == 0
    shown = {name: ran.json[name] for name in ("task", "same", "effects", "performed", "difference")}
    assert shown == {"task": task, "same": True, "effects": 12, "performed": 0, "difference": None}
    assert "same: run again" in dspex("replay", task, "--log", SHOP, "--app", APP).out


def test_the_first_difference_is_named_with_its_line(task: str, tmp_path: Path) -> None:
    app = changed(tmp_path, LINE, 'price("bb", count=3)')
    ran = dspex("replay", task, "--log", SHOP, "--app", app, "--json")
    assert (ran.code, ran.json["same"]) == (1, False)
    difference = ran.json["difference"]
    assert (difference["kind"], difference["place"]) == ("arguments", "shop.price#2")
    assert difference["found"] == "price('bb', count=3)"
    assert difference["where"].startswith(f"{app}:")
    said = dspex("replay", task, "--log", SHOP, "--app", app).out
    assert "different" in said
    assert "other arguments" in said
    assert f"{app}:" in said


def test_the_state_at_every_version_and_at_a_time(task: str) -> None:
    states = [dspex("replay", task, "--log", SHOP, "--to", str(n), "--json").json for n in (0, 4, 14)]
    assert [found["state"]["state"] for found in states] == ["submitted", "running", "completed"]
    assert [len(found["events"]) for found in states] == [1, 5, 15]
    middle = states[1]["events"][-1]["time"]
    then = dspex("replay", task, "--log", SHOP, "--at", middle, "--json").json
    assert then["version"] == 4
    piped = dspex("replay", task, "--log", SHOP, "--to", "4").out
    assert piped.count("EffectRecorded") == 3, "what came later would look like what was there then"
    assert "TaskCompleted" not in piped
    late = dspex("replay", task, "--log", SHOP, "--to", "15")
    assert (late.code, "versions 0 to 14" in late.err) == (2, True)
    early = dspex("replay", task, "--log", SHOP, "--at", "2020-01-01")
    assert (early.code, "came in at" in early.err) == (1, True)


def test_steps_are_printed_in_full_when_piped(task: str) -> None:
    said = dspex("replay", task, "--log", SHOP, "--step").out
    assert said.count("version ") == 15
    assert '{"item":"tea","cents":300}' in said
    assert "raised KeyError: tea" in said
    steps = dspex("replay", task, "--log", SHOP, "--step", "--json").lines
    assert [step["version"] for step in steps] == list(range(15))
    assert steps[4]["output"] == {"item": "tea", "cents": 300}
    assert steps[-1]["state"] == "completed"


def test_steps_on_a_terminal_go_on_and_back_and_quit(task: str) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "dspex", "replay", task, "--log", SHOP, "--step"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(TERM="xterm"))
    os.close(theirs)
    said = ""

    def until(words: str, times: int) -> None:
        nonlocal said
        deadline = time.monotonic() + 20
        while said.count(words) < times:
            assert time.monotonic() < deadline, said
            if select.select([ours], [], [], 0.1)[0]:
                said += os.read(ours, 65536).decode()

    try:
        for number, key in enumerate((b"\r", b"\r", b"b", b"q"), 1):
            until("q quit", number)
            time.sleep(0.5)  # what is typed before the terminal is read is dropped
            os.write(ours, key)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert said.count("version 1 of") == 2
    assert "version 3 of" not in said


def test_every_task_of_a_program(tmp_path: Path) -> None:
    ran = dspex("replay", "--all", "shop", "--log", SHOP, "--app", APP)
    assert (ran.code, "2 same, 0 different of 2" in ran.out) == (0, True)
    app = changed(tmp_path, LINE, 'price("bb", count=3)')
    ran = dspex("replay", "--all", "shop", "--log", SHOP, "--app", app)
    assert (ran.code, "0 same, 2 different" in ran.out, "shop.price#2" in ran.out) == (1, True, True)
    *tasks, last = dspex("replay", "--all", "shop", "--log", SHOP, "--app", app, "--json").lines
    assert [task["same"] for task in tasks] == [False, False]
    summary = last["summary"]
    assert (summary["different"], summary["performed"], summary["replayed"]) == (2, 0, 2)
    assert summary["recorded_seconds"] > 0
    assert summary["replay_seconds"] > 0


def test_another_assignment_and_fewer_tasks() -> None:
    ran = dspex("replay", "--all", "shop", "--log", SHOP, "--app", APP, "--set", "discount=9", "--limit", "1", "--json")
    only, last = ran.lines
    assert (ran.code, only["task"], only["difference"]["place"]) == (1, ids(SHOP)[1], "output.value.paid")
    assert last["summary"]["replayed"] == 1
    none = dspex("replay", "--all", "shop", "--log", SHOP, "--app", APP, "--since", "1s", "--json")
    assert (none.code, none.json["summary"]["replayed"]) == (0, 0)
    wrong = dspex("replay", "--all", "shop", "--log", SHOP, "--app", APP, "--set", "discount=900")
    assert (wrong.code, "discount" in wrong.err) == (2, True)


def test_failures_are_counted_as_such(tmp_path: Path) -> None:
    app = changed(tmp_path, 'if input.items == ["bad"]:', "if True:")
    ran = dspex("replay", "--all", "bare", "--log", BARE, "--app", app)
    assert (ran.code, "1 same, 1 different (1 raised)" in ran.out) == (1, True)


def test_a_task_that_still_sleeps_is_the_same_so_far(tmp_path: Path) -> None:
    async def entries() -> list[Entry]:
        log = await SqliteLog.open(PATIENT, readonly=True)
        try:
            return await log.scan(0)
        finally:
            await log.close()

    found = asyncio.run(entries())
    task = ids(PATIENT)[0]
    asleep = next(e.position for e in found if e.subject.endswith(f".{task}") and b"TaskSleeping" in e.body)
    file = str(tmp_path / "cut.db")
    import_entries(file, [entry for entry in found if entry.position <= asleep], epoch="")
    ran = dspex("replay", task, "--log", file, "--app", APP, "--json")
    assert (ran.code, ran.json["same"], ran.json["difference"]) == (0, True, None)
    assert (ran.json["stopped"], ran.json["effects"]) == ("patient.sleep#0", 1)
    assert "same so far" in dspex("replay", task, "--log", file, "--app", APP).out
    app = changed(tmp_path, "before = await price(input.items[0])", "before = await price(input.items[0], 3)")
    assert dspex("replay", task, "--log", file, "--app", app, "--json").json["difference"]["kind"] == "arguments"


def test_tasks_and_events_from_a_file() -> None:
    found = dspex("tasks", "--log", PATIENT, "--json").lines
    assert [task["state"] for task in found] == ["completed", "completed"]
    events = dspex("events", found[0]["task"], "--log", PATIENT, "--json").lines
    kinds = [event["type"] for event in events]
    assert {"TaskSubmitted", "TaskSleeping", "SignalSent", "EffectRecorded", "TaskCompleted"} <= set(kinds)
    assert [event["position"] for event in events] == sorted(event["position"] for event in events)
    assert "for the signal approval" in dspex("events", found[1]["task"], "--log", PATIENT).out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["replay", "99", "--log", SHOP], 1, "no task 99"),
        (["replay", "abc", "--log", SHOP], 2, "no task's id"),
        (["replay", "4", "--log", "nowhere.db"], 2, "no file nowhere.db"),
        (["replay", "4", "--log", APP], 1, "programs.py"),
        (["replay", "--log", SHOP], 2, "is due"),
        (["replay", "4", "--all", "shop", "--log", SHOP], 2, "not both"),
        (["replay", "4", "--at", "yesterday", "--log", SHOP], 2, "no time"),
        (["replay", "4", "--to", "1", "--at", "2h", "--log", SHOP], 2, "one of them"),
        (["replay", "4", "--since", "2h", "--log", SHOP], 2, "--all"),
        (["replay", "4", "--set", "x", "--log", SHOP], 2, "a name and a value"),
        (["replay", "--all", "nobody", "--log", SHOP], 1, "no task of nobody"),
        (["replay", "--all", "shop", "--step", "--log", SHOP], 2, "for one task"),
        (["replay", "4"], 3, ""),
        (["events", "--follow", "--log", SHOP], 2, "nothing happens in a file"),
        (["tasks", "nobody", "--log", SHOP], 1, "no program nobody"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_a_code(arguments: list[str], code: int, words: str) -> None:
    ran = dspex(*arguments)
    assert (ran.code, ran.err.count("\n")) == (code, 1)
    assert words in ran.err
