"""--break and --pdb: Python's debugger in the user's own frames, with the real values."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.console.offline import APP, BARE, SHOP, changed, dspex, ids


@pytest.fixture(scope="module")
def task() -> str:
    return ids(SHOP)[1]


@pytest.mark.parametrize("place", ["look_up", "~1/shop.look_up#0"])
def test_an_effect_stops_the_line_that_asks_for_it(task: str, place: str) -> None:
    script = "p item\np self.discount + 1\nn\np letters\nc\nc\nc\n"
    ran = dspex("replay", task, "--log", SHOP, "--app", APP, "--break", place, input=script)
    assert ran.code == 0
    assert "programs.py" in ran.out
    assert "-> letters = await look_up(item)" in ran.out
    assert ("'milk'" if place == "look_up" else "'sugar'") in ran.out
    assert "(Pdb) 6" in ran.out
    assert ("['i', 'k', 'l', 'm']" if place == "look_up" else "['a', 'g', 'r', 's', 'u']") in ran.out
    assert "same: run again" in ran.out


def test_a_line_stops_the_run_there(task: str) -> None:
    lines = Path(APP).read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if line.lstrip().startswith("paid ="))
    place = f"{APP}:{number}"
    ran = dspex("replay", task, "--log", SHOP, "--app", APP, "--break", place, input="p total\np rest\nc\n")
    assert (ran.code, "-> paid = total" in ran.out, "11300" in ran.out) == (0, True, True)
    assert "[1600, 2500, 6400]" in ran.out


def test_a_plain_program_stops_in_its_thread() -> None:
    plain = SHOP.replace("shop", "plain")
    number = _line("return Result(value=[cents")
    for place, line in (("look_up", "look_up(input.items[0])"), (f"{APP}:{number}", "cents")):
        ran = dspex("replay", ids(plain)[0], "--log", plain, "--app", APP, "--break", place, input="p cents\nc\n")
        assert (ran.code, line in ran.out, "(Pdb) 300" in ran.out) == (0, True, True)
        assert "same: run again" in ran.out


def _line(start: str) -> int:
    lines = Path(APP).read_text().splitlines()
    return next(n for n, line in enumerate(lines, 1) if line.lstrip().startswith(start))


def test_quitting_is_no_error(task: str) -> None:
    ran = dspex("replay", task, "--log", SHOP, "--app", APP, "--break", "price", input="q\n")
    assert (ran.code, ran.out.splitlines()[-1], ran.err) == (0, "(Pdb) quit", "")


def test_a_place_that_is_not_reached_is_said(task: str) -> None:
    ran = dspex("replay", task, "--log", SHOP, "--app", APP, "--break", "nothing")
    assert (ran.code, "did not come to nothing" in ran.err) == (0, True)
    ran = dspex("replay", task, "--log", SHOP, "--app", APP, "--break", "nowhere.py:3")
    assert (ran.code, "no file nowhere.py" in ran.err) == (2, True)
    ran = dspex("replay", task, "--log", SHOP, "--app", APP, "--break", f"{APP}:99999")
    assert (ran.code, "99999" in ran.err, ran.err.count("\n")) == (2, True, 1)
    ran = dspex("replay", task, "--log", SHOP, "--app", APP, "--break", "price", "--json")
    assert ran.code == 2


def test_pdb_stops_at_the_first_difference(task: str, tmp_path: Path) -> None:
    app = changed(tmp_path, 'price("bb", count=2)', 'price("bb", count=3)')
    ran = dspex("replay", task, "--log", SHOP, "--app", app, "--pdb", input="p first\np rest\nq\n")
    assert ran.code == 1
    assert 'price("bb", count=3))' in ran.out
    assert "{'item': 'tea', 'cents': 300}" in ran.out
    assert "[1600, 2500, 6400]" in ran.out


def test_pdb_stops_where_the_code_raises(tmp_path: Path) -> None:
    app = changed(tmp_path, 'if input.items == ["bad"]:', 'if input.items == ["tea"]:')
    ran = dspex("replay", ids(BARE)[0], "--log", BARE, "--app", app, "--pdb", input="p input.items\nq\n")
    assert (ran.code, '-> raise ValueError("bad")' in ran.out, "['tea']" in ran.out) == (1, True, True)


def test_pdb_says_when_there_is_no_line_to_stop_in(task: str) -> None:
    ran = dspex("replay", task, "--log", SHOP, "--app", APP, "--pdb")
    assert (ran.code, "nothing was raised" in ran.out) == (0, True)
