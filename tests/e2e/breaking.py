"""Programs whose effects do as a file says (`up`, `down`, `hang`), and write down that they were called."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import ClassVar

from dspex import Breaker, BreakerOpen, Program, Retry, Schema, effect

QUOTA = 2


def mode(folder: str) -> str:
    return (Path(folder) / "mode").read_text()


def note(folder: str, *words: object) -> None:
    with (Path(folder) / "book").open("a") as book:
        book.write(" ".join(map(str, words)) + "\n")


def breaker(timeout: float) -> Breaker:
    return Breaker(
        failure_rate=0.5, window="10m", min_calls=10, open_for=1, half_open=QUOTA, timeout=timeout, counts=[OSError]
    )


async def _pay(folder: str, task: str) -> str:
    note(folder, "pay", task, os.getpid())
    while mode(folder) == "hang":
        await asyncio.sleep(0.02)
    if mode(folder) == "down":
        raise ConnectionError("the bank is down")
    return "paid"


@effect(breaker=breaker(60.0))
async def pay(folder: str, task: str) -> str:
    return await _pay(folder, task)


@effect(breaker=breaker(1.0))
async def brief(folder: str, task: str) -> str:
    """The same, so short that lost permits are soon back."""
    return await _pay(folder, task)


@effect(breaker=Breaker(timeout="200ms", min_calls=1000))
def plain(folder: str, task: str, seconds: float) -> str:
    note(folder, "plain", task, os.getpid())
    time.sleep(seconds)
    return "done"


@effect(breaker=Breaker(timeout="200ms", min_calls=1000))
async def patient(folder: str, task: str, seconds: float) -> str:
    try:
        await asyncio.sleep(seconds)
    finally:
        note(folder, "cancelled", task, os.getpid())
    return "done"


class _Input(Schema):
    folder: str
    task: str = ""
    do: str = "pay"
    seconds: float = 60.0


class _Output(Schema):
    said: str
    pid: int


class Pay(Program):
    """Says how its effect went; three at once in an agent, so that twelve are three in each of four."""

    concurrency = 3
    timeout = 60.0

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        try:
            match input.do:
                case "plain":
                    said = await plain(input.folder, input.task, input.seconds)
                case "patient":
                    said = await patient(input.folder, input.task, input.seconds)
                case "brief":
                    said = await brief(input.folder, input.task)
                case _:
                    said = await pay(input.folder, input.task)
        except BreakerOpen as refused:
            said = f"open: {refused}"
        except ConnectionError as error:
            said = f"down: {error}"
        except TimeoutError as error:
            said = f"late: {error}"
        return self.Output(said=said, pid=0 if input.do == "anywhere" else os.getpid())


class Insistent(Pay):
    """Lets a refusal end the run, and is tried again."""

    retry: ClassVar[Retry | None] = Retry(attempts=20, backoff=0.05, factor=1, jitter=0)

    async def predict(self, input: Pay.Input) -> Pay.Output:
        return self.Output(said=await pay(input.folder, input.task), pid=os.getpid())


class Hasty(Insistent):
    """The same without a second try."""

    retry = None


class Caller(Program):
    """Calls another program behind a breaker."""

    breakers = {"hasty": Breaker(min_calls=2, open_for=3600)}

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        try:
            answer = await self.call("hasty", folder=input.folder, task=input.task)
        except BreakerOpen as refused:
            answer = {"said": f"open: {refused}"}
        except Exception as error:
            answer = {"said": f"{type(error).__name__}: {error}"}
        return self.Output(said=answer["said"], pid=os.getpid())
