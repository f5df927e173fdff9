"""The soak in short: while processes are killed and frozen, nothing is lost and nothing piles up.

`DSPEX_SOAK_MINUTES` says for how long, two by default; `make soak` is the long form.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MINUTES = float(os.environ.get("DSPEX_SOAK_MINUTES", "2"))


@pytest.mark.timeout(60 * MINUTES + 900)
def test_nothing_is_lost_and_nothing_piles_up() -> None:
    command = [sys.executable, "benchmarks/soak.py", "--short", "--json", "--minutes", str(MINUTES)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["wrong"], found["lost"], found["open"], found["ended_twice"]) == ([], 0, 0, 0)
    assert found["under_load"] > 0 and found["submitted"] >= found["acknowledged"]
    assert sum(found["faults"].values()) > 0
    witnesses = {"root", "supervisor", "agent 2"}
    assert all(found["processes"][role]["lives"] == 1 for role in witnesses)
