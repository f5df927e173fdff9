"""The same steps as a DBOS workflow on SQLite; arguments and output as in `dspex_steps.py`.

The way is how many threads run workflows, or "async". Its file is put into WAL mode, where it is several times as fast
as in the rollback journal it comes with ("default" leaves that); "process" is synchronous=OFF, "power" is FULL.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dbos import DBOS
from sqlalchemy import Engine, event

folder, workflows, steps, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
level, way = sys.argv[5:]
file = f"{folder}/dbos-{time.time_ns()}.db"
synchronous = "FULL" if level == "power" else "OFF"
pragmas: set[str] = set()


@event.listens_for(Engine, "connect")
def connected(connection: Any, _: object) -> None:
    if way != "default":
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")
    found = {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}
    pragmas.add(", ".join(f"{name}={value}" for name, value in found.items()))


DBOS(config={
    "name": "steps", "system_database_url": f"sqlite:///{file}", "log_level": "ERROR", "run_admin_server": False,
})  # fmt: skip


@DBOS.step()
def step(state: dict[str, int]) -> dict[str, int]:
    return {"n": state["n"] + 1}


@DBOS.workflow()
def flow() -> int:
    state = {"n": 0}
    for _ in range(steps):
        state = step(state)
    return state["n"]


@DBOS.step()
async def async_step(state: dict[str, int]) -> dict[str, int]:
    return {"n": state["n"] + 1}


@DBOS.workflow()
async def async_flow() -> int:
    state = {"n": 0}
    for _ in range(steps):
        state = await async_step(state)
    return state["n"]


def measure(at_once: int, seconds: float) -> tuple[int, float]:
    """How many steps were done, and how many a second, in at least so many seconds."""
    started = time.perf_counter()

    def one_by_one(_: int) -> int:
        done = 0
        while time.perf_counter() - started < seconds:
            assert flow() == steps
            done += steps
        return done

    if at_once == 1:
        done = one_by_one(0)
    else:
        with ThreadPoolExecutor(at_once) as pool:
            done = sum(pool.map(one_by_one, range(at_once)))
    return done, done / (time.perf_counter() - started)


async def measure_async(at_once: int, seconds: float) -> tuple[int, float]:
    started = time.perf_counter()

    async def one_by_one() -> int:
        done = 0
        while time.perf_counter() - started < seconds:
            assert await async_flow() == steps
            done += steps
        return done

    done = sum(await asyncio.gather(*(one_by_one() for _ in range(at_once))))
    return done, done / (time.perf_counter() - started)


DBOS.launch()
measure(1, 0.2)
_, alone = measure(1, seconds / 4)
used = time.process_time()
if way == "async":
    done, rate = asyncio.run(measure_async(min(workflows, 40), seconds))
else:
    done, rate = measure(8 if way == "default" else int(way), seconds)
used = time.process_time() - used
rows = sqlite3.connect(file).execute("SELECT count(*) FROM operation_outputs").fetchone()[0]
assert rows >= done, rows
print(json.dumps({
    "rate": rate, "alone": alone, "cpu": used / done,
    "version": f"dbos {importlib.metadata.version('dbos')}",
    "said": f"{'; '.join(sorted(pragmas))}, {way if way in ('async', 'default') else f'{way} threads'}",
}), flush=True)  # fmt: skip
os._exit(0)
