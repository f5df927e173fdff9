"""What the archive costs and how far it is behind: rows a second, lag at 5,000 events a second, and a system with and
without its archivist.

    python benchmarks/archive.py [--short]

Prints one JSON line a figure. Everything is measured in one run on one machine; the ratio is what travels.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import msgspec

from dspex import Program, Schema
from dspex.compose.caller import Caller
from dspex.compose.system import System
from dspex.core.ports import Entry
from dspex.store.archive import Archive
from dspex.store.chain import head_path
from dspex.store.verify import verify

RATE, EVENTS = 5000, 5
"""Events a second, and events in each commit."""


class Say(Program):
    """Says what it was told."""

    class Input(Schema):
        text: str

    class Output(Schema):
        text: str

    async def predict(self, input: Input) -> Output:
        return self.Output(text=input.text)


async def rows(folder: Path, count: int) -> None:
    """How many rows a second are written, 1,000 at a flush, and verified."""
    archive = await Archive.open(folder / "rows.db", epoch="bench")
    body = b"x" * 300
    entries = [
        Entry(position=n, time=1e9, subject=f"dspex.event.task.say.{n}", body=body, headers={})
        for n in range(1, count + 1)
    ]
    started = time.perf_counter()
    for start in range(0, count, 1000):
        await archive.add(entries[start : start + 1000])
    written = time.perf_counter() - started
    await archive.close()
    started = time.perf_counter()
    assert verify(folder / "rows.db").ok
    verified = time.perf_counter() - started
    show("rows", written_per_second=round(count / written), verified_per_second=round(count / verified))


async def lag(folder: Path, seconds: float) -> None:
    """How long what was stored waits for the archive, at 5,000 events a second in commits of 5."""
    async with (
        System(Say, data=folder / "lag", durability="process") as system,
        await Caller.connect(system.url) as caller,
    ):
        event = {"specversion": "1.0", "data": {"text": "x" * 100}, "type": "EffectRecorded"}
        body = msgspec.json.encode([event] * EVENTS)
        file = folder / "lag" / "archive.db"
        while not head_path(file).exists():  # noqa: ASYNC110  (another process makes it)
            await asyncio.sleep(0.1)
        archive = await Archive.open(file, readonly=True)
        sent: list[tuple[int, float]] = []
        lags: list[float] = []
        done = False

        async def watch() -> None:
            seen = 0
            while not done or seen < len(sent):
                top = await archive.head()
                now = time.perf_counter()
                while seen < len(sent) and sent[seen][0] <= top:
                    lags.append(now - sent[seen][1])
                    seen += 1
                await asyncio.sleep(0.005)

        watching = asyncio.create_task(watch())
        started = time.perf_counter()
        every = EVENTS / RATE
        number = 0
        while (now := time.perf_counter()) - started < seconds:
            acks = []
            while number * every <= now - started:
                acks.append(caller.client.call(f"dspex.event.bench.say.{number % 1000}", body))
                number += 1
            sent += [(json.loads((await ack).data)["seq"], time.perf_counter()) for ack in acks]
            await asyncio.sleep(0.005)
        done = True
        took = time.perf_counter() - started
        await watching
        await archive.close()
    lags.sort()
    show(
        "lag", events_per_second=round(number * EVENTS / took), p50=round(lags[len(lags) // 2], 3),
        p99=round(lags[len(lags) * 99 // 100], 3), max=round(lags[-1], 3),
    )  # fmt: skip


async def load(caller: Caller, rate: float | None, seconds: float) -> tuple[float, float]:
    """Tasks a second that were asked for and answered, and the median of their times; as many as go when `rate` is
    None."""
    times: list[float] = []
    ended = time.perf_counter() + seconds

    async def one() -> None:
        started = time.perf_counter()
        await caller.ask("say", b'{"text":"a"}')
        times.append(time.perf_counter() - started)

    async def worker() -> None:
        while time.perf_counter() < ended:
            await one()

    started = time.perf_counter()
    if rate is None:
        await asyncio.gather(*(worker() for _ in range(64)))
    else:
        pending: set[asyncio.Task[None]] = set()
        number = 0
        while (now := time.perf_counter()) < ended:
            while number / rate <= now - started:
                task = asyncio.create_task(one())
                pending.add(task)
                task.add_done_callback(pending.discard)
                number += 1
            await asyncio.sleep(0.005)
        if pending:
            await asyncio.wait(pending)
    return len(times) / (time.perf_counter() - started), statistics.median(times)


async def caught_up(caller: Caller) -> None:
    """Wait until the archive has what the log has, twice in a row."""
    for _ in range(2):
        while True:
            await asyncio.sleep(1.5)
            data = [answer.get("data") or {} for answer in await caller.gather()]
            if any(one.get("role") == "archivist" and one["leads"] and one["lag"] < 50 for one in data):
                break


async def cost(folder: Path, seconds: float, rounds: int) -> None:
    """Asks a second, and how long one takes, with the archivist at work and with it frozen, in turn."""
    async with (
        System(Say, data=folder / "cost", durability="process") as system,
        await Caller.connect(system.url) as caller,
    ):
        await load(caller, None, 1.0)
        found: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
        paced: dict[str, list[tuple[float, float]]] = {"with": [], "without": []}
        pid = 0
        for number in range(2 * rounds):
            which = "with" if number % 2 else "without"
            if which == "with":  # what waited while it was frozen is not this round's work
                os.kill(pid, signal.SIGCONT)
                await caught_up(caller)
            else:
                pid = next(p["pid"] for p in await caller.processes() if p.get("role") == "archivist")
                os.kill(pid, signal.SIGSTOP)
            found[which].append(await load(caller, None, seconds))
            paced[which].append(await load(caller, 500, seconds))
    full = {which: statistics.median(rate for rate, _ in results) for which, results in found.items()}
    slow = {which: statistics.median(middle for _, middle in results) for which, results in paced.items()}
    show("cost flat out", asks_per_second_with=round(full["with"]), without=round(full["without"]),
         ratio=round(full["with"] / full["without"], 3))  # fmt: skip
    show("cost at 500 asks/s", median_ms_with=round(slow["with"] * 1e3, 2), without=round(slow["without"] * 1e3, 2),
         ratio=round(slow["with"] / slow["without"], 3))  # fmt: skip


def show(figure: str, **values: float) -> None:
    print(json.dumps({"figure": figure, **values}), flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="about half a minute")
    short = parser.parse_args().short
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        await rows(folder, 50_000 if short else 500_000)
        await lag(folder, 5 if short else 30)
        await cost(folder, 2 if short else 8, 2 if short else 5)


if __name__ == "__main__":
    asyncio.run(main())
