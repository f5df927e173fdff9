"""A program in a file of its own whose code changes, and clients that never stop."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.e2e.plain import WRONG, Plain

CODE = '''
import asyncio, os
from pathlib import Path
from dspex import Program, Schema

class Echo(Program):
    """Says it again, and which version says so."""
    concurrency = 4
    timeout = 120.0

    class Input(Schema):
        n: int
        seconds: float = 0.0
        until: str = ""

    class Output(Schema):
        n: int
        version: int
        pid: int

    async def predict(self, input: Input) -> Output:
        await asyncio.sleep(input.seconds)
        while input.until and not Path(input.until).exists():
            await asyncio.sleep(0.02)
        return self.Output(n=input.n, version={version}, pid=os.getpid())
{more}
'''


def write(file: Path, version: int, more: str = "", **changes: str) -> Path:
    """The program at a version, in place of what was there, whole or not at all."""
    text = CODE.replace("{version}", str(version)).replace("{more}", more)
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    stamp = time.time_ns() + version * 10**6
    os.utime(fresh, ns=(stamp, stamp))
    fresh.replace(file)
    return file


async def soon(condition: Callable[[], object], what: str = "it did not happen") -> None:
    """Wait until it is so, while others go on: the server drops a client whose loop stands still for seconds."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)


@dataclass
class Crowd:
    """Submits and asks without pause while it is open."""

    plain: Plain
    tasks: list[int] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    _stop: bool = False
    _working: list[asyncio.Task[None]] = field(default_factory=list)

    async def __aenter__(self) -> Crowd:
        self._working = [asyncio.create_task(self._submit()), *(asyncio.create_task(self._ask()) for _ in range(1))]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._stop = True
        await asyncio.gather(*self._working)

    async def more(self, count: int = 50) -> None:
        """Wait until so many more have been submitted and asked."""
        submitted, asked = len(self.tasks) + count, len(self.versions) + count
        async with asyncio.timeout(300):
            while len(self.tasks) < submitted or len(self.versions) < asked:
                assert all(not it.done() for it in self._working), self._working
                await asyncio.sleep(0.02)

    async def _submit(self) -> None:
        while not self._stop:
            try:
                self.tasks.append(await self.plain.submit("echo", {"n": len(self.tasks), "seconds": 0.01}))
            except WRONG as error:  # it may have been stored: the log tells
                self.refused.append(f"submit: {error!r}")
            await asyncio.sleep(0.02)

    async def _ask(self) -> None:
        while not self._stop:
            since = time.strftime("%H:%M:%S")
            try:
                reply = await self.plain.ask("echo", {"n": 0}, timeout=60)
                if reply.code:
                    self.refused.append(f"ask: {reply.code} {reply.body!r}")
                else:
                    self.versions.append(reply.json["version"])
            except WRONG as error:
                self.refused.append(f"ask: {error!r} since {since}, {len(self.versions)} before")
            await asyncio.sleep(0.02)
