"""A program of five effects, each of which writes down outside of the log that it was performed."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from dspex import Program, Schema, effect, idempotency_key


@effect
async def step(book: str, task: int, value: int, seconds: float) -> int:
    with Path(book).open("a") as file:  # noqa: ASYNC230 - one short line: appended in one piece
        file.write(f"{task} {value} {idempotency_key()} {time.time()}\n")
    await asyncio.sleep(seconds)
    return (value * 31 + 7) % 1_000_003


class Five(Program):
    """Two steps, two at once, and one that depends on all."""

    attempts = 1000

    class Input(Schema):
        n: int
        book: str
        seconds: float = 0.05

    class Output(Schema):
        n: int
        value: int

    async def predict(self, input: Input) -> Output:
        book, n, seconds = input.book, input.n, input.seconds
        value = await step(book, n, n * 1000, seconds)
        value = await step(book, n, value, seconds)
        left, right = await asyncio.gather(
            self._branch(book, n, value + 1, seconds), self._branch(book, n, value + 2, seconds / 2)
        )
        return self.Output(n=n, value=await step(book, n, left * 3 + right, seconds))

    async def _branch(self, book: str, n: int, value: int, seconds: float) -> int:
        found: int = await step(book, n, value, seconds)
        return found
