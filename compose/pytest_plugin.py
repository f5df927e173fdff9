"""A pytest plugin: recorded tasks as regression tests, in one line.

    @pytest.mark.dspex_replay(program=QABot, log="golden.db")
    def test_recorded_tasks_give_the_same(): ...

Every ended task of the program in the file is run again on its recorded effects before the test's own body; the test
fails with the first difference of each that differs. The fixture `dspex_replay(program, log)` does the same when it is
called, and returns the reports. Paths are relative to the test's file.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from dspex.core.program import Program
    from dspex.core.replay import Report

__all__ = ["dspex_replay"]

pytest.register_assert_rewrite("dspex.store.contract")  # the suite that a log's backend subclasses

SHOWN = 10
MARK = "dspex_replay(program, log): every recorded task of the program in this file replays the same"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARK)


@pytest.fixture
def dspex_replay(request: pytest.FixtureRequest) -> Callable[..., list[Report]]:
    """Call it with a program and a log file: it replays every ended task, and fails the test when one differs."""
    folder = request.path.parent
    return lambda program, log: _check(program, folder / log)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Before a marked test's own body."""
    for mark in pyfuncitem.iter_markers("dspex_replay"):
        if mark.args or set(mark.kwargs) != {"program", "log"}:
            pytest.fail("the marker is dspex_replay(program=…, log=…), both by name", pytrace=False)
        _check(mark.kwargs["program"], pyfuncitem.path.parent / mark.kwargs["log"])


def _check(program: type[Program], log: str | Path) -> list[Report]:
    __tracebackhide__ = True
    from dspex.compose.replays import Replay

    if not Path(log).is_file():
        pytest.fail(f"there is no log {log}", pytrace=False)
    ended = [one for one in Replay.every(program, log=log) if one.state.ended]
    reports = [one.report for one in ended]
    if not any(report.same is not None for report in reports):
        why = reports[0].why if reports else "none has ended"
        pytest.fail(f"{log} has no task of {program.name} that can be replayed: {why}", pytrace=False)
    differ = [report for report in reports if report.same is False]
    if differ:
        lines = [_line(report) for report in differ[:SHOWN]]
        if len(differ) > SHOWN:
            lines.append(f"  and {len(differ) - SHOWN} more")
        head = f"{len(differ)} of {len(reports)} recorded tasks of {program.name} differ:"
        pytest.fail("\n".join([head, *lines]), pytrace=False)
    return reports


def _line(report: Any) -> str:
    found = report.difference
    where = f" ({found.where})" if found.where else ""
    change = f"{found.expected!r} was recorded, {found.found!r} today"
    return f"  task {report.task}: {found.kind} at {found.place}: {change}{where}"
