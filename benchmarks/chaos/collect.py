"""Reads what a run left: the whole log, the archive or the log's file, the views, and the counter's book."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.chaos.evidence import Archived, Snapshot, Views
from benchmarks.chaos.history import Performance
from benchmarks.chaos.told import Row, Told
from benchmarks.chaos.workload import PROGRAM
from tests.e2e.plain import WRONG, Plain, Story
from tests.e2e.running import Running

from dspex.agents.archivist import ARCHIVE
from dspex.bus.client import Client
from dspex.bus.streams import ensure_log
from dspex.core.subjects import Subjects
from dspex.store.jetstream import JetStreamLog
from dspex.store.mend import compare
from dspex.store.verify import Report, verify

__all__ = ["archived", "long_task", "performances", "settled", "views"]

LONG = 2500
"""Effects of the one task that is long enough for its state to be kept."""


async def settled(plain: Plain, patience: float) -> Told:
    """The log, once every task in it has ended; as it is then, when `patience` seconds are over without a new entry."""
    story, deadline, head = Story(), time.monotonic() + patience, 0
    while True:
        try:
            story = await plain.story(story)
        except WRONG:
            await asyncio.sleep(0.2)
            continue
        if story.head > head:
            head, deadline = story.head, time.monotonic() + patience
        if set(story.submitted(PROGRAM)) <= set(story.endings(PROGRAM)) or time.monotonic() > deadline:
            return Told(Row(e.position, e.time, e.subject, e.headers, e.body) for e in story.entries)
        await asyncio.sleep(0.5)


async def long_task(plain: Plain) -> None:
    """Run a task of many effects and ask for its state on the way, so that snapshots are made of it."""
    task = await plain.submit(PROGRAM, {"n": LONG, "kind": "long"})
    await plain.final(PROGRAM, task, patience=120)
    aggregate, found = f"task.{PROGRAM}.{task}", {}
    for to in (LONG // 2, LONG):
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            query = json.dumps({"aggregate": aggregate, "to": to}).encode()
            try:
                reply = await plain.nc.request("dspex.archive.state", query, timeout=10)
                found = json.loads(reply.data)
                if found.get("version") == to:
                    break
            except (*WRONG, ValueError):
                pass
            await asyncio.sleep(0.2)
        assert found.get("version") == to, f"no state of {aggregate} at {to}: {found}"


async def archived(system: Running, log_kind: str, last: int) -> Archived:
    """What is wrong with the archive, once it has all of the log up to `last`; or with the log that is its own."""
    file = system.data / (ARCHIVE if log_kind == "jetstream" else "log.db")
    deadline = time.monotonic() + 120
    while (report := await asyncio.to_thread(verify, file)).position < last and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    if log_kind == "jetstream":
        subjects = Subjects()
        async with await Client.connect(system.url) as client:
            log = JetStreamLog(client, subjects, await ensure_log(client, subjects))
            await compare(file, log, report)
    return _shown(report)


def _shown(report: Report) -> Archived:
    faults = [(fault.position, fault.what) for fault in report.faults]
    return Archived(report.position, faults, [(gap.first, gap.last) for gap in report.gaps])


async def views(data: Path, last: int) -> Views:
    """The view of tasks and the snapshots, once they know the log up to `last`."""
    deadline = time.monotonic() + 120
    while (found := await asyncio.to_thread(_views, data / "views.db")).position < last and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    return found


def _views(file: Path) -> Views:
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        connection.execute("BEGIN")
        checkpoint = connection.execute("SELECT position FROM checkpoints WHERE name = 'tasks'").fetchone()
        tasks: dict[int, dict[str, Any]] = {row["id"]: dict(row) for row in connection.execute("SELECT * FROM tasks")}
        kept = connection.execute("SELECT aggregate, fold, version, state FROM snapshots").fetchall()
        snapshots = [Snapshot(row["aggregate"], row["fold"], row["version"], bytes(row["state"])) for row in kept]
        return Views(tasks, snapshots, checkpoint["position"] if checkpoint else 0)


def performances(book: Path) -> list[Performance]:
    """What the counter wrote down."""
    return [Performance(**json.loads(line)) for line in book.read_text().splitlines()]
