"""diff of tasks and of versions; export of a running system's tasks to a file that replays without it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.console.offline import SHOP, dspex, ids
from tests.console.shells import Shell


def test_two_tasks_event_by_event() -> None:
    one, other = ids(SHOP)
    ran = dspex("diff", one, other, "--log", SHOP, "--json")
    found = ran.json
    assert (ran.code, found["same"]) == (1, False)
    submitted = found["events"][0]
    assert submitted["changes"] == [
        {"path": "input.items[1]", "right": "milk"},
        {"path": "input.items[2]", "right": "sugar"},
        {"path": "input.items[3]", "right": "biscuits"},
    ]
    added = [row["right"]["place"] for row in found["events"] if row["left"] is None]
    assert sorted(added) == sorted(f"~{n}/shop.{name}#0" for name in ("look_up", "price") for n in range(3))
    assert "output.value.paid" in {change["path"] for change in found["state"]}


def test_it_fits_80_columns_and_names_both_sides() -> None:
    one, other = ids(SHOP)
    said = dspex("diff", one, other, "--log", SHOP).out
    assert max(map(len, said.splitlines())) <= 80
    assert f"{one} of shop" in said
    assert "> " in said
    assert "- (nothing)" in said
    assert "+ milk" in said


def test_two_versions_of_one_task() -> None:
    one = ids(SHOP)[0]
    found = dspex("diff", f"{one}@3", f"{one}@5", "--log", SHOP, "--json").json
    assert [row["right"]["version"] for row in found["events"] if row["left"] is None] == [4, 5]
    ran = dspex("diff", one, one, "--log", SHOP)
    assert (ran.code, "same" in ran.out) == (0, True)
    assert dspex("diff", one, f"{one}@99", "--log", SHOP).code == 2
    assert dspex("diff", one, f"{one}@x", "--log", SHOP).code == 2
    assert dspex("diff", one, "99", "--log", SHOP).code == 1


def test_times_are_compared_only_when_asked() -> None:
    one, other = ids(SHOP)
    paths = {
        flag: {change["path"] for row in dspex("diff", one, other, *flag, "--log", SHOP, "--json").json["events"]
               for change in row["changes"]}
        for flag in ((), ("--all",))
    }  # fmt: skip
    assert not paths[()] & {"time", "position", "seconds"}
    assert paths[("--all",)] > {"time", "position", "seconds"}


def test_an_exported_task_replays_without_the_system(system: Shell, tmp_path: Path) -> None:
    task = str(system("ask", "echo", "text=out").json["task"])
    assert system("score", task, "0.5").code == 0
    file = str(tmp_path / "out.db")
    ran = system("export", file, "--task", task, "--json")
    assert (ran.code, ran.json["file"]) == (0, file)
    live = system("events", task, "--json").lines
    assert dspex("events", task, "--log", file, "--json").lines == live
    assert {"TaskSubmitted", "TaskCompleted", "OutcomeReported"} <= {event["type"] for event in live}
    app = str(system.folder / "echo.py")
    assert dspex("replay", task, "--log", file, "--app", app, "--json").json["same"] is True
    assert [line["task"] for line in dspex("tasks", "--log", file, "--json").lines] == [task]


def test_an_export_by_program_an_export_again_and_what_cannot_be(system: Shell, tmp_path: Path) -> None:
    system("ask", "echo", "text=more")
    first, again = tmp_path / "a.db", tmp_path / "b.db"
    assert system("export", str(first), "--program", "echo").code == 0
    assert len(ids(str(first))) == len(system("tasks", "echo", "--json").lines)
    assert dspex("export", str(again), "--program", "echo", "--log", str(first)).code == 0
    assert _events(again) == _events(first)
    before = hashlib.sha256(first.read_bytes()).digest()
    taken = system("export", str(first))
    assert (taken.code, "there already" in taken.err) == (1, True)
    assert hashlib.sha256(first.read_bytes()).digest() == before
    assert system("export", str(tmp_path / "c.db"), "--task", "99999999").code == 1
    assert not (tmp_path / "c.db").exists()


def _events(file: Path) -> list[object]:
    return dspex("events", "--log", str(file), "--json").lines
