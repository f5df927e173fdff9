"""Programs that do what their input tells them, to try what can go wrong. Launched as `programs.py:Work`."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from typing import Any

from dspex import InvalidInput, NotFound, Probability, Program, ProgramFailed, Schema, Secret, effect, variable

LETTERS = "x" * 1024


class _Input(Schema):
    do: str = "say"
    text: str = ""
    seconds: float = 0.0


class _Output(Schema):
    text: str
    pid: int


def _act(do: str, text: str) -> Any:
    """What every program here can do without waiting."""
    match do:
        case "raise":
            raise ValueError(f"the secret is {text}")
        case "surrogate":
            raise ValueError("half of a pair: \udc80")
        case "refuse":
            raise InvalidInput("the text is not one of mine")
        case "missing":
            raise NotFound("there is no such page")
        case "fail":
            raise ProgramFailed("the model is not in the mood", type="Mood")
        case "shout":
            raise ProgramFailed(text * 10_000)
        case "cancel":
            raise asyncio.CancelledError
        case "stop":
            raise StopIteration
        case "leave":
            sys.exit(3)
        case "exit":
            os._exit(3)
        case "nothing":
            return None
        case "wrong":
            return {"text": 5, "pid": "x"}
        case "other":
            return 7
        case "large":
            return {"text": LETTERS * (70 << 10), "pid": 0}  # 63 MiB are allowed
    return {"text": text, "pid": os.getpid()}


class Work(Program):
    """Does what it is told, on the event loop."""

    timeout = 2.0

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        if input.do == "block":
            until = time.monotonic() + 60
            while time.monotonic() < until:
                pass
        while input.do == "stubborn":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                continue
        await asyncio.sleep(60 if input.do == "never" else input.seconds)
        return self.check_output(_act(input.do, input.text))


class Long(Work):
    """The same, and has the time."""

    timeout = 60.0


class Thread(Program):
    """Does what it is told, in a thread."""

    timeout = 2.0
    concurrency = 3

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    def predict(self, input: Input) -> Output:
        if input.do == "never":
            threading.Event().wait()
        time.sleep(input.seconds)
        return self.check_output(_act(input.do, input.text))


class Nap(Program):
    """Says it again after a nap; may be tried often."""

    timeout = 60.0
    attempts = 100

    class Input(Schema):
        n: int
        seconds: float = 0.02

    class Output(Schema):
        n: int
        pid: int

    async def predict(self, input: Input) -> Output:
        await asyncio.sleep(input.seconds)
        return self.Output(n=input.n, pid=os.getpid())


class Strict(Program):
    """Has an input with one of each kind of rule."""

    class Input(Schema):
        question: str
        count: int = 1
        chance: Probability = variable(0.5)
        tags: list[str] = []
        any: object = None

    class Output(Schema):
        answer: str
        chance: Probability

    async def predict(self, input: Input) -> Output:
        return self.Output(answer=input.question * input.count, chance=input.chance)


class Changed(Program):
    """Has the name of Strict and another schema."""

    name = "strict"

    class Input(Schema):
        question: str
        language: str = "en"

    class Output(Schema):
        answer: str

    async def predict(self, input: Input) -> Output:
        return self.Output(answer=f"{input.language}: {input.question}")


@effect(private=True)
def confide(text: str) -> str:
    return text


class Confides(Program):
    """Has an effect whose record is to be sealed."""

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        return self.Output(text=await confide(input.text), pid=os.getpid())


class Holds(Program):
    """Takes a secret."""

    class Input(Schema):
        token: Secret

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        return self.Output(text="kept", pid=os.getpid())
