"""What limits cost: the processor time of agents and registrar for one task, with and without a rate and a concurrency
that are never reached, in turn and in one system. `python benchmarks/limits.py [--short]`."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.e2e.running import Running

from dspex.compose.caller import Caller

LIMITED = Path(__file__).resolve().parents[1] / "tests" / "e2e" / "limited.py"
TICK = os.sysconf("SC_CLK_TCK")
AT_ONCE = 200
LOOSE = {"rate": "100000/s", "concurrency": "2000"}


def spent(pid: int) -> float:
    """Seconds of a core that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


async def drain(caller: Caller, tasks: int) -> None:
    """Submit so many tasks and wait for the last."""
    last = ""
    for start in range(0, tasks, AT_ONCE):
        made = (caller.submit("quick", b"{}") for _ in range(min(AT_ONCE, tasks - start)))
        last = (await asyncio.gather(*made))[-1]
    await caller.result("quick", last)


async def measure(system: Running, rounds: int, tasks: int) -> dict[str, dict[str, float]]:
    """Microseconds for a task: of the agents, and of the registrar; the median of the rounds."""
    found: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    async with await Caller.connect(system.url) as caller:
        await drain(caller, tasks)
        for _ in range(rounds):
            for name in found:
                if name == "with":
                    await caller.limits("set", scope="quick", limits=LOOSE)
                elif (await caller.limits())["limits"]:
                    await caller.limits("clear", scope="quick")
                await asyncio.sleep(4.0)  # all hold to it, and permits have settled
                agents, registrar = system.agent_pids(), system.registrar()
                before = sum(map(spent, agents)), spent(registrar)
                await drain(caller, tasks)
                await asyncio.sleep(0.5)
                after = sum(map(spent, agents)), spent(registrar)
                found[name].append(((after[0] - before[0]) / tasks * 1e6, (after[1] - before[1]) / tasks * 1e6))
    return {
        name: {
            "agents": round(statistics.median(agents for agents, _ in rows), 1),
            "registrar": round(statistics.median(registrar for _, registrar in rows), 1),
        }
        for name, rows in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="one round of few tasks")
    arguments = parser.parse_args()
    rounds, tasks = (1, 500) if arguments.short else (5, 10_000)
    started = time.time()
    with tempfile.TemporaryDirectory() as folder, Running(Path(folder) / "data", (f"{LIMITED}:Quick", 2)) as system:
        found = asyncio.run(measure(system, rounds, tasks))
    about = {"tasks": tasks, "rounds": rounds, "load": os.getloadavg()[0], "took": round(time.time() - started)}
    print(json.dumps({"us": found, **about}))


if __name__ == "__main__":
    main()
