"""A system whose log is SQLite beside one whose log is JetStream, both durable through a loss of power; and the file
alone beside plain sqlite3.

    python benchmarks/sqlite_log.py [--short] [--json] [--only tasks|appends]

Everything is measured in one run on one machine, A B A B; the ratios are what travels.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import uvloop

from dspex import Program, Schema, effect
from dspex.bus.client import Client
from dspex.bus.streams import jetstream_api
from dspex.compose.system import System
from dspex.core.codec import decode_commit, encode_commit
from dspex.core.events import Event, Head, TaskClaimed
from dspex.core.ports import Appended, Entry, Log
from dspex.core.subjects import Subjects
from dspex.store.archive import INSERT, start_file
from dspex.store.chain import EMPTY, Row, chained
from dspex.store.jetstream import JetStreamLog
from dspex.store.sqlite import SqliteLog

BODY = b'{"text":"a question of the usual length, more or less","number":7}'
IN_FLIGHT = 512
APPENDERS = 64
EVENTS = 5
"""Of one task."""


class Five(Program):
    """Three effects that wait for nothing: with the claim and the end, five events in one commit."""

    class Input(Schema):
        text: str
        number: int = 0

    class Output(Schema):
        text: str

    async def predict(self, input: Input) -> Output:
        at, number, name = self.now(), self.new_id(), self.new_id()
        return self.Output(text=f"{input.text} {at} {number} {name}")


@effect
async def look_up(text: str) -> str:
    return text


class Steps(Five):
    """Three effects that go outside, each waiting for the one before: five events in three or four commits."""

    name = "steps"

    async def predict(self, input: Five.Input) -> Five.Output:
        text = await look_up(input.text)
        text = await look_up(text)
        return self.Output(text=await look_up(text))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="fewer rounds and tasks")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end, nothing else")
    parser.add_argument("--only", choices=("tasks", "appends"), default=None)
    options = parser.parse_args()
    rounds, tasks, appends = (1, 3000, 20_000) if options.short else (3, 15_000, 100_000)
    say: Callable[..., None] = (lambda *_: None) if options.json else print
    versions = f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    say(f"{os.cpu_count()} cores, {platform.machine()}, {versions}")
    found: dict[str, Any] = {}
    if options.only != "appends":
        found["tasks"] = bench_tasks(rounds, tasks, say)
    if options.only != "tasks":
        found["appends"] = bench_appends(rounds, appends, say)
    if options.json:
        print(json.dumps(found))
    return 0


# -- whole systems


def bench_tasks(rounds: int, count: int, say: Callable[..., None]) -> dict[str, Any]:
    say(f"\n{count:,} tasks, submitted {IN_FLIGHT} at once and completed, every acknowledgement on disk; one agent")
    rates: dict[str, list[float]] = {}
    costs: dict[str, list[float]] = {}
    for _ in range(rounds):
        for program in (Five, Steps):
            for log in ("sqlite", "jetstream"):
                rate, cost = uvloop.run(tasks_per_second(program, log, count))
                rates.setdefault(f"{program.name} {log}", []).append(rate)
                costs.setdefault(f"{program.name} {log}", []).append(cost)
    found: dict[str, Any] = {}
    for name, each in rates.items():
        program, _, log = name.partition(" ")
        what = "five events in one commit" if program == "five" else "five events, three effects one after the other"
        found[name] = round(statistics.median(each))
        cost = found[f"{name} us"] = round(statistics.median(costs[name]))
        say(f"  {log:10} {what:48} {found[name]:>8,}/s {cost:>6,} µs of a core each")
    for program in ("five", "steps"):
        ratios = [a / b for a, b in zip(rates[f"{program} sqlite"], rates[f"{program} jetstream"], strict=True)]
        found[f"{program} ratio"] = round(statistics.median(ratios), 2)
        say(f"  sqlite beside jetstream, {program}: {found[f'{program} ratio']}")
    return found


async def tasks_per_second(program: type[Program], log: str, count: int) -> tuple[float, float]:
    """From the first submission to the last completion, by the times the log stored them; and the microseconds of a
    core that a task takes of all the system's processes together, which other load does not change."""
    with tempfile.TemporaryDirectory() as folder:
        async with System(program, data=folder, durability="power", log=log, archive=False) as system:
            client = await Client.connect(system.url)
            pids = [int(process["pid"]) for process in await system.aprocesses()]
            before = sum(map(_processor_time, pids))
            await _submit(client, f"dspex.task.{program.name}", count)
            reader = await _reader(client, log, Path(folder))
            started, ended = await _times(reader, program.name, count)
            cost = sum(map(_processor_time, pids)) - before
            await reader.close()
            await client.close()
        return count / (ended - started), cost / count * 1e6


def _processor_time(pid: int) -> float:
    """Seconds of a core that a process has had."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _submit(client: Client, subject: str, count: int) -> None:
    numbers = iter(range(count))

    async def submit() -> None:
        for _ in numbers:
            reply = await client.request(subject, BODY, timeout=30)
            assert b'"seq"' in reply.data and b"error" not in reply.data, reply.data

    await asyncio.gather(*(submit() for _ in range(IN_FLIGHT)))


async def _reader(client: Client, log: str, folder: Path) -> Log:
    if log == "sqlite":
        return await SqliteLog.open(folder / "log.db", readonly=True)
    info = await jetstream_api(client, "STREAM.INFO.DSPEX")
    assert "error" not in info
    return JetStreamLog(client, Subjects(), "bench")


async def _times(log: Log, program: str, count: int) -> tuple[float, float]:
    """When the first task was stored and the last one ended; every one of them has five events."""
    after, first = 0, 0.0
    ended: dict[str, tuple[float, int]] = {}
    while sum(done > 0 for done, _ in ended.values()) < count:
        entries = await log.scan(after, 5000)
        for entry in entries:
            after = entry.position
            first = first or (entry.time if entry.subject == f"dspex.task.{program}" else 0.0)
            if entry.subject.startswith(f"dspex.event.task.{program}."):
                _count(entry, ended)
        if not entries:
            await asyncio.sleep(0.2)
    counts = {events for _, events in ended.values()}
    assert counts == {EVENTS}, f"tasks have {sorted(counts)} events"
    return first, max(done for done, _ in ended.values())


def _count(entry: Entry, ended: dict[str, tuple[float, int]]) -> None:
    events = decode_commit(entry.body)
    done, number = ended.get(entry.subject, (0.0, 0))
    if type(events[-1].data).__name__ == "TaskCompleted":
        done = entry.time
    ended[entry.subject] = done, number + len(events)


# -- the file alone


def bench_appends(rounds: int, count: int, say: Callable[..., None]) -> dict[str, Any]:
    say(f"\n{count:,} commits of one event into one file, synchronous=FULL")
    rates: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, work in (
            ("appenders", lambda folder: uvloop.run(append(folder, count))),
            ("groups", lambda folder: insert(folder, count, APPENDERS)),
            ("bulk", lambda folder: insert(folder, count, count)),
            ("plain", lambda folder: insert(folder, count, count, chain=False)),
        ):
            with tempfile.TemporaryDirectory() as folder:
                rates.setdefault(name, []).append(work(Path(folder)))
    rows = {
        "appenders": f"{APPENDERS} appenders, each waiting for its commit",
        "groups": f"plain sqlite3, the same rows, {APPENDERS} a transaction",
        "bulk": "plain sqlite3, the same rows, all in one transaction",
        "plain": "plain sqlite3, the same without checksums, all in one transaction",
    }
    found: dict[str, Any] = {}
    for name, label in rows.items():
        ratio = statistics.median([a / b for a, b in zip(rates["appenders"], rates[name], strict=True)])
        found[name], found[f"beside {name}"] = round(statistics.median(rates[name])), round(ratio, 2)
        say(f"  {label:68} {found[name]:>9,}/s  {ratio:6.2f}")
    return found


def commit(name: str) -> list[Event]:
    data = TaskClaimed(attempt=1, agent="five-ce93-2", assignment="d601ee2a12d9eaa0f12e677b0dcb6ddd", code="1df1ca11d4")
    return [Event(name, 1, "2026-11-23T11:08:33.276670Z", "/agents/five-ce93-2", "42", "42", data)]


async def append(folder: Path, count: int) -> float:
    log = await SqliteLog.open(folder / "log.db", durability="power")
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            name = f"task.five.{number}"
            assert isinstance(await log.append(name, commit(name), Head()), Appended)

    started = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(APPENDERS)))
    rate = count / (time.perf_counter() - started)
    await log.close()
    return rate


def insert(folder: Path, count: int, group: int, *, chain: bool = True) -> float:
    """The same rows by hand; what is measured is SQLite, so they are made before."""
    rows, link = [], EMPTY
    for number in range(count):
        name = f"task.five.{number}"
        row = Row(number + 1, 1_795_000_000_000_000, f"dspex.event.{name}", None, encode_commit(commit(name)))
        link = chained(link, row) if chain else b""
        rows.append((*row[:5], link))
    with closing(sqlite3.connect(folder / "bulk.db", isolation_level=None)) as file:
        file.execute("PRAGMA journal_mode = WAL")
        file.execute("PRAGMA synchronous = FULL")
        start_file(file, "bench")
        started = time.perf_counter()
        for begin in range(0, count, group):
            file.execute("BEGIN IMMEDIATE")
            file.executemany(INSERT, rows[begin : begin + group])
            file.execute("COMMIT")
        return count / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
