"""Workflows under a server that is killed all the time, in short: exact."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("log", ["jetstream", "sqlite"])
def test_every_sum_is_right_and_every_step_is_once_in_the_log(log: str) -> None:
    command = [sys.executable, "benchmarks/workflows.py", "--short", "--json", "--log", log]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["completed"], found["lost"], found["ended_twice"]) == (300, 0, 0)
    assert (found["wrong_sums"], found["wrong_steps"], found["recorded_twice"]) == (0, 0, 0)
    assert found["restarts"] > 0
