"""Poisonous tasks among good ones, and agents killed from outside: who is set aside, and after how many deaths.

    make poison ARGS="--good 200 --bad 3 --agents 3 --kills 20 --seed 1"

Three campaigns, each on a system of its own: `bad` tasks (exit, SIGKILL, segmentation fault in turn) among `good` ones;
`kills` times SIGKILL from outside to a random agent, every fifth time one that is frozen, while good tasks of 2 s run;
and 14 that exit on a single agent, which dies more often in a row than a supervisor lets it when nothing comes of it.
Exit code 1 when a good task is set aside or does not complete exactly once, a bad one is not, or a bound is passed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dspex.compose.caller import Caller
from dspex.core.errors import DspexError

APP = f"{Path(__file__).with_name('poisonous.py')}:Careful"
KINDS = ("exit", "kill", "segfault")
ATTEMPTS = 3
ENDS = {"TaskCompleted", "TaskFailed", "TaskDeadLettered", "TaskDuplicate", "TaskCancelled"}


@contextmanager
def system(agents: int) -> Iterator[str]:
    """A system in a folder of its own; its address."""
    with tempfile.TemporaryDirectory(prefix="poison-") as folder:
        command = [
            sys.executable, "-m", "dspex", "up", APP, "--agents", str(agents), "--data", folder, "--json",
            "--durability", "process",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout
        try:
            yield json.loads(process.stdout.readline())["nats"]
        finally:
            process.terminate()
            process.wait(60)
            process.stdout.close()


async def submitted(caller: Caller, body: dict[str, Any]) -> str:
    return await caller.submit("careful", json.dumps(body).encode(), key=os.urandom(8).hex())


async def ended(caller: Caller, tasks: set[str], patience: float) -> list[dict[str, Any]]:
    """The events of the program, once all of the tasks have ended."""
    until = time.monotonic() + patience
    while True:
        events = [event async for event in caller.events(program="careful")]
        left = tasks - {event["aggregate"].split(".")[2] for event in events if event["type"] in ENDS}
        if not left:
            return events
        if time.monotonic() > until:
            raise SystemExit(f"{len(left)} tasks have not ended: {sorted(left)[:5]}")
        await asyncio.sleep(1)


def judged(name: str, events: list[dict[str, Any]], good: set[str], bad: dict[str, str]) -> bool:
    """Print what became of the tasks; whether it is as promised."""
    ends = [(event["aggregate"].split(".")[2], event["type"]) for event in events if event["type"] in ENDS]
    died = [(event["aggregate"].split(".")[2], event["data"]) for event in events if event["type"] == "AttemptDied"]
    tries = Counter(event["aggregate"].split(".")[2] for event in events if event["type"] == "TaskClaimed")
    meant = dict.fromkeys(good, "TaskCompleted") | dict.fromkeys(bad, "TaskDeadLettered")
    wrong = [f"{task} has {kind}" for task, kind in ends if kind != meant[task]]
    wrong += [f"{task} ended {n} times" for task, n in Counter(task for task, _ in ends).items() if n > 1]
    for task, do in bad.items():
        alone = sum(data["alone"] for other, data in died if other == task)
        most = 2 * ATTEMPTS if do == "kill" else ATTEMPTS
        wrong += [f"{task} ({do}) died alone {alone} times, not {most}"] if alone != most else []
        # A death that is not seen to be one costs another attempt; the log says which were.
        unseen = tries[task] - 1 - sum(other == task for other, _ in died)
        print(f"  {task:>6} {do:<9} {tries[task]:>3} claims, {alone} deaths alone, {max(unseen, 0)} not seen")
    innocent = sum(data["alone"] for task, data in died if task in good)
    crashes = Counter(event["data"]["reason"] for event in events if event["type"] == "AgentCrashed")
    verdict = "; ".join(wrong[:5]) or "as promised"
    print(f"{name}: {len(good)} good, {len(bad)} bad, {innocent} deaths of good ones alone")
    print(f"  agents died of {dict(crashes)}: {verdict}")
    return not wrong


async def poisons(good: int, bad: int, agents: int) -> bool:
    with system(agents) as url:
        async with await Caller.connect(url) as caller:
            todo = [{"n": n} for n in range(good)]
            for number in range(bad):
                todo.insert(good * (number + 1) // (bad + 1), {"n": -1, "do": KINDS[number % len(KINDS)]})
            tasks = {await submitted(caller, body): str(body.get("do", "")) for body in todo}
            events = await ended(caller, set(tasks), 600)
            poison = {task: do for task, do in tasks.items() if do}
            return judged(f"{bad} bad on {agents} agents", events, set(tasks) - set(poison), poison)


async def kills(count: int, agents: int, chance: random.Random) -> bool:
    with system(agents) as url:
        async with await Caller.connect(url) as caller:
            tasks = {await submitted(caller, {"n": n, "seconds": 2.0}) for n in range(20 * agents)}
            for number in range(count):
                pid = await _agent(caller, chance)
                if number % 5 == 4:
                    os.kill(pid, signal.SIGSTOP)
                    await asyncio.sleep(1.5)
                os.kill(pid, signal.SIGKILL)
                await asyncio.sleep(0.4 + chance.random() * 0.6)
            return judged(f"{count} kills from outside", await ended(caller, tasks, 600), tasks, {})


async def _agent(caller: Caller, chance: random.Random) -> int:
    while True:
        try:
            found = [it["pid"] for it in await caller.processes() if it["program"] == "careful" and it["pid"]]
        except DspexError:
            found = []
        if found:
            return int(chance.choice(found))
        await asyncio.sleep(0.05)


async def alone(bad: int) -> bool:
    with system(1) as url:
        async with await Caller.connect(url) as caller:
            poison = {await submitted(caller, {"n": n, "do": "exit"}): "exit" for n in range(bad)}
            good = {await submitted(caller, {"n": n}) for n in range(10)}
            return judged(f"{bad} bad on one agent", await ended(caller, {*good, *poison}, 900), good, poison)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--good", type=int, default=200)
    parser.add_argument("--bad", type=int, default=3)
    parser.add_argument("--agents", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    said = parser.parse_args()
    found = [
        asyncio.run(poisons(said.good, said.bad, said.agents)),
        asyncio.run(kills(said.kills, said.agents, random.Random(said.seed))),
        asyncio.run(alone(14)),
    ]
    return 0 if all(found) else 1


if __name__ == "__main__":
    sys.exit(main())
