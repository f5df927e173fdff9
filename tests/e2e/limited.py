"""Programs for the tests of limits: quick ones, ones that say to a counter outside when they begin and end, and ones
that cost something."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from dspex import BudgetExhausted, Program, Schema, effect, spend


class Quick(Program):
    """Does nothing."""

    class Input(Schema):
        n: int = 0

    class Output(Schema):
        n: int

    async def predict(self, input: Input) -> Output:
        return self.Output(n=input.n)


class Counted(Program):
    """Tells a counter at `port` that it begins, and that it ends by hanging up; with a `nap` it sleeps before."""

    concurrency = 16

    class Input(Schema):
        port: int
        seconds: float = 0.05
        nap: float = 0.0

    class Output(Schema):
        done: bool = True

    async def predict(self, input: Input) -> Output:
        if input.nap:
            await self.sleep(input.nap)
        _, writer = await asyncio.open_connection("127.0.0.1", input.port)
        try:
            writer.write(b"%d\n" % os.getpid())
            await writer.drain()
            await asyncio.sleep(input.seconds)
        finally:
            writer.close()
        return self.Output()


@effect(usd=0.02, tokens=100, model="small")
async def pay(line: str, seconds: float, usd: float | None) -> str:
    with Path(line).open("a") as file:  # noqa: ASYNC230  (a line in a file is what the test counts)
        file.write("paid\n")
    await asyncio.sleep(seconds)
    if usd is not None:
        spend(usd=usd, tokens=10, model="small")
    return "paid"


class Costly(Program):
    """Pays so many times, and says how often it could."""

    class Input(Schema):
        line: str
        times: int = 1
        seconds: float = 0.0
        usd: float | None = None
        catch: bool = False

    class Output(Schema):
        paid: int

    async def predict(self, input: Input) -> Output:
        paid = 0
        for _ in range(input.times):
            try:
                await pay(input.line, input.seconds, input.usd)
            except BudgetExhausted:
                if not input.catch:
                    raise
                break
            paid += 1
        return self.Output(paid=paid)


class Delegates(Program):
    """Has another program pay."""

    class Input(Schema):
        line: str

    class Output(Schema):
        paid: int

    async def predict(self, input: Input) -> Output:
        return self.Output(paid=(await self.call("costly", line=input.line))["paid"])
