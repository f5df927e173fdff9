"""Programs that are stopped while something is under way, and note in a file (the book) what they noticed of it."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from dspex import Program, Retry, Schema, cancelled, effect, http, idempotency_key, time_left


def note(book: str, *words: object) -> None:
    with Path(book).open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


@effect
async def slow(book: str) -> str:
    note(book, "began", idempotency_key())
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        note(book, "cancelled", cancelled())
        raise
    return "done"


@effect
def plain(book: str) -> str:
    note(book, "began", idempotency_key(), time_left() < 60)
    until = time.monotonic() + 50
    while not cancelled() and time.monotonic() < until:
        time.sleep(0.01)
    note(book, "told", cancelled())
    return "done"


@effect(retry=Retry(attempts=2, backoff=1.6, factor=1, jitter=0))
async def flaky(book: str) -> str:
    note(book, "try", idempotency_key())
    raise ConnectionError("the line is down")


@effect(retry=Retry(attempts=3, backoff=100.0, jitter=0))
async def patient(book: str) -> str:
    note(book, "try")
    raise ConnectionError("the line is down")


class Wait(ConnectionError):
    retry_after = 2.0


@effect(retry=Retry(attempts=2, backoff=0.01, jitter=0))
async def busy(book: str) -> str:
    note(book, "try", time.time())
    if Path(book).read_text().count("try") < 2:  # noqa: ASYNC240 - a short file
        raise Wait("come again")
    return "served"


class _Input(Schema):
    book: str
    do: str = ""
    url: str = ""


class _Output(Schema):
    said: str


class Loop(Program):
    """Waits in the loop for what its input says."""

    timeout = 50.0
    concurrency = 2
    retry = Retry(attempts=5, backoff=100.0, jitter=0, on=(KeyError,))

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        match input.do:
            case "slow":
                await slow(input.book)
            case "plain":
                await plain(input.book)
            case "flaky":
                await flaky(input.book)
            case "patient":
                await patient(input.book)
            case "busy":
                await busy(input.book)
            case "http":
                await http("GET", input.url, timeout=45)
            case "sleep":
                await self.sleep(60)
            case "signal":
                await self.signal("go")
            case "nap":
                await asyncio.sleep(4)
            case "call":
                await self.call("thread", book=input.book, do="look")
            case "raise":
                raise KeyError(input.do)
            case "die":
                note(input.book, "life")
                if Path(input.book).read_text().count("life") > 3:  # noqa: ASYNC240 - a short file
                    await asyncio.sleep(40)
                await asyncio.sleep(0.2)
                os._exit(5)
        note(input.book, "after", input.do)
        return self.Output(said=input.do)


class Thread(Program):
    """Works in a thread."""

    timeout = 50.0

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    def predict(self, input: Input) -> Output:
        if input.do == "plain":
            plain(input.book)
        else:
            note(input.book, "began -")
            while not cancelled():
                time.sleep(0.01)
            note(input.book, "told", time_left() < 50)
        note(input.book, "after", input.do)
        return self.Output(said=input.do)
