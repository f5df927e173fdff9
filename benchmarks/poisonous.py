"""The program of `poison.py`: most of its tasks are good, and some end their process."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal

from dspex import Program, Schema


class Careful(Program):
    """Says its number again after a while, unless it is told to end the process."""

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
        return self.Output(n=input.n)
