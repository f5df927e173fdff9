"""A system on a cluster that loses members and links, in short: the checker of the campaigns finds nothing broken."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAULTS = "cluster-stream-leader+cluster-minority+cluster-resets"


@pytest.mark.slow  # three servers and their elections take minutes: pytest -m slow tests/e2e/test_cluster.py
@pytest.mark.timeout(900)
def test_no_promise_is_broken_while_a_cluster_loses_its_leader_and_its_links() -> None:
    command = [
        sys.executable, "-m", "benchmarks.chaos", "--faults", FAULTS, "--tasks", "200", "--rate", "25",
        "--every", "0.5:2", "--agents", "2", "--clients", "3", "--seed", "3", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["lost"], found["completed_twice"], found["recorded_repeated"]) == (0, 0, 0)
    assert found["violations"] == [] and found["acknowledged"] >= 200
    assert sum(found["faults"].values()) > 0
