"""Programs whose tasks wait until somebody opens a gate (a file), so that queues grow as a test wants them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from dspex import Program, Schema, effect


@effect
async def noted(text: str) -> str:
    return text


class _Input(Schema):
    gate: str = ""
    text: str = ""


class _Output(Schema):
    text: str


class Gated(Program):
    """Two at once; twenty may wait."""

    concurrency = 2
    max_queue = 20

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        while input.gate and not Path(input.gate).exists():  # noqa: ASYNC240 - a look that takes no time
            await asyncio.sleep(0.02)
        await noted("before")
        await self.sleep(0.01)
        return self.Output(text=await noted(input.text))


class Quick(Program):
    """Five hundred may wait."""

    max_queue = 500

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        return self.Output(text=input.text)


class Signalled(Program):
    """Waits for a word."""

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        return self.Output(text=await self.signal("go"))
