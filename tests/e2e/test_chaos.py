"""The fault campaign in short: whatever is done to a system under load, no promise of it is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("log", ["jetstream", "sqlite"])
def test_no_promise_is_broken_whatever_happens(log: str) -> None:
    command = [sys.executable, "-m", "benchmarks.chaos", "--short", "--json", "--log", log]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["acknowledged"] >= 300
    assert (found["lost"], found["completed_twice"], found["recorded_repeated"], found["violations"]) == (0, 0, 0, [])
    assert len(found["faults"]) >= 8
