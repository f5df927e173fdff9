"""Thousands of workflows of several steps, with sleeps and signals, under a server that is killed all the time: exact?

    python benchmarks/workflows.py [--workflows 5000] [--every 5-40] [--log sqlite] [--seed 1] [--short] [--json]

After DBOS's chaos tests, which kill the database every 5 to 40 s under 5,000 workflows and want exact results. Every
workflow adds up what its steps gave, so its output is known before it runs; every third sleeps in the log, every fifth
waits for a signal. The workflows are spread over the time; the server is killed until the last has ended. Exit code 1
when a sum is wrong, a step is not exactly once in the log, or anything ended twice or not at all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.e2e.plain import WRONG, Plain, Story  # noqa: E402 - found by the line above
from tests.e2e.running import Running  # noqa: E402

APP = f"{ROOT / 'benchmarks' / 'programs.py'}:Workflow"
AT_ONCE = 32
PATIENCE = 600.0


def steps_of(n: int) -> int:
    """How many steps a workflow has: three to eight."""
    return 3 + n % 6


def sum_of(n: int) -> int:
    """What the steps of a workflow add up to, its signal's value included."""
    return sum((n * 31 + place * 7) % 1_000_003 for place in range(steps_of(n))) + (n if n % 5 == 0 else 0)


class Client:
    """Submits each workflow under a key, and signals those that wait for it, until the log says that it has both."""

    def __init__(self, plain: Plain, workflows: int, seconds: float) -> None:
        self.plain, self.workflows, self.seconds = plain, workflows, seconds
        self.acknowledged: dict[int, int] = {}
        self.retries = 0
        self._numbers = iter(range(workflows))
        self._begun = time.monotonic()

    async def run(self) -> None:
        await asyncio.gather(*(self._work() for _ in range(AT_ONCE)))

    async def _work(self) -> None:
        for n in self._numbers:
            due = self._begun + self.seconds * n / self.workflows
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            body = {"n": n, "steps": steps_of(n), "sleeps": n % 3 == 0, "waits": n % 5 == 0}
            task = await self._until_stored("task", body, f"w{n}")
            self.acknowledged[task] = n
            if n % 5 == 0:
                await self._until_stored("signal", {"task": task, "name": "add", "value": n}, "")

    async def _until_stored(self, door: str, body: dict[str, Any], key: str) -> int:
        headers = {"Dspex-Key": key} if key else None
        while True:
            try:
                return await self.plain.store(door, "workflow", body, headers, timeout=2)
            except WRONG:
                self.retries += 1
                await asyncio.sleep(0.05)


async def run(folder: Path, options: argparse.Namespace, every: tuple[float, float]) -> dict[str, Any]:
    chance = random.Random(options.seed)
    kills: list[float] = []
    begun = time.monotonic()

    async def restart(system: Running) -> None:
        while True:
            await asyncio.sleep(chance.uniform(*every))
            with suppress(StopIteration, ProcessLookupError):
                os.kill(system.server(), signal.SIGKILL)
                kills.append(time.monotonic() - begun)

    with Running(folder / "data", (APP, 2), log=options.log) as system:
        async with await system.plain() as plain:
            client = Client(plain, options.workflows, options.seconds)
            restarting = asyncio.create_task(restart(system))
            try:
                await client.run()
                await _ended(plain)
            finally:
                restarting.cancel()
            story = await plain.until_ended("workflow", patience=PATIENCE)  # read whole, with nobody in the way
    return judge(story, client) | {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "log": options.log, "seed": options.seed,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load_average": [round(x, 1) for x in os.getloadavg()], "seconds": round(time.monotonic() - begun, 1),
        "restarts": len(kills), "retries_of_clients": client.retries,
    }  # fmt: skip


async def _ended(plain: Plain) -> None:
    """Wait until every workflow has ended. A server that dies takes with it what its reader had asked for, which looks
    like a gap; then the reader goes on behind the last message that it has."""
    deadline, story = time.monotonic() + PATIENCE, Story()
    while time.monotonic() < deadline:
        with suppress(AssertionError, *WRONG):
            await plain.story(story)
            if not set(story.submitted("workflow")) - set(story.endings("workflow")):
                return
        await asyncio.sleep(0.2)


def judge(story: Story, client: Client) -> dict[str, Any]:
    """What the log says of every workflow, counted by somebody who knows only its format."""
    story.check_versions()
    ends, sums = story.endings("workflow"), Counter[int]()
    wrong = outside = 0
    for task, output in story.outputs("workflow").items():
        sums[output["n"]] += 1
        wrong += output["sum"] != sum_of(output["n"])
        outside += task not in client.acknowledged
    records: Counter[tuple[str, str]] = Counter()
    steps: Counter[str] = Counter()
    for entry in story.entries:
        for event in entry.events:
            if event["type"] == "EffectRecorded" and event["aggregate"].startswith("task.workflow."):
                records[event["aggregate"], event["data"]["key"]] += 1
                steps[event["aggregate"]] += "workflow_step" in event["data"]["key"]
    expected = {task: steps_of(n) for task, n in client.acknowledged.items()}
    completed = {task for task, types in ends.items() if "TaskCompleted" in types}
    return {
        "workflows": client.workflows, "completed": len(sums),
        "lost": len(set(client.acknowledged.values()) - set(sums)) + len(set(client.acknowledged) - set(ends)),
        "ended_twice": sum(len(types) > 1 for types in ends.values()) + sum(number > 1 for number in sums.values()),
        "wrong_sums": wrong, "steps": sum(steps.values()), "recorded_twice": sum(n > 1 for n in records.values()),
        "wrong_steps": sum(steps[f"task.workflow.{task}"] != expected[task] for task in completed & set(expected)),
        "duplicates": sum(types == ["TaskDuplicate"] for types in ends.values()),
        "unacknowledged_winners": outside, "kinds": dict(Counter(t for types in ends.values() for t in types)),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workflows", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=300.0, help="over which they are submitted")
    parser.add_argument("--every", default="5-40", help="seconds between restarts of the server, least and most")
    parser.add_argument("--log", choices=("jetstream", "sqlite"), default="jetstream")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="300 workflows in 8 s, a restart every 1 to 3 s")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.short:
        options.workflows, options.seconds, options.every = 300, 8.0, "1-3"
    low, _, high = options.every.partition("-")
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(Path(folder), options, (float(low), float(high or low))))
    broken = [it for it in ("lost", "ended_twice", "wrong_sums", "wrong_steps", "recorded_twice") if found[it]]
    if found["completed"] != options.workflows:
        broken.append("completed")
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name.replace('_', ' '):24} {value}")
        print(f"broken: {', '.join(broken)}" if broken else "exact")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
