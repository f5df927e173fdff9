"""The program that the benchmarks serve: as small as a program can be, so that what is measured is dspex."""

from __future__ import annotations

import asyncio
import os

from dspex import Program, Schema, effect


class Echo(Program):
    """Give back what came."""

    class Input(Schema):
        text: str
        number: int = 0

    class Output(Schema):
        text: str

    async def predict(self, input: Input) -> Output:
        return self.Output(text=input.text)


class Nap(Echo):
    """Give back what came, after a while."""

    name = "nap"

    async def predict(self, input: Echo.Input) -> Echo.Output:
        await asyncio.sleep(2.0)
        return self.Output(text=input.text)


@effect
async def step(n: int, value: int) -> int:
    """One step of a workflow: a little waiting, a little to record."""
    await asyncio.sleep(0.002)
    return (value * 31 + n) % 1_000_003


class Steady(Program):
    """Two effects, and now and then a short sleep in the log: what a soak is made of."""

    attempts = 1000

    class Input(Schema):
        n: int
        text: str = ""
        naps: bool = False

    class Output(Schema):
        n: int
        value: int

    async def predict(self, input: Input) -> Output:
        value = await step(input.n, 0)
        if input.naps:
            await self.sleep(2.0)
        return self.Output(n=input.n, value=await step(input.n, value))


class Asked(Echo):
    """Give back what came, after as long as the environment says."""

    name = "asked"

    async def predict(self, input: Echo.Input) -> Echo.Output:
        if seconds := float(os.environ.get("ASKED_NAP", "0")):
            await asyncio.sleep(seconds)
        return self.Output(text=input.text)


@effect
async def workflow_step(n: int, place: int) -> int:
    await asyncio.sleep(0.01)
    return (n * 31 + place * 7) % 1_000_003


class Workflow(Program):
    """Adds up what its steps give; some sleep in the log in between, some wait for a number from outside."""

    attempts = 1000

    class Input(Schema):
        n: int
        steps: int
        sleeps: bool = False
        waits: bool = False

    class Output(Schema):
        n: int
        sum: int

    async def predict(self, input: Input) -> Output:
        total = 0
        for place in range(input.steps):
            total += await workflow_step(input.n, place)
            if place == 0 and input.sleeps:
                await self.sleep(2.0)
            if place == 1 and input.waits:
                total += int(await self.signal("add"))
        return self.Output(n=input.n, sum=total)
