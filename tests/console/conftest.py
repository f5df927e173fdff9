"""A folder to run commands in, and a real system for them to talk to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.console.shells import PROGRAM, Shell, stop


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    (tmp_path / "echo.py").write_text(PROGRAM)
    return Shell(tmp_path)


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A folder in which `dspex up echo.py --agents 2` runs."""
    folder = tmp_path_factory.mktemp("system")
    (folder / "echo.py").write_text(PROGRAM)
    shell = Shell(folder)
    process = shell.start("up", "echo.py", "--agents", "2", "--durability", "process", "--json")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    assert json.loads(line)["ready"] is True
    yield shell
    stop(process)


@pytest.fixture
def task(system: Shell) -> str:
    """A task that has completed."""
    return str(system("ask", "echo", "text=ab").json["task"])
