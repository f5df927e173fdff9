"""Programs that are slow, or not, as a test says. Launched as `crowd.py:Uneven` and so on."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from dspex import Program, Schema

PLACE = Path(os.environ.get("DSPEX_TEST_PLACE", "."))


class _Input(Schema):
    n: int = 0
    do: str = ""


class _Output(Schema):
    n: int
    pid: int


class Uneven(Program):
    """The agent that comes first is slow: what it takes goes on until the file `release` is there."""

    concurrency = 2
    timeout = 300.0

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    def setup(self) -> None:
        try:
            os.close(os.open(PLACE / "slow", os.O_CREAT | os.O_EXCL))
            self.slow = True
        except FileExistsError:
            self.slow = False

    async def predict(self, input: Input) -> Output:
        while self.slow and not (PLACE / "release").exists():
            await asyncio.sleep(0.01)
        return self.Output(n=input.n, pid=os.getpid())


class Blocking(Program):
    """May keep its event loop busy until the file `release` is there."""

    concurrency = 8
    timeout = 300.0

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        while input.do == "block" and not (PLACE / "release").exists():
            time.sleep(0.01)
        return self.Output(n=input.n, pid=os.getpid())


class Flood(Program):
    """Has more to do than it can."""

    concurrency = 4
    timeout = 300.0

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        await asyncio.sleep(0.02)
        return self.Output(n=input.n, pid=os.getpid())


class Calm(Program):
    """Has little to do."""

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        return self.Output(n=input.n, pid=os.getpid())
