"""tasks, views and events of any aggregate: found in the archive of a running system, and in a file."""

from __future__ import annotations

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from tests.console.offline import SHOP, dspex, ids
from tests.console.shells import Shell
from tests.golden.programs import Bare

from dspex import System, find_tasks


@pytest.fixture(scope="module")
def scored(system: Shell) -> str:
    """A task with a key, a score and words that no other task of this system has, whichever tests it serves."""
    task = system("submit", "echo", "text=xylophone quartet", "--key", "concert").out.strip()
    assert system("result", task).code == 0
    assert system("score", task, "-41.5").code == 0
    return task


def found(system: Shell, *arguments: str) -> list[str]:
    ran = system("tasks", *arguments, "--json")
    assert ran.code == 0, ran
    return [row["task"] for row in ran.lines]


def test_a_task_is_found_at_once_by_all_that_is_known_of_it(system: Shell, scored: str) -> None:
    fresh = system("submit", "echo", "text=raise").out.strip()
    system("result", fresh)
    assert found(system, "--state", "failed,dead", "--program", "echo")[-1] == fresh, "it has just ended"
    assert scored not in found(system, "--state", "failed,dead")
    assert found(system, "--key", "concert") == [scored]
    assert found(system, "--score", "<=-41", "--score", "<= -41.5") == [scored]
    assert found(system, "--score", "<-41.5") == []
    assert found(system, "--text", "QUARTET xylo*") == [scored]
    assert found(system, "--text", '"quartet xylophone"') == []
    [row] = system("tasks", "--key", "concert", "--json").lines
    assert (row["score"], row["scores"], row["key"]) == (-41.5, 1, "concert")
    assert row["output"]["text"] == "xylophone quartet" * 2
    came = row["submitted"]
    assert scored in found(system, "--since", came)
    assert scored not in found(system, "--until", came)
    assert found(system, "--since", "0s") == []
    assert found(system, "--after", str(int(scored) - 1), "--limit", "1") == [scored]
    assert "-41.5" in system("tasks", "--key", "concert").out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--state", "gone"], 1, "no state of a task"),
        (["--score", "good"], 1, "no condition"),
        (["--since", "whenever"], 2, "no time"),
        (["--program", "nobody"], 1, "no program nobody"),
        (["echo", "--program", "other"], 2, "one is due"),
    ],
)
def test_a_wrong_question_is_told(system: Shell, arguments: list[str], code: int, said: str) -> None:
    ran = system("tasks", *arguments)
    assert (ran.code, said in ran.err) == (code, True), ran


def test_a_view_is_dropped_and_made_again(system: Shell, scored: str) -> None:
    assert {row["view"]: row["state"] for row in system("views", "--json").lines} == {
        "costs": "follows", "tasks": "follows", "text": "follows", "snapshots": "follows", "due": "follows"
    }  # fmt: skip
    dropped = system("views", "drop", "text", "--json").lines
    assert [row["lag"] for row in dropped if row["view"] == "text"] == [None]
    refused = system("tasks", "--text", "xylophone")
    assert (refused.code, "dspex views rebuild text" in refused.err) == (1, True)
    assert found(system, "--key", "concert") == [scored], "the others are not concerned"
    assert system("views", "rebuild", "text").code == 0
    assert found(system, "--text", "xylophone") == [scored]
    assert system("views", "rebuild", "tasks").code == 0
    assert found(system, "--score", "<=-41") == [scored]
    assert "text" in system("views").out
    assert system("views", "drop", "nothing").code == 1
    assert system("views", "drop").code == 2


def test_any_aggregate_at_any_version_or_time(system: Shell, task: str) -> None:
    name = f"task.echo.{task}"
    assert [e["version"] for e in system("events", name, "--to", "1", "--json").lines] == [0, 1]
    assert [e["version"] for e in system("events", name, "--json").lines] == [0, 1, 2]
    assert [e["version"] for e in system("events", name, "--limit", "1", "--json").lines] == [2]
    states = [system("events", name, "--to", str(n), "--state", "--json").json for n in range(3)]
    assert [s["state"].get("status", "submitted") for s in states] == ["submitted", "running", "completed"]
    assert [s["version"] for s in states] == [0, 1, 2]
    assert system("events", task, "--state", "--json").json == states[2]
    assert system("events", name, "--at", states[1]["time"], "--state", "--json").json["version"] == 2
    came = states[0]["time"]
    assert system("events", name, "--at", came, "--state", "--json").json["version"] == 0
    assert "completed" in system("events", name, "--state").out
    program = system("events", "program.echo.0", "--state", "--json").json["state"]
    assert program["registrations"] == 1
    agent = json.loads(system("events", "--json").out.split("AgentStarted")[0].splitlines()[-1] + 'AgentStarted"}')
    started = system("events", agent["id"].rpartition("/")[0], "--state", "--json").json["state"]
    assert (started["status"], started["starts"]) == ("serving", 1)
    for wrong, code in (
        (["task.echo.99999999", "--state"], 1), ([name, "--to", "9", "--state"], 1), (["nothing.a.b", "--state"], 1),
        (["--to", "1"], 2), ([name, "--to", "1", "--at", "1h"], 2), ([name, "--at", "9999d", "--state"], 1),
    ):  # fmt: skip
        assert system("events", *wrong).code == code, wrong


def test_without_an_archive_the_log_is_read(tmp_path: Path) -> None:
    with System(Bare, data=tmp_path, durability="process", archive=False) as system:
        system.ask(items=["tea"])
        task = system.submit(items=["xylophone"])
        system.result(task)
        every = find_tasks("bare", url=system.url)
        assert [row.task for row in every][1:] == [task]
        assert every[0].input == {"items": ["tea"]}
        assert [row.task for row in find_tasks(text="xylophone", state="completed", url=system.url)] == [task]


# -- in a file


def test_a_file_is_searched_and_not_touched(tmp_path: Path) -> None:
    file = tmp_path / "log.db"
    shutil.copy(SHOP, file)
    before = file.read_bytes()
    file.chmod(0o400)
    tmp_path.chmod(0o500)
    try:
        every = ids(str(file))
        assert [row.task for row in find_tasks(log=file)] == every
        assert [row.task for row in find_tasks(text="sugar biscuits", log=file)] == every[-1:]
        assert find_tasks("shop", state="failed", log=file) == []
        ran = dspex("tasks", "--log", str(file), "--text", "biscuits", "--json")
        assert [json.loads(line)["task"] for line in ran.out.splitlines()] == every[-1:]
        state = dspex("events", every[0], "--to", "1", "--state", "--json", "--log", str(file))
        assert json.loads(state.out)["state"]["status"] == "running"
    finally:
        tmp_path.chmod(0o700)
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log.db"]


def test_an_archive_is_a_file_like_any_other(system: Shell, scored: str, tmp_path: Path) -> None:
    assert found(system, "--key", "concert") == [scored], "the archive has it now"
    with closing(sqlite3.connect(system.folder / ".dspex" / "archive.db")) as source:
        source.execute(f"VACUUM INTO '{tmp_path / 'copy.db'}'")
    [row] = find_tasks(key="concert", log=tmp_path / "copy.db")
    assert (row.task, row.score, row.output["text"]) == (scored, -41.5, "xylophone quartet" * 2)
    ran = dspex("events", scored, "--log", str(tmp_path / "copy.db"), "--json")
    assert [json.loads(line)["type"] for line in ran.out.splitlines()][:3] == [
        "TaskSubmitted", "TaskClaimed", "TaskCompleted"
    ]  # fmt: skip
    assert dspex("replay", scored, "--log", str(tmp_path / "copy.db"), "--json").code == 0


def test_pages_go_through_all_of_it(tmp_path: Path) -> None:
    from tests.store.histories import history

    from dspex.store.export import import_entries

    entries = history(5, 900)
    import_entries(tmp_path / "log.db", entries, epoch="e")
    every = [row.task for row in find_tasks(limit=0, log=tmp_path / "log.db")]
    assert every == [str(e.position) for e in entries if e.subject.startswith("dspex.task.")]
    assert [row.task for row in find_tasks(limit=500, log=tmp_path / "log.db")] == every[-500:]
    assert [row.task for row in find_tasks(limit=300, after=0, log=tmp_path / "log.db")] == every[:300]
