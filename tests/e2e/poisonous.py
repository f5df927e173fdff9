"""A program most of whose tasks are good, and some end their process in one of several ways."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal

from dspex import Program, Schema


class Careful(Program):
    """Says its number again after a while, unless it is told to end the process."""

    timeout = 60.0
    attempts = 1

    class Input(Schema):
        n: int
        do: str = ""
        seconds: float = 0.05

    class Output(Schema):
        n: int

    async def predict(self, input: Input) -> Output:
        await asyncio.sleep(input.seconds)
        match input.do:
            case "exit":
                os._exit(3)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                ctypes.string_at(0)
            case "sleep":
                await self.sleep(2)
                os._exit(4)
        return self.Output(n=input.n)


class Steady(Careful):
    """The same, with as many deaths as programs have unless they say otherwise."""

    attempts = 3

    class Input(Careful.Input):
        pass

    class Output(Careful.Output):
        pass
