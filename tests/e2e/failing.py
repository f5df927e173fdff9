"""Programs that fail until something outside has changed: a file that says so, or what their input says."""

from __future__ import annotations

import os
from pathlib import Path

from dspex import Private, Program, ProgramFailed, Retry, Schema, effect, idempotency_key, variable


def note(book: str, *words: object) -> None:
    with Path(book).open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


def cured(book: str) -> bool:
    return Path(f"{book}.antidote").exists()


@effect
async def paid(book: str, n: int) -> int:
    note(book, "paid", n, idempotency_key())
    return n + 1


@effect
async def deadly(book: str) -> str:
    """Under way when its process dies, as long as there is no antidote."""
    note(book, "deadly", idempotency_key())
    if not cured(book):
        os._exit(9)
    return "cured"


@effect
async def down(book: str) -> str:
    note(book, "down", idempotency_key())
    if not cured(book):
        raise ConnectionError("the line is down")
    return "up"


class Letter(Program):
    """Pays once, and then dies or fails for as long as it is told."""

    attempts = 1
    retry = Retry(attempts=1, backoff=0.1, jitter=0, on=(ConnectionError,))
    style = variable("plain", choices=["plain", "full"])

    class Input(Schema):
        book: str
        do: str = "die"

    class Output(Schema):
        said: str
        style: str

    async def predict(self, input: Input) -> Output:
        await paid(input.book, 0)
        if input.do == "die":
            said = await deadly(input.book)
        elif input.do == "raise":
            raise ProgramFailed("it is not to be")
        else:
            said = await down(input.book) if input.do == "down" else input.do
        return self.Output(said=said, style=self.style)


class Sealed(Program):
    """The same with an input that nobody may read."""

    attempts = 1

    class Input(Schema):
        name: Private[str]
        book: str

    class Output(Schema):
        said: str

    async def predict(self, input: Input) -> Output:
        return self.Output(said=f"{input.name} {await deadly(input.book)}")
