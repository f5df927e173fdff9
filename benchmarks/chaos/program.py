"""The program that a campaign runs: each effect is told to a counter outside before it counts as performed."""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from dspex import Program, ProgramFailed, Schema, effect, idempotency_key, spend

COUNTER = os.environ.get("DSPEX_CHAOS_COUNTER", "")
_attempt: ContextVar[tuple[str, float]] = ContextVar("attempt", default=("", 0.0))


async def count(value: int) -> None:
    """Tell the counter that this effect is performed, and return when it has written that down."""
    attempt, began = _attempt.get()
    agent = Path("/proc/self/comm").read_text().strip()  # noqa: ASYNC240 - no file of any disk
    line = {"key": idempotency_key(), "value": str(value), "agent": agent, "attempt": attempt, "began": began}
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(COUNTER)
        except OSError:
            await asyncio.sleep(0.05)  # its queue of connections is full for a moment
            continue
        try:
            writer.write(json.dumps(line).encode() + b"\n")
            if await reader.readline() == b"ok\n":
                return
        finally:
            writer.close()


@effect
async def step(value: int, seconds: float) -> int:
    await count(value)
    await asyncio.sleep(seconds)
    return (value * 31 + 7) % 1_000_003


@effect(usd=0.01)
async def pay(value: int, seconds: float) -> int:
    """A step that costs, so that budgets are lent and settled while processes die."""
    await count(value)
    spend(usd=0.004)
    await asyncio.sleep(seconds)
    return (value * 31 + 7) % 1_000_003


class Chaos(Program):
    """Does what the kind of its input says; the clock that is monotonic is not shifted when the other is."""

    attempts = 1000
    drain_time = 5.0  # somebody hostile names code that nobody has

    class Input(Schema):
        n: int
        kind: Literal["quick", "steps", "nap", "signal", "hold", "late", "fail", "long"]
        seconds: float = 0.0

    class Output(Schema):
        n: int
        value: int

    async def predict(self, input: Input) -> Output:
        _attempt.set((uuid.uuid4().hex, time.monotonic()))
        n, seconds = input.n, input.seconds
        match input.kind:
            case "quick":
                value = n * 7
            case "steps":
                value = await self._steps(n, seconds)
            case "nap":
                value = await step(n, 0.0)
                await self.sleep(seconds)
                value = await step(value, 0.0)
            case "long":
                for _ in range(n):
                    value = int(self.now())
            case "fail":
                raise ProgramFailed("this task is made to fail")
            case _:  # signal, hold, late
                value = await self.signal("go")
                value = await step(value, 0.0)
        return self.Output(n=n, value=value)

    async def _steps(self, n: int, seconds: float) -> int:
        value = await step(n * 1000, seconds)
        value = await step(value, seconds)
        left, right = await asyncio.gather(self._branch(value + 1, seconds), self._branch(value + 2, seconds / 2))
        return int(await pay(left * 3 + right, seconds))

    async def _branch(self, value: int, seconds: float) -> int:
        return int(await step(value, seconds))
