"""The same steps as a LangGraph graph with its SQLite checkpointer; arguments and output as in `dspex_steps.py`.

The way is "loop" (one after the other, `invoke`), "threads" (eight at once) or "async" (`AsyncSqliteSaver`, all at
once). Its file is in WAL mode, as the saver sets it; "process" and "behind" are synchronous=OFF, "power" is FULL.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import sqlite3
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypedDict

import aiosqlite
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver
from langgraph.graph import END, START, StateGraph

folder, workflows, steps, level, way = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
file = f"{folder}/langgraph-{time.time_ns()}.db"
synchronous = "FULL" if level == "power" else "OFF"
durability: Any = "async" if level == "behind" else "sync"


class State(TypedDict):
    n: int


def step(state: State) -> State:
    return {"n": state["n"] + 1}


async def async_step(state: State) -> State:
    return {"n": state["n"] + 1}


def graph(of: Any) -> StateGraph[State]:
    made = StateGraph(State)
    made.add_node("step", of)
    made.add_edge(START, "step")
    made.add_conditional_edges("step", lambda state: "step" if state["n"] < steps else END)
    return made


def config(name: object) -> Any:
    return {"configurable": {"thread_id": str(name)}, "recursion_limit": steps + 10}


def report(rate: float, alone: float, cpu: float, rows: int) -> None:
    assert rows >= workflows * steps, rows
    packages = ("langgraph", "langgraph-checkpoint-sqlite")
    print(json.dumps({
        "rate": rate, "alone": alone, "cpu": cpu / workflows / steps,
        "version": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "said": f"WAL, synchronous={synchronous}, durability={durability!r}, {way}",
    }))  # fmt: skip


def in_threads() -> None:
    connection = sqlite3.connect(file, check_same_thread=False)
    saver = SqliteSaver(connection)
    saver.setup()
    connection.execute(f"PRAGMA synchronous={synchronous}")
    app = graph(step).compile(checkpointer=saver)

    def run(name: object) -> None:
        assert app.invoke({"n": 0}, config(name), durability=durability)["n"] == steps

    def measure(prefix: str, count: int, at_once: int) -> float:
        started = time.perf_counter()
        if at_once == 1:
            for number in range(count):
                run(f"{prefix}{number}")
        else:
            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(run, [f"{prefix}{number}" for number in range(count)]))
        return count * steps / (time.perf_counter() - started)

    run("warm")
    alone = measure("alone", max(4, workflows // 20), 1)
    used = time.process_time()
    rate = measure("w", workflows, 8 if way == "threads" else 1)
    used = time.process_time() - used
    report(rate, alone, used, connection.execute("SELECT count(*) FROM checkpoints").fetchone()[0])


async def in_loop() -> None:
    async with aiosqlite.connect(file) as connection:
        saver = AsyncSqliteSaver(connection)
        await saver.setup()
        await connection.execute(f"PRAGMA synchronous={synchronous}")
        app = graph(async_step).compile(checkpointer=saver)

        async def run(name: str) -> None:
            assert (await app.ainvoke({"n": 0}, config(name), durability=durability))["n"] == steps

        await run("warm")
        started, few = time.perf_counter(), max(4, workflows // 20)
        for number in range(few):
            await run(f"alone{number}")
        alone = few * steps / (time.perf_counter() - started)
        started, used = time.perf_counter(), time.process_time()
        await asyncio.gather(*(run(f"w{number}") for number in range(workflows)))
        rate, used = workflows * steps / (time.perf_counter() - started), time.process_time() - used
        (rows,) = await (await connection.execute("SELECT count(*) FROM checkpoints")).fetchone()  # type: ignore[misc]
    report(rate, alone, used, rows)


if way == "async":
    asyncio.run(in_loop())
else:
    in_threads()
