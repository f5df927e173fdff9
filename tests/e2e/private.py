"""Programs with private fields, and with large values. The words that must not be found anywhere begin with SECRET."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

from dspex import Private, Program, ProgramFailed, Schema, Secret, effect


def note(book: str, word: str) -> None:
    with Path(book).open("a") as file:
        file.write(f"{word}\n")


@effect
async def look_up(ssn: str, book: str, seconds: float) -> str:
    note(book, "look_up")
    await asyncio.sleep(seconds)
    return f"SECRET-record-of-{ssn}"


@effect
async def judge(record: str, book: str, seconds: float) -> int:
    note(book, "judge")
    await asyncio.sleep(seconds)
    return len(record)


class Vetting(Program):
    """Looks somebody up."""

    class Input(Schema):
        name: str
        ssn: Private[str]
        book: str
        do: str = ""
        seconds: float = 0.0

    class Output(Schema):
        verdict: Private[str]
        size: int

    async def predict(self, input: Input) -> Output:
        record = await look_up(input.ssn, input.book, input.seconds)
        size = await judge(record, input.book, input.seconds)
        if input.do == "raise":
            raise ValueError(f"cannot bear {record}")
        if input.do == "say":
            raise ProgramFailed(f"no to {record}")
        if input.do == "wait":
            record += str(await self.signal("word", timeout=60))
        if input.do == "large":
            record += "SECRET-large" * 100_000
        return self.Output(verdict=f"{record} of {input.name}", size=size)


class Clerk(Program):
    """Not private itself; asks one that is, and has one effect that is."""

    class Input(Schema):
        book: str

    class Output(Schema):
        size: int

    async def predict(self, input: Input) -> Output:
        found = await hide("SECRET-argument")
        reply = await self.call("vetting", name="Eve", ssn=found, book=input.book)
        return self.Output(size=len(reply["verdict"]))


@effect(private=True)
async def hide(text: str) -> str:
    return f"SECRET-hidden-{text}"


class Lender(Program):
    """Takes a reference to a secret."""

    class Input(Schema):
        token: Secret

    class Output(Schema):
        ok: bool

    async def predict(self, input: Input) -> Output:
        return self.Output(ok=True)


@effect
async def grow(size: int, seed: int) -> str:
    return random.Random(seed).randbytes(size // 2).hex()


class Large(Program):
    """Gives an output of so many bytes, from an effect of so many."""

    class Input(Schema):
        output: int = 0
        effect: int = 0

    class Output(Schema):
        text: str
        size: int

    async def predict(self, input: Input) -> Output:
        grown = await grow(input.effect, 7) if input.effect else ""
        return self.Output(text=random.Random(8).randbytes(input.output // 2).hex(), size=len(grown))


@effect
async def grow_slowly() -> str:
    """Two MiB that begin with the pid, so that a second run would give another."""
    return f"{os.getpid():09}".ljust(2 << 20, "x")


@effect
async def linger(pid: int) -> int:
    """Waits in the process that grew it, and only there."""
    await asyncio.sleep(30 if os.getpid() == pid else 0)
    return os.getpid()


class Slow(Program):
    """A large effect, then a long one."""

    class Input(Schema):
        pass

    class Output(Schema):
        size: int
        grown: int

    async def predict(self, input: Input) -> Output:
        grown = await grow_slowly()
        pid = int(grown[:9])
        after = await linger(pid)
        return self.Output(size=len(grown), grown=int(after != pid))
