"""The log as a debugger, in figures: reading and folding it, opening one task of many, and what the archive costs.

    python benchmarks/log_figures.py [--short] [--only read,open,lag,cost,replay]

Everything is measured in one run on one machine, beside the raw way to do the same; the ratios are what travels. Prints
one JSON line a figure. CPU seconds are of the processes themselves, so other work on the machine does not count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from pathlib import Path

import uvloop
from programs import Echo
from run import preload

from dspex import System
from dspex.bus.client import Client
from dspex.bus.server import Server
from dspex.bus.streams import jetstream_api
from dspex.compose.caller import Caller

TICKS = os.sysconf("SC_CLK_TCK")


def show(figure: str, **values: object) -> None:
    print(json.dumps({"figure": figure, **values}), flush=True)


def cpu_seconds(pid: int) -> float:
    """Seconds of a core that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


# -- what the archive costs


async def drained(count: int, *, archive: bool) -> dict[str, float]:
    """One agent drains a queue of `count` tasks as fast as it can: tasks a second, and seconds of a core for 1,000
    tasks by each process, until the archive has it all."""
    with tempfile.TemporaryDirectory() as folder:
        async with System(Echo, data=folder, durability="process", archive=False):
            pass  # registers the program, so that its doors are open without agents
        server = Server(Path(folder) / "server")
        server.start()
        await preload(server.url, "dspex.task.echo", count)
        server.stop()
        async with System(Echo, data=folder, durability="process", archive=archive) as system:
            async with await Caller.connect(system.url) as caller:
                return await _drain(caller, count)


async def _drain(caller: Caller, count: int) -> dict[str, float]:
    processes = await caller.processes()
    pids = {p.get("role") or "agent": p["pid"] for p in processes}
    times = await _completions(caller.client, count)
    found = {"per_second": count / times}
    if "archivist" in pids:
        while not await _archived(caller):
            await asyncio.sleep(0.2)
    for role in ("agent", "server", "archivist"):
        if role in pids:
            found[role] = cpu_seconds(pids[role]) * 1000 / count
    return found


async def _completions(client: Client, count: int) -> float:
    """Seconds from the first completion to the last, by the times that the log stored them."""
    from dspex.core.subjects import Subjects
    from dspex.store.jetstream import JetStreamLog

    while (await jetstream_api(client, "STREAM.INFO.DSPEX"))["state"]["num_subjects"] < count:
        await asyncio.sleep(0.2)
    log = JetStreamLog(client, Subjects(), "bench")
    head = await log.head()
    first = await log.scan(count, 1, "dspex.event.task.echo.*")
    last = [entry for entry in await log.scan(head - 50, 50) if entry.subject.startswith("dspex.event.task")]
    return last[-1].time - first[0].time


async def _archived(caller: Caller) -> bool:
    data = [answer.get("data") or {} for answer in await caller.gather()]
    return any(one.get("role") == "archivist" and one["leads"] and one["lag"] < 20 for one in data)


def cost(count: int, rounds: int) -> None:
    """With and without the archivist, in turn."""
    found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
    for _ in range(rounds):
        for archive in (False, True):
            found[archive].append(uvloop.run(drained(count, archive=archive)))
    middle = {
        archive: {name: statistics.median(one[name] for one in results) for name in results[0]}
        for archive, results in found.items()
    }
    ratios = [a["per_second"] / b["per_second"] for a, b in zip(found[True], found[False], strict=True)]
    show(
        "cost of archiving, an agent that drains flat out",
        tasks_per_second_with=round(middle[True]["per_second"]), without=round(middle[False]["per_second"]),
        ratio=round(statistics.median(ratios), 3), ratios=[round(ratio, 3) for ratio in ratios],
        cpu_seconds_per_1000_tasks={
            which: {name: round(middle[archive][name], 4) for name in middle[archive] if name != "per_second"}
            for which, archive in (("with", True), ("without", False))
        },
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="the same in about a minute")
    parser.add_argument("--only", default="", help="some of: read, open, lag, cost, replay")
    options = parser.parse_args()
    wanted = set(options.only.split(",")) - {""}
    if not wanted or "cost" in wanted:
        cost(*((10_000, 3) if options.short else (60_000, 5)))


if __name__ == "__main__":
    main()
