"""Thousands of clients that ask at once, in short: each is served or refused, none hangs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("nap", ["0", "0.5"])
def test_each_is_served_or_refused_and_none_hangs(nap: str) -> None:
    command = [sys.executable, "benchmarks/clients.py", "--short", "--json", "--nap", nap]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout)
    for each in found["rounds"]:
        assert set(each) <= {"served", "429"}
        assert sum(kind["clients"] for kind in each.values()) == found["clients"]
        assert each["served"]["clients"] > 0
