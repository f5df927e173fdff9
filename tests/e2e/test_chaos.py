"""The fault campaign in short: whoever is killed, no promise of durable execution is broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("log", ["jetstream", "sqlite"])
def test_no_promise_is_broken_while_everything_is_killed_in_turn(log: str) -> None:
    command = [sys.executable, "benchmarks/chaos.py", "--short", "--json", "--log", log]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert (found["tasks"], found["effects"]) == (200, 1000)
    assert set(found["kills"]) == {"agent", "supervisor", "registrar", "archivist", "server"}
    assert found["archived"] > 1000
