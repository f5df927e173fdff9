"""A system at a steady share of its capacity for a long time, while its processes are killed and frozen: does anything
grow?

    python benchmarks/soak.py [--minutes 60] [--share 0.8 | --rate 40] [--every 5-40] [--seed 1] [--short] [--json]

First a flood says what the machine can do; then tasks come at `share` of that. Every few seconds all processes are
looked at (memory, open files, threads), and the log, its queue and the archive. One agent, the registrar, the
archivist and the server are killed in turn, and the other agent is frozen; that agent, the supervisor and the root live
through all of it and are the witnesses. At the end every acknowledged task is looked up in the archive. Exit code 1
when a task is missing or ended twice, when files or threads pile up, or when memory grows without bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import sqlite3
import sys
import tempfile
import time
from array import array
from collections import Counter
from contextlib import closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gauges import Gauge, line, look, mib  # noqa: E402 - found by the line above
from tests.e2e.plain import TERMINAL  # noqa: E402
from tests.e2e.running import Running, called, freeze  # noqa: E402

from dspex.agents.archivist import ARCHIVE  # noqa: E402
from dspex.bus.client import Client  # noqa: E402
from dspex.bus.streams import jetstream_api  # noqa: E402
from dspex.core.errors import ConnectionFailed, LogError  # noqa: E402
from dspex.store.verify import verify  # noqa: E402

APP = f"{ROOT / 'benchmarks' / 'programs.py'}:Steady"
IN_FLIGHT = 512
KEEP = 20_000
"""Messages that the log keeps; the archive has them all."""
PATIENCE = 300.0
"""Seconds for what is left to end, when the load has stopped."""
MOST_FILES, MOST_THREADS, MOST_GROWTH = 40, 20, 96 << 20
"""How much more a process may hold in its last quarter than in its second: files, threads, bytes."""
MOST_LOG = 256 << 20
"""Bytes that the log may have on disk: what it keeps, and the blocks that are not given back yet."""


@dataclass(frozen=True)
class Plan:
    """What is to be done: seconds of load, the share of capacity or a rate, seconds between faults."""

    seconds: float
    share: float
    rate: float
    most: float
    every: tuple[float, float]
    seed: int
    flood: int
    look: float
    warm: float


@dataclass
class Watched:
    """What was seen of the system as a whole, one row a look."""

    gauges: dict[str, Gauge] = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    faults: list[tuple[float, str]] = field(default_factory=list)


class Load:
    """Submits at a rate, whatever comes back; when too many answers are out, it waits and says so."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.acknowledged = array("Q")
        self.unknown = self.refused = self.sent = self.held_back = 0
        self._out: set[asyncio.Future[Any]] = set()

    async def steadily(self, rate: float, seconds: float) -> None:
        begun, base = time.monotonic(), self.sent
        while (now := time.monotonic() - begun) < seconds:
            due = int(now * rate) - (self.sent - base)
            if due > rate:  # more than a second behind: a machine that cannot is not pressed harder
                self.held_back += due
                base -= due
                due = 0
            for _ in range(due):
                if len(self._out) >= IN_FLIGHT:
                    break
                self._send()
            await asyncio.sleep(0.01)

    async def flood(self, tasks: int) -> None:
        until = self.sent + tasks
        while self.sent < until:
            while len(self._out) < IN_FLIGHT and self.sent < until:
                self._send()
            await asyncio.sleep(0.002)

    async def settle(self) -> None:
        """Wait for what is under way; the client's own timeouts end that."""
        if self._out:
            await asyncio.wait(self._out)

    def _send(self) -> None:
        n = self.sent
        body = b'{"n":%d,"text":"a question of the usual length, more or less","naps":%s}'
        self.sent += 1
        try:
            future = self._client.call("dspex.task.steady", body % (n, b"true" if n % 50 == 7 else b"false"))
        except ConnectionFailed:
            self.refused += 1
            return
        self._out.add(future)
        future.add_done_callback(self._answered)

    def _answered(self, future: asyncio.Future[Any]) -> None:
        self._out.discard(future)
        if future.exception() is not None:
            self.unknown += 1
        elif future.result().status or b'"seq"' not in future.result().data:
            self.refused += 1
        else:
            self.acknowledged.append(json.loads(future.result().data)["seq"])


async def lag(client: Client) -> tuple[int, int]:
    """Tasks that wait, and tasks that somebody works on."""
    info = await jetstream_api(client, "CONSUMER.INFO.DSPEX.task-steady", timeout=2.0)
    if "error" in info:
        raise LogError(info["error"]["description"])
    return int(info["num_pending"]), int(info["num_ack_pending"])


def role_of(pid: int) -> str:
    """`registrar-1a2b` is a registrar, `steady-1a2b-2` the second agent."""
    parts = called(pid).split("-")
    return f"agent {parts[2]}" if len(parts) == 3 else parts[0]


def processes(system: Running) -> dict[str, int]:
    found = {"root": system.root, "server": system.server(), "supervisor": system.supervisor()}
    unborn = called(found["supervisor"])
    for pid in system.below_supervisor():
        if called(pid) != unborn:
            found[role_of(pid)] = pid
    return found


async def watch(system: Running, client: Client, watched: Watched, started: float, every: float) -> None:
    while True:
        await asyncio.sleep(every)
        now = time.monotonic() - started
        with suppress(StopIteration):
            for role, pid in processes(system).items():
                if sample := look(pid, now):
                    watched.gauges.setdefault(role, Gauge(role)).samples.append(sample)
        try:
            info = await jetstream_api(client, "STREAM.INFO.DSPEX", timeout=2.0)
            waiting, held = await lag(client)
        except (LogError, ConnectionFailed, TimeoutError):
            continue
        if "error" in info:
            continue
        state, archive = info["state"], system.data / ARCHIVE
        disk = sum(file.stat().st_size for file in (system.data / "server").rglob("*") if file.is_file())
        watched.rows.append({
            "time": round(now, 1), "waiting": waiting, "held": held, "messages": state["messages"],
            "log_bytes": state["bytes"], "disk": disk, "last": state["last_seq"],
            "archive": archive.stat().st_size if archive.exists() else 0,
        })  # fmt: skip


async def disturb(system: Running, watched: Watched, started: float, plan: Plan) -> None:
    """A fault every few seconds. Who lives through all of it: root, supervisor, the second agent."""
    chance = random.Random(plan.seed)
    victims = ["agent 1", "server", "registrar", "archivist", "freeze"]
    while True:
        chance.shuffle(victims)
        for victim in victims:
            await asyncio.sleep(chance.uniform(*plan.every))
            length = chance.uniform(1, 4)
            try:
                pid = processes(system)["agent 2" if victim == "freeze" else victim]
            except (StopIteration, KeyError):
                continue  # it is just being started again
            watched.faults.append((round(time.monotonic() - started, 1), victim))
            if victim == "freeze":
                await asyncio.to_thread(freeze, pid)
                await asyncio.sleep(length)
                os.kill(pid, signal.SIGCONT)
            else:
                os.kill(pid, signal.SIGKILL)


async def capacity(client: Client, load: Load, tasks: int) -> float:
    """Tasks a second from the first submission of a flood to the end of the last task."""
    begun = time.monotonic()
    await load.flood(tasks)
    await load.settle()
    done = len(load.acknowledged)
    await drained(client)
    return done / (time.monotonic() - begun)


async def drained(client: Client) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        with suppress(LogError, ConnectionFailed, TimeoutError):
            waiting, held = await lag(client)
            if not waiting + held:
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"{waiting} tasks wait and {held} are held, {PATIENCE:.0f} s after the load ended")
        await asyncio.sleep(0.1)


async def run(folder: Path, plan: Plan, say: Any) -> dict[str, Any]:
    watched = Watched()
    with Running(folder / "data", (APP, 2), retention={"count": KEEP}) as system:
        async with await Client.connect(system.url, name="load") as client:
            load = Load(client)
            able = await capacity(client, load, plan.flood)
            rate = min(plan.rate or plan.share * able, plan.most or able)
            say(f"capacity {able:,.0f} tasks/s; {rate:,.1f} tasks/s for {plan.seconds / 60:.1f} min")
            started = time.monotonic()
            before = len(load.acknowledged)
            beside = [
                asyncio.create_task(watch(system, client, watched, started, plan.look)),
                asyncio.create_task(disturb(system, watched, started, plan)),
            ]
            await load.steadily(rate, plan.seconds)
            beside[1].cancel()
            await load.settle()
            with suppress(ProcessLookupError, StopIteration, KeyError):
                os.kill(processes(system)["agent 2"], signal.SIGCONT)
            await drained(client)
            beside[0].cancel()
            for task in beside:
                with suppress(asyncio.CancelledError):
                    await task
            top = (await jetstream_api(client, "STREAM.INFO.DSPEX"))["state"]["last_seq"]
            await archived(system.data / ARCHIVE, top)
            account = await accounted(system.data / ARCHIVE, load.acknowledged)
    report = await asyncio.to_thread(verify, folder / "data" / ARCHIVE)
    disk = {"messages": "messages", "log": "disk", "archive": "archive"}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load_average": [round(x, 1) for x in os.getloadavg()], "minutes": round(plan.seconds / 60, 2),
        "seed": plan.seed, "capacity": round(able, 1), "rate": round(rate, 1), "share": round(rate / able, 2),
        "acknowledged": len(load.acknowledged), "under_load": len(load.acknowledged) - before,
        "unknown": load.unknown, "refused": load.refused, "held_back": load.held_back,
        "faults": dict(Counter(victim for _, victim in watched.faults)),
        **account, "archive_faults": report.bad + len(report.gaps),
        "waiting": _spread([row["waiting"] for row in watched.rows]),
        "at_the_end": {name: watched.rows[-1][key] for name, key in disk.items()} if watched.rows else {},
        "log_most": max((row["disk"] for row in watched.rows), default=0),
        "processes": {role: gauge.summary(plan.warm) for role, gauge in sorted(watched.gauges.items())},
        "rows": watched.rows, "fault_times": watched.faults,
        "series": {
            role: [[round(it.time), it.pss, it.own, it.files, it.threads] for it in gauge.samples]
            for role, gauge in watched.gauges.items()
        },
    }  # fmt: skip


async def archived(file: Path, top: int) -> None:
    """Wait until the archive has all of the log."""
    deadline = time.monotonic() + PATIENCE
    while True:
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as archive:
            position = archive.execute("SELECT max(position) FROM log").fetchone()[0] or 0
        if position >= top:
            return
        if time.monotonic() > deadline:
            raise SystemExit(f"the archive stays at {position} of {top}")
        await asyncio.sleep(0.2)


async def accounted(file: Path, acknowledged: array[int]) -> dict[str, int]:
    """How every task ended, once those that slept have ended, too."""
    deadline = time.monotonic() + PATIENCE
    while True:
        account = await asyncio.to_thread(count, file, acknowledged)
        if not account["open"] or time.monotonic() > deadline:
            return account
        await asyncio.sleep(1.0)


def count(file: Path, acknowledged: array[int]) -> dict[str, int]:
    """Acknowledged tasks that the archive has no end of, and tasks with two; row by row, in bounded memory."""
    ends: Counter[int] = Counter()
    submitted = 0
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as archive:
        for subject, body in archive.execute("SELECT subject, body FROM log WHERE subject LIKE 'dspex.%.steady%'"):
            if subject == "dspex.task.steady":
                submitted += 1
            elif subject.startswith("dspex.event.task."):
                ended = sum(event["type"] in TERMINAL for event in json.loads(body))
                if ended:
                    ends[int(subject.rpartition(".")[2])] += ended
    return {
        "submitted": submitted, "ended": len(ends), "lost": sum(task not in ends for task in acknowledged),
        "open": submitted - len(ends), "ended_twice": sum(number > 1 for number in ends.values()),
    }  # fmt: skip


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0]
    return {"p50": ordered[len(ordered) // 2], "p99": ordered[len(ordered) * 99 // 100], "most": ordered[-1]}


def verdict(found: dict[str, Any]) -> list[str]:
    """What is wrong, in sentences; bounds wide enough that a slow machine does not change the answer."""
    wrong = [
        f"{found[name]} tasks: {name.replace('_', ' ')}" for name in ("lost", "open", "ended_twice") if found[name]
    ]
    if found["archive_faults"]:
        wrong.append(f"{found['archive_faults']} faults in the archive")
    if found["log_most"] > MOST_LOG:
        wrong.append(f"the log took {mib(found['log_most'])} on disk")
    for role, what in found["processes"].items():
        for name, bound in (("files", MOST_FILES), ("threads", MOST_THREADS), ("pss", MOST_GROWTH)):
            grown = what[name]["last_quarter"] - what[name]["second_quarter"]
            if grown > bound:
                wrong.append(f"{role}: {grown:,.0f} more {name} in the last quarter than in the second")
    return wrong


WHOLE = {"queue": "waiting", "held": "held", "log, msgs": "messages", "log, disk": "disk", "archive": "archive"}
SERIES = ("rows", "series", "fault_times")
TOLD = (
    "capacity", "rate", "acknowledged", "unknown", "refused", "held_back", "faults", "submitted", "ended", "lost",
    "ended_twice", "waiting", "at_the_end",
)  # fmt: skip


def draw(found: dict[str, Any], say: Any) -> None:
    say(f"\n{'process':<12} {'memory (PSS)':<62} {'MiB':>13} {'KiB/min':>16} files threads")
    for role, series in sorted(found["series"].items()):
        what, values = found["processes"][role], [row[1] for row in series]
        slope = what["pss_slope"]
        grows = f"{slope['kib_a_minute']:+.0f} ± {slope['give_or_take']:.0f}" if slope else "too short"
        ends = f"{min(values) / (1 << 20):.1f}-{max(values) / (1 << 20):.1f}"
        held = f"{what['files']['most']:>5} {what['threads']['most']:>7}"
        say(f"{role:<12} {line(values):<62} {ends:>13} {grows:>16} {held}")
    for name, key in WHOLE.items():
        values = [row[key] for row in found["rows"]]
        if values:
            say(f"{name:<12} {line(values):<62} {min(values):,.0f} to {max(values):,.0f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--share", type=float, default=0.8, help="of what the machine can do")
    parser.add_argument("--rate", type=float, default=0.0, help="tasks a second, whatever the machine can do")
    parser.add_argument("--every", default="5-40", help="seconds between faults, at least and at most")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="two minutes, at most 400 tasks/s, a fault every 2 to 8 s")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, help="write the JSON, with every sample, to this file")
    options = parser.parse_args()
    minutes = 2.0 if options.short and options.minutes == 60.0 else options.minutes
    low, _, high = ("2-8" if options.short else options.every).partition("-")
    plan = Plan(
        minutes * 60, options.share, options.rate, 400.0 if options.short else 0.0, (float(low), float(high or low)),
        options.seed, flood=10_000 if options.short else 20_000, look=1.0 if options.short else 5.0,
        warm=10.0 if options.short else 30.0,
    )  # fmt: skip
    say = (lambda *_: None) if options.json else print
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(Path(folder), plan, say))
    wrong = verdict(found)
    found["wrong"] = wrong
    if options.out:
        options.out.write_text(json.dumps(found))
    if options.json:
        print(json.dumps({name: value for name, value in found.items() if name not in SERIES}))
    else:
        draw(found, print)
        for name in TOLD:
            print(f"{name.replace('_', ' '):14} {found[name]}")
        print("\n".join(wrong) if wrong else "nothing grows, nothing is lost")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
