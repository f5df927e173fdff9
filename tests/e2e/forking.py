"""A program whose tasks are forked. Its book (a file named in the input) is written by nobody but the effects."""

from __future__ import annotations

import asyncio
from pathlib import Path

from dspex import Program, Schema, effect, idempotency_key, variable


@effect
async def visit(book: str, place: str, city: str, seconds: float = 0.0) -> str:
    with Path(book).open("a") as file:  # noqa: ASYNC230 - one short line
        file.write(f"{place} {idempotency_key()}\n")
    await asyncio.sleep(seconds)
    return f"{place} in {city}"


class Trip(Program):
    """Two places one after the other, two at once, then as many nights as it is told."""

    attempts = 1000

    class Input(Schema):
        book: str
        city: str = "Rome"
        seconds: float = 0.0
        wait: str = ""

    class Output(Schema):
        trail: list[str]
        drawn: list[float]
        began: float

    nights = variable(2, low=1, high=9)

    async def predict(self, input: Input) -> Output:
        book, city, seconds = input.book, input.city, input.seconds
        began, drawn = self.now(), [self.random().random()]
        trail = [await visit(book, "gate", city, seconds), await visit(book, "bridge", "any", seconds)]
        if input.wait == "sleep":
            await self.sleep(3)
        elif input.wait:
            trail.append(str(await self.signal(input.wait)))
        trail += await asyncio.gather(*(visit(book, f"side{n}", city, seconds) for n in range(2)))
        drawn.append(self.random().random())
        for night in range(self.nights):
            trail.append(await visit(book, f"night{night}", city, seconds))
        return self.Output(trail=trail, drawn=drawn, began=began)
