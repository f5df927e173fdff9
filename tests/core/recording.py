"""A run in this process whose events are kept, as an agent would have written them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Any

import msgspec

from dspex.core import effects
from dspex.core.effects import Call, Performing, failed, outcome_of, recorded
from dspex.core.events import EffectRecorded, Event, Payload, TaskClaimed, TaskCompleted, TaskFailed, TaskSubmitted
from dspex.core.program import Program


class Recording:
    """A `Runtime` that performs everything and waits for nothing. `stop` is a name at which the run goes to sleep."""

    def __init__(self, task: str, signals: dict[str, Any], stop: str | None) -> None:
        self._task, self._signals, self._stop = task, signals, stop
        self._loop = asyncio.get_running_loop()
        self.records: list[EffectRecorded] = []

    async def perform(self, call: Call) -> Any:
        self._check(call.name)
        try:
            with Performing("7/0", call.key):
                record = recorded(call, await call.act(), 0.01)
        except Exception as error:
            record = failed(call, error, 0.01)
        self.records.append(record)
        return outcome_of(call, record)

    def perform_in_thread(self, call: Call) -> Any:
        return asyncio.run_coroutine_threadsafe(self.perform(call), self._loop).result()

    def perform_now(self, call: Call, act: Callable[[], Any]) -> Any:
        self.records.append(recorded(call, act(), 0.0))
        return outcome_of(call, self.records[-1])

    async def sleep(self, key: str, seconds: float) -> None:
        self._check("sleep")
        self.records.append(EffectRecorded(key=key, name="sleep", digest="", seconds=seconds))

    async def signal(self, key: str, name: str, timeout: float | None) -> Any:
        self._check(f"signal.{name}")
        value = self._signals[name]
        body = msgspec.Raw(msgspec.json.encode(value))
        self.records.append(EffectRecorded(key=key, name=f"signal.{name}", digest="", result=body))
        return value

    def wait_in_thread(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def seed(self, key: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._task}/0/{key}".encode()).digest()[:8], "big")

    def _check(self, name: str) -> None:
        if name == self._stop:
            raise Asleep


class Asleep(BaseException):
    """The run stops here."""


def record(
    program: Program, task: str = "7", *, signals: dict[str, Any] | None = None, stop: str | None = None, **fields: Any
) -> list[Event]:
    """Run a program and give the task's events."""

    async def work() -> list[Event]:
        asyncio.get_running_loop().set_task_factory(effects.branching)
        runtime = Recording(task, signals or {}, stop)
        ended: list[Payload] = []

        async def run() -> None:
            effects.begin(effects.Scope(program.name, lambda: runtime))
            taken = program.Input(**fields)
            if program.is_async:
                value = await program.predict(taken)
            else:
                value = await asyncio.to_thread(program.predict, taken)
            ended.append(TaskCompleted(output=msgspec.Raw(program.check_output(value).encode()), seconds=0.1))

        try:
            await asyncio.Task(run())
        except Asleep:
            pass
        except Exception as error:
            ended.append(TaskFailed(code=500, type=type(error).__name__, message="it raised"))
        claim = TaskClaimed(attempt=1, agent="a", assignment=program.assignment.hash)
        return history(program, task, fields, [claim, *runtime.records, *ended])

    return asyncio.run(work())


def history(program: Program, task: str, fields: dict[str, Any], payloads: list[Payload]) -> list[Event]:
    """A task's events: its submission and what came then."""
    body = msgspec.Raw(msgspec.json.encode(fields))
    everything: list[Payload] = [TaskSubmitted(program=program.name, input=body), *payloads]
    now = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
    return [
        Event(
            aggregate=f"task.{program.name}.{task}", version=number, time=now, source="test", correlation=task,
            causation=task, data=data, position=int(task) + number,
        )
        for number, data in enumerate(everything)
    ]  # fmt: skip
