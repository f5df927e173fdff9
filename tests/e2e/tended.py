"""Programs that need looking after, for `test_upkeep.py`."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from dspex import Program, Schema

held: list[bytes] = []


class _Input(Schema):
    do: str = "say"
    n: int = 0


class _Output(Schema):
    n: int
    pid: int


class Steady(Program):
    """Works, whatever becomes of the others."""

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        return self.Output(n=input.n, pid=os.getpid())


class Fragile(Steady):
    """Dies when it is started, as long as there is a file called `broken`."""

    def setup(self) -> None:
        if Path("broken").exists():
            os._exit(3)


class Greedy(Steady):
    """Takes memory and time."""

    timeout = 120.0

    async def predict(self, input: Steady.Input) -> Steady.Output:
        if input.do == "block":
            time.sleep(600)  # THE BLOCKING LINE
        if input.do == "allocate":
            held.append(bytes(input.n << 20))
        while input.do == "grow":
            held.append(b"x" * (1 << 20))
            await asyncio.sleep(0.005)
        return self.Output(n=input.n, pid=os.getpid())


class Left(Steady):
    """One of a pair."""


class Right(Steady):
    """The other one."""
