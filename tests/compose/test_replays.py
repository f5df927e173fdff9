"""Replay, diff and the pytest plugin, as a user's Python sees them."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tests.console.offline import APP, SHOP, changed
from tests.console.shells import environment
from tests.golden.programs import Bare, Shop

from dspex import InvalidInput, LogError, NotFound, Replay, adiff, diff


def test_a_task_its_report_its_events_and_its_states() -> None:
    one = Replay.every(Shop, log=SHOP)[0]
    again = Replay.of(one.task, Shop, log=SHOP)
    assert again.report.same
    assert again.report is again.report
    assert again.events[0].type == "TaskSubmitted"
    assert [again.state_at(n).status for n in (0, 1)] == ["submitted", "running"]
    assert again.state.status == "completed"
    assert "same=True" in repr(again)
    with pytest.raises(InvalidInput, match="versions 0 to"):
        again.state_at(99)


def test_another_value_makes_a_difference() -> None:
    one = Replay.every(Shop, log=SHOP)[0]
    report = Replay.of(one.task, Shop, log=SHOP, values={"discount": 50}).report
    assert report.difference is not None
    assert report.difference.place == "output.value.paid"


async def test_the_async_twins_and_the_plain_ones_inside_of_a_loop() -> None:
    one, other = await Replay.aevery(Shop, log=SHOP)
    assert (await one.areport()).same
    assert (await Replay.aof(one.task, Shop, log=SHOP)).task == one.task
    rows = await adiff(one.task, other.task, log=SHOP)
    assert diff(one.task, other.task, log=SHOP) == rows  # a notebook has a loop, too
    assert not all(row.same for row in rows)
    assert Replay.of(one.task, Shop, log=SHOP).report.same


def test_mistakes_are_errors_that_say_so(tmp_path: Path) -> None:
    one = Replay.every(Shop, log=SHOP)[0]
    with pytest.raises(InvalidInput, match="is one of shop"):
        Replay.of(one.task, Bare, log=SHOP)
    with pytest.raises(NotFound, match="no task 99"):
        Replay.of(99, Shop, log=SHOP)
    with pytest.raises(LogError, match="no log"):
        Replay.of(1, Shop, log=tmp_path / "none.db")
    with pytest.raises(InvalidInput, match="no version"):
        diff(f"{one.task}@x", one.task, log=SHOP)


def run(folder: Path, app: str, body: str) -> subprocess.CompletedProcess[str]:
    """pytest in a folder of its own, with the plugin as an installed package has it."""
    (folder / "shop_app.py").write_text(Path(app).read_text())
    (folder / "test_it.py").write_text(f"import pytest\nfrom shop_app import Bare, Shop\n{body}")
    known = any(point.value == "dspex.compose.pytest_plugin" for point in entry_points(group="pytest11"))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--strict-markers",
         *([] if known else ["-p", "dspex.compose.pytest_plugin"]), "test_it.py"],
        cwd=folder, capture_output=True, text=True, timeout=60,
        env=environment(PYTHONPATH=f"{environment()['PYTHONPATH']}:{folder}"),
    )  # fmt: skip


MARKED = f"@pytest.mark.dspex_replay(program=Shop, log={SHOP!r})\ndef test_shop(): pass\n"
FIXTURE = f"def test_shop(dspex_replay):\n    assert len(dspex_replay(Shop, {SHOP!r})) == 2\n"


@pytest.mark.parametrize("body", [MARKED, FIXTURE], ids=["marker", "fixture"])
def test_one_line_is_a_regression_test(tmp_path: Path, body: str) -> None:
    good = run(tmp_path, APP, body)
    assert (good.returncode, "1 passed" in good.stdout) == (0, True), good.stdout
    bad = run(tmp_path, changed(tmp_path, 'price("bb", count=2)', 'price("bb", count=3)'), body)
    assert (bad.returncode, "1 failed" in bad.stdout) == (1, True), bad.stdout
    assert "2 of 2 recorded tasks of shop differ" in bad.stdout
    assert "arguments at shop.price#2" in bad.stdout


def test_a_log_without_such_tasks_fails_instead_of_passing(tmp_path: Path) -> None:
    for log in (SHOP, "none.db"):
        ran = run(tmp_path, APP, f"@pytest.mark.dspex_replay(program=Bare, log={log!r})\ndef test_bare(): pass\n")
        assert ran.returncode == 1, ran.stdout
