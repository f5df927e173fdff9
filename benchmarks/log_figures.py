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
import random
import sqlite3
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any, Self

import nats
import uvloop
from archive import lag
from msgspec import Raw
from nats.js.api import AckPolicy, ConsumerConfig
from programs import Echo
from run import BODY, preload

from dspex import Program, Replay, Schema, System, afind_tasks, effect
from dspex.bus.client import Client
from dspex.bus.server import Server
from dspex.bus.streams import ensure_log, jetstream_api
from dspex.compose.caller import Caller
from dspex.compose.story import BusSource, FileSource, Source, story_of
from dspex.core.aggregates import FOLDS
from dspex.core.codec import encode_commit, events_of, rfc3339
from dspex.core.events import EffectRecorded, Event, TaskClaimed, TaskCompleted
from dspex.core.headers import EXPECTED
from dspex.core.subjects import Subjects
from dspex.core.task import TaskState
from dspex.store.archive import Archive
from dspex.store.jetstream import JetStreamLog

TICKS = os.sysconf("SC_CLK_TCK")
SUBJECTS = Subjects()
FIRST = {EXPECTED: "0"}


@effect
async def price(number: int) -> dict[str, Any]:
    return {"price": 12.5, "text": "a result of the usual length"}


class Say(Program):
    """Asks for five prices and says what it was told."""

    class Input(Schema):
        text: str
        number: int = 0

    class Output(Schema):
        text: str
        number: int

    async def predict(self, input: Input) -> Output:
        for number in range(5):
            await price(number)
        return self.Output(text=input.text, number=input.number)


def show(figure: str, **values: object) -> None:
    print(json.dumps({"figure": figure, **values}), flush=True)


def cpu_seconds(pid: int) -> float:
    """Seconds of a core that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


# -- a log of tasks


def commit_of(task: int, effects: int) -> bytes:
    """The one commit of a task that ended well."""
    now = rfc3339(time.time())
    claimed = TaskClaimed(
        attempt=1, agent="say-ce93-2", assignment="d601ee2a12d9eaa0f12e677b0dcb6ddd", code="1df1ca11d461"
    )
    record = Raw(b'{"price":12.5,"text":"a result of the usual length"}')
    performed = [
        EffectRecorded(key=f"say.price#{number}", name="price", digest="abcdef0123456789", result=record, seconds=0.01)
        for number in range(effects)
    ]
    completed = TaskCompleted(output=Raw(BODY), seconds=0.00058)
    return encode_commit(
        [
            Event(f"task.say.{task}", version, now, "/agents/say-ce93-2", str(task), str(task), data)
            for version, data in enumerate([claimed, *performed, completed], 1)
        ]
    )


async def fill(client: Client, tasks: int, effects: int, each: int = 500) -> int:
    """Tasks in the stream, each two messages: its submission and its commit; one outcome for every tenth. Returns how
    many events that are."""
    outcomes = 0
    for start in range(0, tasks, each):
        sent = [client.call("dspex.task.say", BODY) for _ in range(min(each, tasks - start))]
        ids = [json.loads((await ack).data)["seq"] for ack in sent]
        sent = [client.call(f"dspex.event.task.say.{id}", commit_of(id, effects), headers=FIRST) for id in ids]
        sent += [client.call("dspex.outcome.say", b'{"task":%d,"score":0.75}' % id) for id in ids[::10]]
        outcomes += len(ids[::10])
        for ack in sent:
            assert b"error" not in (await ack).data
    return tasks * (effects + 3) + outcomes


class Filled:
    """A server with a log of tasks, and an archive of it."""

    def __init__(self, folder: Path, tasks: int, effects: int) -> None:
        self.folder, self.tasks, self.effects = folder, tasks, effects
        self.server = Server(folder / "server")

    async def __aenter__(self) -> Self:
        self.server.start()
        self.client = await Client.connect(self.server.url)
        self.log = JetStreamLog(self.client, SUBJECTS, await ensure_log(self.client, SUBJECTS, ["say"]))
        self.events = await fill(self.client, self.tasks, self.effects)
        self.archive = await Archive.open(self.folder / "archive.db", epoch=self.log.epoch)
        while entries := await self.log.scan(self.archive.position, 10_000):
            await self.archive.add(entries)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.archive.close()
        await self.client.close()
        self.server.stop()


class Clock:
    """Seconds by the clock, and seconds of a core that this process used."""

    def __enter__(self) -> Self:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self._began[0], time.process_time() - self._began[1]


# -- reading and folding


async def folded(log: Any) -> dict[str, Any]:
    """Every aggregate of a log, rebuilt: read, decoded, folded."""
    states: dict[str, Any] = {}
    after = 0
    while entries := await log.scan(after, 10_000):
        after = entries[-1].position
        for entry in entries:
            events = events_of(entry, SUBJECTS)
            name = events[0].aggregate
            fold = FOLDS.get(name.partition(".")[0])
            if fold is not None:
                states[name] = fold(events, states.get(name))
    return states


def raw_rows(file: Path) -> int:
    """The same rows with sqlite3 alone."""
    with closing(sqlite3.connect(file)) as connection:
        cursor = connection.execute("SELECT position, time, subject, headers, body FROM log ORDER BY position")
        count = 0
        while rows := cursor.fetchmany(1000):
            count += len(rows)
    return count


async def raw_fetch(url: str, count: int) -> None:
    """The same messages with nats-py alone, in batches."""
    client = await nats.connect(url)
    subscription = await client.jetstream().pull_subscribe(
        "", stream="DSPEX", config=ConsumerConfig(ack_policy=AckPolicy.NONE)
    )
    while count > 0:
        count -= len(await subscription.fetch(1000, timeout=5))
    await client.close()


async def read(tasks: int, effects: int, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        async with Filled(Path(name), tasks, effects) as filled:
            entries = await filled.archive.head()
            found: dict[str, list[Clock]] = {"sqlite": [], "raw sqlite3": [], "jetstream": [], "raw nats-py": []}
            for _ in range(rounds):
                for which, log in (("sqlite", filled.archive), ("jetstream", filled.log)):
                    with Clock() as clock:
                        states = await folded(log)
                    assert sum(state.ended for state in states.values() if isinstance(state, TaskState)) == tasks
                    found[which].append(clock)
                with Clock() as clock:
                    assert raw_rows(filled.archive.file) == entries
                found["raw sqlite3"].append(clock)
                with Clock() as clock:
                    await raw_fetch(filled.server.url, entries)
                found["raw nats-py"].append(clock)
            for which, raw in (("sqlite", "raw sqlite3"), ("jetstream", "raw nats-py")):
                rate = [filled.events / clock.seconds for clock in found[which]]
                show(
                    f"read, decode and fold from {which}", events_per_task=effects + 3, events=filled.events,
                    entries=entries, events_per_second=round(statistics.median(rate)),
                    events_per_cpu_second=round(statistics.median(filled.events / c.cpu for c in found[which])),
                    entries_per_second=round(statistics.median(entries / c.seconds for c in found[which])),
                    raw_entries_per_second=round(statistics.median(entries / c.seconds for c in found[raw])),
                    ratio_to_raw=round(_ratio(found[raw], found[which]), 2),
                )  # fmt: skip


def _ratio(raw: list[Clock], ours: list[Clock]) -> float:
    return statistics.median(r.seconds / c.seconds for r, c in zip(raw, ours, strict=True))


# -- opening a task


async def opening(tasks: int, effects: int, samples: int) -> None:
    """From nothing but an id to all that is known of a task, in a log of many."""
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        async with System(Say, data=data, durability="process", archive=False):
            pass  # registers the program; nobody serves it when its tasks come
        server = Server(data / "server")
        server.start()
        async with await Client.connect(server.url) as client:
            events = await fill(client, tasks, effects)
        server.stop()
        async with System(Echo, data=data, durability="process") as system:
            async with await Caller.connect(system.url) as caller:
                await _caught_up(caller)
                listed = await afind_tasks("say", limit=0, url=system.url)
                chosen = [row.task for row in random.Random(1).sample(listed, samples)]
                source = BusSource(caller)
                times = [await _opened(source, task, effects) for task in chosen]
                show("opening a task", of="a running system", events=events, **_quantiles(times))
                times = []
                for text in ("question length", "nothing like it"):
                    for _ in range(5):
                        with Clock() as clock:
                            await afind_tasks("say", text=text, limit=50, url=system.url)
                        times.append(clock.seconds)
                show("finding 50 tasks by text", of="a running system", events=events, **_quantiles(times))
            await asyncio.sleep(1)
        source = await FileSource.open(data / "archive.db")
        times = [await _opened(source, task, effects) for task in chosen]
        show("opening a task", of="an archive's file", events=events, **_quantiles(times))
        await source.close()


async def _opened(source: Source, task: str, effects: int) -> float:
    with Clock() as clock:
        story = await story_of(source, task)
    assert story.state.ended and story.versions == effects + 2
    return clock.seconds


def _quantiles(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    p50, p99 = times[len(times) // 2], times[len(times) * 99 // 100]
    return {"p50_ms": round(p50 * 1e3, 2), "p99_ms": round(p99 * 1e3, 2), "max_ms": round(times[-1] * 1e3, 2)}


# -- replaying every task


async def replaying(tasks: int) -> None:
    """`dspex replay --all`: every task read from a file and run again on its records."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "data" / "archive.db"
        async with (
            System(Say, data=file.parent, durability="process") as system,
            await Caller.connect(system.url) as caller,
        ):
            for start in range(0, tasks, 500):
                ids = [await caller.submit("say", BODY) for _ in range(start, min(start + 500, tasks))]
                await asyncio.gather(*(caller.result("say", id) for id in ids))
            await _caught_up(caller)
        events = 8 * tasks
        with Clock() as reading:
            every = await Replay.aevery(Say, log=file)
        with Clock() as running:
            same = [(await one.areport()).same for one in every]
        assert same == [True] * tasks
        show(
            "replay --all from an archive's file", tasks=tasks, events=events,
            read_and_folded_events_per_second=round(events / reading.seconds),
            tasks_run_again_per_second=round(tasks / running.seconds),
            tasks_run_again_per_cpu_second=round(tasks / running.cpu),
            read_and_folded_events_per_cpu_second=round(events / reading.cpu),
            tasks_per_second_in_all=round(tasks / (reading.seconds + running.seconds)),
        )  # fmt: skip


# -- what the archive costs


async def drained(count: int, *, archive: bool) -> dict[str, float]:
    """One agent drains a queue of `count` tasks as fast as it can: tasks a second, and seconds of a core for 1,000
    tasks by each process until then."""
    with tempfile.TemporaryDirectory() as folder:
        async with System(Echo, data=folder, durability="process", archive=False):
            pass  # registers the program, so that its doors are open without agents
        server = Server(Path(folder) / "server")
        server.start()
        await preload(server.url, "dspex.task.echo", count)
        server.stop()
        async with (
            System(Echo, data=folder, durability="process", archive=archive) as system,
            await Caller.connect(system.url) as caller,
        ):
            return await _drain(caller, count)


async def _drain(caller: Caller, count: int) -> dict[str, float]:
    pids = {p.get("role") or "agent": p["pid"] for p in await caller.processes()}
    seconds = await _completions(caller.client, count)
    found = {role: cpu_seconds(pids[role]) * 1000 / count for role in ("agent", "server", "archivist") if role in pids}
    found["per_second"] = count / seconds
    if "archivist" in pids:
        await _caught_up(caller)
        found["archivist, views included, until it has all"] = cpu_seconds(pids["archivist"]) * 1000 / count
    return found


async def _completions(client: Client, count: int) -> float:
    """Seconds from the first completion to the last, by the times that the log stored them."""
    while (await jetstream_api(client, "STREAM.INFO.DSPEX"))["state"]["num_subjects"] < count:  # noqa: ASYNC110
        await asyncio.sleep(0.2)
    log = JetStreamLog(client, SUBJECTS, "bench")
    head = await log.head()
    first = await log.scan(count, 1, "dspex.event.task.echo.*")
    last = [entry for entry in await log.scan(head - 50, 50) if entry.subject.startswith("dspex.event.task")]
    return last[-1].time - first[0].time


async def _caught_up(caller: Caller) -> None:
    """Wait until the archive and its views have what the log has."""
    while True:
        await asyncio.sleep(1.2)  # the archivist looks at the log's end once a second
        hurry = {"limit": 1, "brief": True, "position": (await caller.read_log(limit=1))["head"]}
        await caller.archive("tasks", hurry, timeout=60)
        for answer in await caller.gather():
            data = answer.get("data") or {}
            leads = data.get("role") == "archivist" and data["leads"]
            if leads and data["lag"] < 20 and data["position"] - data["views"] < 20:
                return


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
    short = options.short
    if not wanted or "read" in wanted:
        uvloop.run(read(*((10_000, 5, 2) if short else (125_000, 5, 3))))
        uvloop.run(read(*((20_000, 0, 2) if short else (150_000, 0, 3))))
    if not wanted or "open" in wanted:
        uvloop.run(opening(*((10_000, 5, 50) if short else (125_000, 5, 300))))
    if not wanted or "replay" in wanted:
        asyncio.run(replaying(500 if short else 5000))
    if not wanted or "lag" in wanted:
        with tempfile.TemporaryDirectory() as name:
            uvloop.run(lag(Path(name), 5 if short else 30))
    if not wanted or "cost" in wanted:
        cost(*((10_000, 3) if short else (60_000, 5)))


if __name__ == "__main__":
    main()
