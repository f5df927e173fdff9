"""Programs with effects, whose book (a file named in the input) is written by nobody but the effects."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

from dspex import Program, ProgramFailed, Schema, effect, idempotency_key
from dspex.core.retry import Retry


def note(book: str, *words: object) -> None:
    with Path(book).open("a") as file:
        file.write(" ".join(map(str, words)) + "\n")


@effect
async def step(book: str, n: int, task: str, seconds: float = 0.0) -> int:
    note(book, task, n, idempotency_key())
    await asyncio.sleep(seconds)
    return n + 1


@effect
def plain_step(book: str, n: int, task: str, seconds: float = 0.0) -> int:
    note(book, task, n, idempotency_key())
    time.sleep(seconds)
    return n + 1


@effect
async def broken(book: str, task: str, times: int) -> str:
    note(book, task, "broken", idempotency_key())
    if Path(book).read_text().count(f"{task} broken") <= times:  # noqa: ASYNC240 - a short file
        raise ConnectionError("the line is down")
    return "up"


@effect
async def large(size: int) -> str:
    return "x" * size


class _Input(Schema):
    task: str
    book: str
    do: str = ""
    seconds: float = 0.0


class _Output(Schema):
    total: int = 0
    said: str = ""
    at: float = 0.0


class Steps(Program):
    """Five effects: two, then two at once, then one; the numbers that come out depend on all of them."""

    attempts = 1000

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        book, task, seconds = input.book, input.task, input.seconds
        at = self.now()
        total = await step(book, 0, task, seconds)
        total = await step(book, total, task, seconds)
        one, other = await asyncio.gather(
            self._branch(book, total + 1, task, seconds), self._branch(book, total + 2, task, seconds / 2)
        )
        total = await plain_step(book, one + other, task, seconds)
        return self.Output(total=total, said=str(self.random().random() >= 0), at=at)

    async def _branch(self, book: str, n: int, task: str, seconds: float) -> int:
        found: int = await step(book, n, task, seconds)
        return found


class Threaded(Program):
    """The same in a thread."""

    attempts = 1000

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    def predict(self, input: Input) -> Output:
        total = 0
        for _ in range(4):
            total = plain_step(input.book, total, input.task, input.seconds)
        if input.do == "sleep":
            self.sleep(input.seconds or 2)
        said = str(self.signal("go")) if input.do == "signal" else ""
        return self.Output(total=step(input.book, total, input.task), said=said)


class Waits(Program):
    """Waits for what it is told."""

    concurrency = 4

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        await step(input.book, 0, input.task)
        said = str(await self._wait(input.do, input.seconds))
        await step(input.book, 1, input.task)
        return self.Output(said=said, at=self.now())

    async def _wait(self, do: str, seconds: float) -> object:
        match do:
            case "sleep":
                return await self.sleep(seconds)
            case "often":
                for _ in range(4):
                    await self.sleep(seconds)
            case "signal":
                return await self.signal("go")
            case "twice":
                return [await self.signal("go"), await self.signal("go")]
            case "both":
                return sorted(await asyncio.gather(self.signal("go"), self.signal("go")))
            case "beside":
                return (await asyncio.gather(self.sleep(seconds), self.signal("go")))[1]
            case "short beside":
                started = time.time()
                await asyncio.gather(self._late(started), self.signal("go"))
            case "swallow":
                try:
                    return await self.signal("go")
                except asyncio.CancelledError:
                    return "swallowed"
                finally:
                    self.now()
            case "timeout":
                try:
                    return await self.signal("go", timeout=seconds)
                except TimeoutError:
                    return "nobody came"
        return do

    async def _late(self, started: float) -> None:
        """Comes to its wait only after the other branch waits for long."""
        await asyncio.sleep(0.1)
        await self.sleep(0.5)
        await self.signal("other")


class Again(Program):
    """Fails as often as it is told."""

    retry = Retry(attempts=3, backoff=0.1, jitter=0)

    class Input(_Input):
        times: int = 0

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        await step(input.book, 0, input.task)
        said = await broken(input.book, input.task, input.times)
        return self.Output(said=said)


class Anew(Again):
    """The same from a clean start."""

    retry = Retry(attempts=3, backoff=0.1, jitter=0, clean=True)


class Calls(Program):
    """Asks another program."""

    class Input(_Input):
        pass

    class Output(_Output):
        pass

    async def predict(self, input: Input) -> Output:
        if input.do == "large":
            return self.Output(total=len(await large(64 << 20)))
        if input.do == "many":
            return self.Output(total=sum(map(len, await asyncio.gather(*(large(900_000) for _ in range(20))))))
        try:
            reply = await self.call("steps", task=input.task, book=input.book, do=input.do, seconds=input.seconds)
        except ProgramFailed as error:
            return self.Output(said=f"{type(error).__name__}")
        return self.Output(total=reply["total"], said=str(os.getpid() > 0))
