"""What the offline tests work on: a golden log, and its programs with a line changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.console.shells import Ran, environment

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
APP = str(GOLDEN / "programs.py")
SHOP, PATIENT, BARE = (str(GOLDEN / f"0.1-{name}.db") for name in ("shop", "patient", "bare"))


def dspex(*arguments: str, input: str | None = None, cwd: Path | None = None) -> Ran:
    """Run a command where there is no server and no settings."""
    done = subprocess.run(
        [sys.executable, "-m", "dspex", *arguments], capture_output=True, text=True, timeout=60, input=input, cwd=cwd,
        env=environment(NATS_URL="nats://127.0.0.1:1"),
    )  # fmt: skip
    return Ran(done.returncode, done.stdout, done.stderr)


def changed(folder: Path, old: str, new: str) -> str:
    """The golden programs with one place changed."""
    text = Path(APP).read_text()
    assert text.count(old) == 1, old
    path = folder / "changed.py"
    path.write_text(text.replace(old, new))
    return str(path)


def ids(log: str) -> list[str]:
    """The tasks in a file."""
    lines = dspex("tasks", "--log", log, "--json").out.splitlines()
    found: list[Any] = [json.loads(line)["task"] for line in lines]
    return found
