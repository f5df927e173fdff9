"""What new code changes, and when the author's files ask for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from dspex.compose.plans import About, Plan
from dspex.compose.reloading import LOOK, Change, Reload, Watcher, compared
from dspex.core.errors import Conflict, InvalidInput
from dspex.core.program import Program
from dspex.core.schema import Schema


class Given(Program):
    """Was given as a class."""

    class Input(Schema):
        n: int

    class Output(Schema):
        n: int

    async def predict(self, input: Input) -> Output:
        return self.Output(n=input.n)


def about(name: str, fingerprint: str = "f", **fields: Any) -> About:
    schema = {"properties": {field: {"type": kind} for field, kind in fields.items()}}
    return About(name, "", fingerprint, "code", schema, {}, 1, 1.0, [])


def test_programs_change_come_and_are_gone() -> None:
    old = {name: about(name) for name in ("a", "b")}
    new = {name: replace(about(name), code="new") for name in ("a", "b", "c")}
    assert compared(old, new, [], replace=False) == Change(["a", "b"], ["c"], [])
    assert compared(old, new, ["b"], replace=False) == Change(["b"], [], []), "one that was named, and nothing else"


def test_a_program_that_is_gone_is_refused_unless_that_is_meant() -> None:
    old, new = {"a": about("a"), "b": about("b")}, {"a": about("a")}
    with pytest.raises(Conflict, match="no program b, whose tasks would wait for ever"):
        compared(old, new, [], replace=False)
    assert compared(old, new, [], replace=True) == Change(["a"], [], ["b"])


def test_other_schemas_are_refused_with_the_first_difference_unless_that_is_meant() -> None:
    old, new = {"a": about("a", "f", n="integer")}, {"a": about("a", "g", n="string")}
    with pytest.raises(Conflict, match="input field n has changed"):
        compared(old, new, [], replace=False)
    assert compared(old, new, [], replace=True).changed == ["a"]


def test_under_access_rules_no_program_comes_in_by_a_reload() -> None:
    with pytest.raises(Conflict, match="one more program, b"):
        compared({"a": about("a")}, {"a": about("a"), "b": about("b")}, [], replace=True, may_grow=False)


def test_what_was_given_as_a_class_has_no_file() -> None:
    with pytest.raises(InvalidInput, match="given was given as a class, not as a file"):
        Reload().apps([Plan(program=Given)])


def test_each_file_is_loaded_once() -> None:
    reload = Reload()
    reload.apps([Plan("a.py"), Plan("a.py"), Plan("b.py", name="x")])
    assert reload.wanted == [("a.py", ""), ("b.py", "x")]


def test_a_change_is_said_once_and_when_it_is_at_rest(tmp_path: Path) -> None:
    file, watcher, now = tmp_path / "a.py", Watcher(), 10.0
    file.write_text("1")

    def look() -> bool:
        nonlocal now
        now += LOOK
        return watcher.changed(now, [str(file)])

    assert [look() for _ in range(3)] == [False] * 3
    file.write_text("22")
    assert [look() for _ in range(4)] == [False, True, False, False]
    for size in range(3, 6):  # somebody is still writing
        file.write_text("x" * size)
        assert not look()
    assert [look() for _ in range(3)] == [True, False, False]
    file.unlink()
    assert [look() for _ in range(3)] == [False, True, False]
    assert not watcher.changed(now + LOOK / 2, [str(file)]), "it does not look all the time"


def test_files_that_come_into_play_later_are_no_change(tmp_path: Path) -> None:
    one, other, watcher = tmp_path / "a.py", tmp_path / "b.py", Watcher()
    one.write_text("1")
    other.write_text("1")
    assert not watcher.changed(10.0, [str(one)])
    assert not any(watcher.changed(now, [str(one), str(other)]) for now in (11.0, 12.0, 13.0))
    other.write_text("22")
    assert [watcher.changed(now, [str(one), str(other)]) for now in (14.0, 15.0)] == [False, True]


def test_after_a_failure_a_file_that_was_missing_may_come(tmp_path: Path) -> None:
    file, watcher = tmp_path / "a.py", Watcher()
    file.write_text("import part")
    assert not watcher.changed(10.0, [str(file)])
    watcher.failed()
    assert not watcher.changed(11.0, [str(file)])
    os.utime(tmp_path, ns=(1, 1))
    assert [watcher.changed(now, [str(file)]) for now in (12.0, 13.0)] == [False, True]
