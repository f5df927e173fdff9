"""The program that the benchmarks serve: as small as a program can be, so that what is measured is dspex."""

from __future__ import annotations

import asyncio

from dspex import Program, Schema


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
