"""A child that does not beat is called silent, and nothing worse: it may only be frozen."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dspex import Program, Schema, System
from dspex.agents.watch import Watch


class Quiet(Program):
    class Input(Schema):
        text: str = ""

    class Output(Schema):
        text: str

    async def predict(self, input: Input) -> Output:
        return self.Output(text=input.text)


def state_of(system: System, agent: str) -> Any:
    return next(process["state"] for process in system.processes() if process["agent"] == agent)


def wait_for(system: System, agent: str, state: str) -> None:
    for _ in range(300):
        if state_of(system, agent) == state:
            return
        time.sleep(0.1)
    raise AssertionError(f"{agent} is {state_of(system, agent)}, not {state}")


def test_a_frozen_agent_is_silent_and_serves_again_when_it_is_woken(tmp_path: Path) -> None:
    with System(Quiet, agents=2, data=tmp_path, durability="process") as system:
        frozen = next(process for process in system.processes() if process["program"])
        os.kill(frozen["pid"], signal.SIGSTOP)
        try:
            wait_for(system, frozen["agent"], "silent")
            assert system.result(system.submit(text="the other works")).text == "the other works"
        finally:
            os.kill(frozen["pid"], signal.SIGCONT)
        wait_for(system, frozen["agent"], "serving")
        assert next(p["pid"] for p in system.processes() if p["agent"] == frozen["agent"]) == frozen["pid"]


class Stumbling:
    """A worker whose table of runs cannot be read for a while."""

    agent = "a"

    def __init__(self) -> None:
        self.looks = 0
        self.seen = threading.Event()
        self.pulse = time.monotonic()

    @property
    def running(self) -> dict[int, Any]:
        self.looks += 1
        if self.looks < 3:
            raise RuntimeError("nobody expected this")
        self.seen.set()
        return {}


def test_what_nobody_expected_does_not_end_the_beats(caplog: pytest.LogCaptureFixture) -> None:
    worker: Any = Stumbling()
    watch = Watch(worker)
    watch.start()
    assert worker.seen.wait(10)
    watch.stop()
    assert [record.message for record in caplog.records] == ["the watch over a stumbled and goes on"]
