"""`make bench`: dspex beside raw nats-py, in one run, on the same server settings, A B A B.

Absolute numbers are of this machine and this hour; the ratios are what travels. `--short` is for CI: fewer rounds, the
same measurements. Nothing here decides a test.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nats
import uvloop
from programs import Echo, Nap

from dspex import System
from dspex.bus.client import Client
from dspex.bus.server import Server
from dspex.bus.streams import jetstream_api
from dspex.compose.caller import Caller
from dspex.core.codec import decode_commit
from dspex.core.events import TaskCompleted
from dspex.core.subjects import Subjects
from dspex.store.jetstream import JetStreamLog

RAW = Path(__file__).with_name("raw.py")
BODY = b'{"text":"a question of the usual length, more or less","number":7}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="fewer rounds and tasks")
    parser.add_argument("--json", action="store_true", help="one JSON object at the end, nothing else")
    parser.add_argument("--only", default="", help="tasks, ask, life or import")
    options = parser.parse_args()
    rounds, tasks, asks = (2, 10_000, 500) if options.short else (5, 30_000, 3_000)
    say: Callable[..., None] = (lambda *_: None) if options.json else print
    say(f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    result: dict[str, Any] = {}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "tasks": lambda: bench_tasks(rounds, tasks, say),
        "ask": lambda: bench_ask(rounds, asks, say),
        "life": lambda: bench_life(rounds, 10 if options.short else 50, say),
        "import": lambda: bench_import(rounds, say),
    }
    for name, part in parts.items():
        if options.only in ("", name):
            result[name] = part()
    if options.json:
        print(json.dumps(result))


def median(values: list[float]) -> float:
    return statistics.median(values)


# -- durable tasks


def bench_tasks(rounds: int, count: int, say: Callable[..., None]) -> dict[str, Any]:
    """One agent beside four ways to write the same worker with nats-py alone; each drains a queue that is full."""
    found: dict[str, list[float]] = {"dspex": [], "archived": [], "fetch": [], "push": [], "pull": [], "group": []}
    for _ in range(rounds):
        found["dspex"].append(uvloop.run(durable_tasks(count, archive=False)))
        found["archived"].append(uvloop.run(durable_tasks(count, archive=True)))
        for kind in ("fetch", "push", "pull"):
            found[kind].append(uvloop.run(raw_work_queue(kind, count)))
        found["group"].append(uvloop.run(raw_queue_group(count)))
    say("\ntasks per second of one worker                                            each      dspex / it")
    rows = {
        "dspex": "dspex: validated, two events a task in the log, compare-and-set",
        "archived": "the same, with the archivist writing on the same two cores",
        "fetch": "nats-py, work queue, fetch(100), one reply and one ack a task",
        "push": "nats-py, work queue, callback, one reply and one ack a task",
        "pull": "nats-py, work queue, overlapping pulls by hand, the same",
        "group": "nats-py, core queue group, one reply a task, nothing stored",
    }
    ratios = {
        name: median([a / b for a, b in zip(found["dspex"], rates, strict=True)]) for name, rates in found.items()
    }
    for name, label in rows.items():
        say(f"{label:<66} {median(found[name]):>9,.0f} {ratios[name]:>12.2f}")
    return {"per_second": {name: median(rates) for name, rates in found.items()}, "ratios": ratios}


async def durable_tasks(count: int, *, archive: bool) -> float:
    """Preload the queue while nobody serves, start one agent, and read from the log how fast it went."""
    with tempfile.TemporaryDirectory() as folder:
        async with System(Echo, data=folder, durability="process"):
            pass  # registers the program, so that its doors are open without agents
        server = Server(Path(folder) / "server")
        server.start()
        await preload(server.url, "dspex.task.echo", count)
        server.stop()
        async with System(Echo, data=folder, durability="process", archive=archive) as system:
            return await completion_rate(system.url, count)


async def preload(url: str, subject: str, count: int) -> None:
    client = await Client.connect(url)
    waiting = [client.call(subject, BODY) for _ in range(0)]
    for number in range(count):
        waiting.append(client.call(subject, BODY))
        if number % 1000 == 999:
            await asyncio.gather(*waiting)
            waiting.clear()
    await asyncio.gather(*waiting)
    await client.close()


async def completion_rate(url: str, count: int) -> float:
    """Completions per second between the first and the last, by the times the log stored them; checks them all."""
    client = await Client.connect(url)
    info = await jetstream_api(client, "STREAM.INFO.DSPEX")
    while info["state"]["num_subjects"] < count:
        await asyncio.sleep(0.2)
        info = await jetstream_api(client, "STREAM.INFO.DSPEX")
    await asyncio.sleep(0.2)
    log = JetStreamLog(client, Subjects(), "bench")
    times: list[float] = []
    after = 0
    while entries := await log.scan(after, 5000, "dspex.event.task.echo.*"):
        for entry in entries:
            assert isinstance(decode_commit(entry.body)[-1].data, TaskCompleted)
            times.append(entry.time)
        after = entries[-1].position
    assert len(times) == count, f"{len(times)} of {count} completed"
    await client.close()
    return (count - 1) / (max(times) - min(times))


async def raw_work_queue(kind: str, count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.start()
        client = await nats.connect(server.url)
        js = client.jetstream()
        await js.add_stream(name="RAWQ", subjects=["raw.work"], retention="workqueue")
        if kind != "push":
            await js.add_consumer("RAWQ", durable_name="work", ack_policy="explicit", max_ack_pending=65_536)
        await client.close()
        await preload(server.url, "raw.work", count)
        try:
            return await asyncio.to_thread(lambda: raw(kind, server.url, count)["per_second"])
        finally:
            server.stop()


async def raw_queue_group(count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.start()
        process = start_raw("queue_group", server.url, count)
        client = await Client.connect(server.url)
        for number in range(count):
            client.publish("raw.group", BODY, reply="raw.reply")
            if number % 256 == 255:
                await client.flush()
        await client.flush()
        output = await asyncio.to_thread(process.communicate)
        await client.close()
        server.stop()
        return float(json.loads(output[0].splitlines()[-1])["per_second"])


def start_raw(kind: str, url: str, count: int) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, str(RAW), kind, url, str(count)], stdout=subprocess.PIPE, text=True)
    if kind in ("queue_group", "responder"):
        assert process.stdout
        process.stdout.readline()
    return process


def raw(kind: str, url: str, count: int) -> dict[str, float]:
    output, _ = start_raw(kind, url, count).communicate()
    answer: dict[str, float] = json.loads(output.splitlines()[-1])
    return answer


# -- ask


def bench_ask(rounds: int, count: int, say: Callable[..., None]) -> dict[str, Any]:
    found: dict[str, list[tuple[float, float]]] = {"raw": [], "process": [], "power": []}
    for _ in range(rounds):
        found["raw"].append(uvloop.run(raw_latency(count)))
        found["process"].append(uvloop.run(ask_latency(count, "process")))
        found["power"].append(uvloop.run(ask_latency(max(count // 5, 100), "power")))
    figures = {
        name: {"p50_ms": median([p50 for p50, _ in values]), "p99_ms": median([p99 for _, p99 in values])}
        for name, values in found.items()
    }
    ratio = median([ours[0] / base[0] for ours, base in zip(found["process"], found["raw"], strict=True)])
    say("\nlatency, one at a time                         p50          p99")
    for name, label in (
        ("raw", "raw nats-py request/reply"),
        ("process", 'ask, durability "process"'),
        ("power", 'ask, durability "power"'),
    ):
        say(f"{label:<40} {figures[name]['p50_ms']:>8.3f} ms {figures[name]['p99_ms']:>9.3f} ms")
    say(f'ask ("process") beside raw, p50: {ratio:.2f} times')
    return {**figures, "ratio_p50": ratio}


async def ask_latency(count: int, durability: Any) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        async with System(Echo, data=folder, durability=durability) as system:
            caller = await Caller.connect(system.url)
            times = []
            for _ in range(count):
                started = time.perf_counter()
                await caller.ask("echo", BODY)
                times.append((time.perf_counter() - started) * 1e3)
            await caller.close()
    return percentiles(times)


async def raw_latency(count: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(Path(folder))
        server.start()
        process = start_raw("responder", server.url, 0)
        client = await nats.connect(server.url)
        times = []
        for _ in range(count):
            started = time.perf_counter()
            await client.request("raw.ask", BODY, timeout=5)
            times.append((time.perf_counter() - started) * 1e3)
        await client.close()
        process.kill()
        process.communicate()
        server.stop()
    return percentiles(times)


def percentiles(times: list[float]) -> tuple[float, float]:
    times = sorted(times[len(times) // 10 :])
    return times[len(times) // 2], times[int(len(times) * 0.99)]


# -- life: start, restart, memory


def bench_life(rounds: int, agents: int, say: Callable[..., None]) -> dict[str, Any]:
    return uvloop.run(life(rounds, agents, say))


async def life(rounds: int, agents: int, say: Callable[..., None]) -> dict[str, Any]:
    restarts: list[float] = []
    cold: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            started = time.perf_counter()
            async with System(Echo, data=folder, durability="process"):
                cold.append((time.perf_counter() - started) * 1e3)
        async with System(Echo, agents=2, data=folder, durability="process") as system:
            caller = await Caller.connect(system.url)
            for _ in range(rounds * 2):
                restarts.append(await restart_time(caller))
                await asyncio.sleep(11)  # past the time in which deaths count as a crash loop
                if len(restarts) >= rounds:
                    break
            await caller.close()
        born = fork_to_serving(folder)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        async with System(Echo, agents=agents, data=folder, durability="process") as system:
            many = time.perf_counter() - started
            pids = [p["pid"] for p in await system.aprocesses() if p["program"]]
            assert len(pids) == agents
            memory = [pss(pid) for pid in pids]
    moved = await takeover_times(rounds)
    figures = {
        "system_start_ms": median(cold),
        "fork_to_serving_ms": born,
        "restart_after_kill_ms": median(restarts),
        "takeover_after_kill_ms": {"p50": median(moved), "max": max(moved)},
        "agents": agents,
        "agents_start_s": many,
        "agents_pss_mib": sum(memory) / 2**20,
        "agent_pss_mib": median([m / 2**20 for m in memory]),
    }
    say(f"\nsystem, from nothing to serving                     {figures['system_start_ms']:>8.0f} ms")
    say(f"agent, from fork to serving                         {born:>8.0f} ms")
    say(f"agent, from kill -9 to its successor serving        {figures['restart_after_kill_ms']:>8.0f} ms")
    say(f"its tasks, from kill -9 to claimed by another       {median(moved):>8.0f} ms, at most {max(moved):.0f} ms")
    say(f"{agents} agents, from nothing to all serving              {many:>8.2f} s")
    each, all_of_them = figures["agent_pss_mib"], figures["agents_pss_mib"]
    say(f"{agents} agents, memory (PSS): all {all_of_them:.0f} MiB, each {each:.1f} MiB")
    return figures


async def takeover_times(rounds: int) -> list[float]:
    """Milliseconds from SIGKILL of an agent to the claim of each task it held by another, by the times in the log."""
    found: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            async with System(Nap, agents=2, data=folder, durability="process") as system:
                tasks = [await system.asubmit(text=str(number)) for number in range(20)]
                await asyncio.sleep(0.2)
                victim = next(process for process in await system.aprocesses() if process["program"])
                killed = time.time()
                os.kill(victim["pid"], signal.SIGKILL)
                for task in tasks:
                    await system.aresult(task)
                    again = [
                        event
                        for event in await system.aevents(task)
                        if event["type"] == "TaskClaimed" and event["data"]["attempt"] > 1
                    ]
                    found += [(from_rfc3339(event["time"]) - killed) * 1e3 for event in again]
    return found


async def restart_time(caller: Caller) -> float:
    """Milliseconds from SIGKILL to the successor's AgentStarted, by the log's own clock and ours on one machine."""
    victim = next(p for p in await caller.processes() if p["program"])
    head = (await caller.read_log(limit=1))["head"]
    killed = time.time()
    os.kill(victim["pid"], signal.SIGKILL)
    while True:
        page = await caller.read_log(wait=5, after=head, limit=1000)
        for event in page["events"]:
            if event["type"] == "AgentStarted" and event["aggregate"].endswith(victim["agent"]):
                return (from_rfc3339(event["time"]) - killed) * 1e3
        head = page["next"]


def fork_to_serving(folder: str) -> float:
    """Milliseconds from fork to serving, as the supervisor measures it."""
    from dspex.agents.agent import AgentSpec, agent_main
    from dspex.agents.supervisor import Life, fork_child

    times = []
    with System(Echo, data=folder, durability="process") as system:
        for number in range(5):
            spec = AgentSpec(f"echo-bench-{number}", Echo, system.url)
            started = time.perf_counter()
            pid, link = fork_child(lambda line, spec=spec: agent_main(line, Life(), spec), lambda: None)
            while not any(message.get("state") == "serving" for message in link.receive()):
                time.sleep(0.0005)
            times.append((time.perf_counter() - started) * 1e3)
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
    return median(times)


def from_rfc3339(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def pss(pid: int) -> int:
    """Proportional set size in bytes: shared pages are counted in parts."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


# -- import


def bench_import(rounds: int, say: Callable[..., None]) -> dict[str, Any]:
    def timed(*arguments: str) -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        return (time.perf_counter() - started) * 1e3

    bare, ours, helped = [], [], []
    for _ in range(rounds + 1):
        bare.append(timed("-c", "pass"))
        ours.append(timed("-c", "import dspex"))
        helped.append(timed("-m", "dspex", "--help"))
    figures = {"python_ms": median(bare), "import_dspex_ms": median(ours), "help_ms": median(helped)}
    python, imported, help_shown = (f"{value:.0f} ms" for value in figures.values())
    say(f"\npython -c pass {python}, import dspex {imported}, dspex --help {help_shown}")
    return figures


if __name__ == "__main__":
    main()
