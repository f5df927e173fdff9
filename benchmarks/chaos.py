"""Tasks of five effects while agents, supervisor, registrar, archivist and server are killed at random points.

    python benchmarks/chaos.py [--log sqlite] [--tasks 1000] [--kills 30] [--seed 1] [--short] [--json]

Every effect writes a line into a file of its own accord, so that what was really performed is counted outside of the
log. The outputs are compared with those of the same tasks in a system that nobody disturbs, and the archive with the
log, row by row. Exit code 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.plain import WRONG, Plain, Story  # noqa: E402 - found by the line above
from tests.e2e.running import Running  # noqa: E402

from dspex.agents.archivist import ARCHIVE  # noqa: E402
from dspex.bus.client import Client  # noqa: E402
from dspex.bus.streams import ensure_log  # noqa: E402
from dspex.core.subjects import Subjects  # noqa: E402
from dspex.store.jetstream import JetStreamLog  # noqa: E402
from dspex.store.mend import compare  # noqa: E402
from dspex.store.verify import Report, verify  # noqa: E402

APP = f"{ROOT / 'benchmarks' / 'five.py'}:Five"
EFFECTS = 5
AT_ONCE = 32


def an_agent(system: Running) -> int:
    return random.choice(system.agent_pids())


VICTIMS: dict[str, Callable[[Running], int]] = {
    "agent": an_agent, "supervisor": Running.supervisor, "server": Running.server, "registrar": Running.registrar,
    "archivist": Running.archivist,
}  # fmt: skip


class Submitter:
    """Submits every task under a key until the log has said that it has it."""

    def __init__(self, plain: Plain, tasks: int, book: Path) -> None:
        self.plain, self.tasks, self.book = plain, tasks, book
        self.acknowledged: dict[int, int] = {}
        self.allowed = tasks
        self._numbers = iter(range(tasks))

    async def run(self) -> None:
        await asyncio.gather(*(self._submit() for _ in range(AT_ONCE)))

    async def _submit(self) -> None:
        for n in self._numbers:
            while n >= self.allowed:
                await asyncio.sleep(0.005)
            body = {"n": n, "book": str(self.book), "seconds": 0.02 + n % 7 / 50}
            while True:
                try:
                    task = await self.plain.submit("five", body, headers={"Dspex-Key": f"n{n}"}, timeout=1)
                    self.acknowledged[task] = n
                    break
                except WRONG:
                    await asyncio.sleep(0.05)


@dataclass
class Found:
    """What one run left; `acknowledged` is task to number, `killed` who and when."""

    story: Story
    book: Path
    acknowledged: dict[int, int]
    killed: list[tuple[str, float]]
    archive: Report


async def run(folder: Path, tasks: int, kills: int, seed: int, log: str) -> Found:
    """One system with two agents and `tasks` tasks, and what it left."""
    chance, book, killed = random.Random(seed), folder / "book", []
    book.touch()
    order = [list(VICTIMS)[n % len(VICTIMS)] for n in range(kills)]
    chance.shuffle(order)
    with Running(folder / "data", (APP, 2), log=log) as system:
        async with await system.plain() as plain:
            submitter = Submitter(plain, tasks, book)
            running = asyncio.create_task(submitter.run())
            for number, victim in enumerate(order, 1):
                submitter.allowed = tasks * number // (kills + 1)  # a part of them while each is down
                await asyncio.sleep(0.1 + 0.5 * chance.random())
                pid = await _find(system, victim)
                killed.append((victim, time.time()))
                os.kill(pid, signal.SIGKILL)
            submitter.allowed = tasks
            await running
            story = await plain.until_ended("five", patience=180)
            archive = await archived(system, log)
    return Found(story, book, submitter.acknowledged, killed, archive)


async def archived(system: Running, log_kind: str) -> Report:
    """What is wrong with the archive, once it has all that the log had when we asked; or with the log that is one."""
    if log_kind == "sqlite":
        await asyncio.sleep(1.5)  # until the head beside it is that of the last row
        return await asyncio.to_thread(verify, system.data / "log.db")
    file, subjects = system.data / ARCHIVE, Subjects()
    async with await Client.connect(system.url) as client:
        log = JetStreamLog(client, subjects, await ensure_log(client, subjects))
        top = await log.head()
        deadline = time.monotonic() + 60
        while (report := await asyncio.to_thread(verify, file, epoch=log.epoch)).position < top:
            assert time.monotonic() < deadline, f"the archive stays at {report.position} of {top}"
            await asyncio.sleep(0.2)
        await compare(file, log, report)
    return report


async def _find(system: Running, victim: str) -> int:
    while True:
        try:
            return VICTIMS[victim](system)
        except (StopIteration, IndexError):
            await asyncio.sleep(0.01)


def outputs(story: Story) -> dict[int, int]:
    return {output["n"]: output["value"] for output in story.outputs("five").values()}


def seconds_of(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["time"].replace("Z", "+00:00")).timestamp()


def judge(found: Found) -> dict[str, Any]:
    """What the log, the book and the archive say of the promises."""
    story, book, acknowledged, killed = found.story, found.book, found.acknowledged, found.killed
    endings = story.endings("five")
    story.check_versions()
    performed: dict[tuple[str, str], list[str]] = defaultdict(list)
    for line in book.read_text().splitlines():
        n, value, key, _ = line.split()
        performed[n, value].append(key)
    records: Counter[tuple[int, str]] = Counter()
    claims, firsts = [], []
    commits = []
    for entry in story.entries:
        for event in entry.events:
            if event["aggregate"].startswith("task.five."):
                commits.append(seconds_of(event))
            if event["type"] == "EffectRecorded":
                records[int(event["aggregate"].rpartition(".")[2]), event["data"]["key"]] += 1
            if event["type"] == "TaskClaimed" and event["data"]["attempt"] > 1:
                claims.append(seconds_of(event))
    for _, when in killed:
        firsts += [min((at for at in commits if at > when), default=when) - when]
    over = [at - max((when for _, when in killed if when < at), default=at) for at in claims]
    completed = Counter(output["n"] for output in story.outputs("five").values())
    return {
        "tasks": len(set(acknowledged.values())),
        "kills": dict(Counter(victim for victim, _ in killed)),
        "lost": len(set(acknowledged) - set(endings)) + len(set(acknowledged.values()) - set(completed)),
        "completed_twice": sum(len(types) > 1 for types in endings.values()) + sum(n > 1 for n in completed.values()),
        "effects": sum(records.values()),
        "recorded_twice": sum(n > 1 for n in records.values()),
        "under_two_keys": sum(len(set(keys)) > 1 for keys in performed.values()),
        "in_flight_repeated": sum(len(keys) - 1 for keys in performed.values()),
        "archived": found.archive.rows,
        "archive_differs": found.archive.bad + len(found.archive.gaps),
        "taken_over": len(claims),
        "first_commit_after_a_kill": _spread(firsts),
        "takeover_after_a_kill": _spread(over),
    }


def repeated(story: Story, book: Path) -> int:
    """Effects that were performed after the log had got a record of them."""
    recorded = {}
    for entry in story.entries:
        for event in entry.events:
            if event["type"] == "EffectRecorded":
                place = f"{event['aggregate'].rpartition('.')[2]}/0/{event['data']['key']}"
                recorded[hashlib.sha256(place.encode()).hexdigest()[:32]] = seconds_of(event)
    lines = [line.split() for line in book.read_text().splitlines()]
    assert {key for _, _, key, _ in lines} == set(recorded), "the book and the log tell of the same effects"
    return sum(float(when) > recorded[key] for _, _, key, when in lines)


def _spread(values: list[float]) -> dict[str, float]:
    return {"p50": round(median(values), 3), "max": round(max(values), 3)} if values else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", choices=("jetstream", "sqlite"), default="jetstream", help="where the log is")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="200 tasks, 5 kills")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    tasks, kills = (200, 5) if options.short else (options.tasks, options.kills)
    with tempfile.TemporaryDirectory() as place:
        calm, wild = Path(place, "calm"), Path(place, "wild")
        calm.mkdir()
        wild.mkdir()
        expected = outputs(asyncio.run(run(calm, tasks, 0, options.seed, options.log)).story)
        left = asyncio.run(run(wild, tasks, kills, options.seed, options.log))
        found = judge(left)
        found["recorded_repeated"] = repeated(left.story, left.book)
        found["differs"] = sum(expected.get(n) != value for n, value in outputs(left.story).items())
        found["seed"], found["log"] = options.seed, options.log
    broken = [name for name in (
        "lost", "completed_twice", "recorded_twice", "recorded_repeated", "under_two_keys", "differs",
        "archive_differs",
    ) if found[name]]  # fmt: skip
    if found["effects"] != tasks * EFFECTS:
        broken.append("effects")
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"{name.replace('_', ' '):28} {shown}")
        print(f"broken: {', '.join(broken)}" if broken else "every promise held")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
