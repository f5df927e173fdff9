"""The steps as a dspex program. Arguments: folder, workflows at once, steps, seconds, level, way. Prints one
JSON object.

The level is "process" (every record acknowledged by the log's process before the next step begins, no fsync), "power"
(the same, on disk with fsync), or "behind" (the step only reads, so its record is written while the next goes on). The
way is "jetstream" or "sqlite", the log alone, one copy as the peers keep; or "archived": JetStream with a checksummed
second copy beside it, as dspex comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from dspex import Program, Schema, System, effect


async def step(state: dict[str, int]) -> dict[str, int]:
    return {"n": state["n"] + 1}


class Flow(Program):
    timeout = 3000
    concurrency = 1000
    written = effect(name="step")(step)
    behind = effect(name="step", read_only=True)(step)

    class Input(Schema):
        steps: int
        behind: bool = False

    class Output(Schema):
        n: int

    async def predict(self, input: Input) -> Output:
        state = {"n": 0}
        take = Flow.behind if input.behind else Flow.written
        for _ in range(input.steps):
            state = await take(state)
        return self.Output(n=state["n"])


def cpu_seconds() -> float:
    """The processor time of this process and everything below it: agent, server, supervisor. Linux only, else 0."""
    children: dict[int, list[int]] = {}
    used: dict[int, float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
            used[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    tree = [os.getpid()]
    for pid in tree:
        tree += children.get(pid, [])
    return sum(used.get(pid, 0.0) for pid in tree)


async def main(folder: str, workflows: int, steps: int, seconds: float, level: str, way: str) -> None:
    behind = level == "behind"
    durability = "power" if level == "power" else "process"
    data = f"{folder}/ours-{time.time_ns()}"
    kind: dict[str, Any] = {"log": "sqlite"} if way == "sqlite" else {"archive": way == "archived"}
    async with System(Flow, data=data, durability=durability, **kind) as system:

        async def run(at_once: int, seconds: float) -> tuple[int, float]:
            """How many steps were done, and how many a second, in at least so many seconds."""
            done, started = 0, time.perf_counter()

            async def one_by_one() -> None:
                nonlocal done
                while time.perf_counter() - started < seconds:
                    assert (await system.aask(steps=steps, behind=behind)).n == steps
                    done += steps

            await asyncio.gather(*(one_by_one() for _ in range(at_once)))
            return done, done / (time.perf_counter() - started)

        await run(1, 0.2)
        _, alone = await run(1, seconds / 4)
        used = cpu_seconds()
        done, rate = await run(workflows, seconds)
        used = cpu_seconds() - used
        task = await system.asubmit(steps=steps, behind=behind)
        await system.aresult(task)
        kinds = [event["type"] for event in await system.aevents(task)]
        assert kinds.count("EffectRecorded") == steps, kinds
    where = {"jetstream": "JetStream", "sqlite": "SQLite log", "archived": "JetStream and archive"}[way]
    said = {"process": "acknowledged", "power": "fsynced, acknowledged", "behind": "read_only"}[level]
    print(json.dumps({
        "rate": rate, "alone": alone, "cpu": used / done, "version": "dspex", "said": f"{where}, {said}",
    }))  # fmt: skip


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5], sys.argv[6]))
