"""The same steps as a LangGraph graph with its SQLite checkpointer; arguments and output as in `dspex_steps.py`.

The way is "loop" (one after the other, `invoke`), "threads" (eight at once) or "async" (`AsyncSqliteSaver`, up to 40 at
once). Its file is in WAL mode, as the saver sets it; "process" and "behind" are synchronous=OFF, "power" is FULL.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
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

folder, workflows, steps, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
level, way = sys.argv[5:]
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


def report(rate: float, alone: float, done: int, cpu: float, rows: int) -> None:
    assert rows >= done, rows
    packages = ("langgraph", "langgraph-checkpoint-sqlite")
    print(json.dumps({
        "rate": rate, "alone": alone, "cpu": cpu / done,
        "version": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages),
        "said": f"WAL, synchronous={synchronous}, durability={durability!r}, {way}",
    }))  # fmt: skip


def in_threads() -> None:
    connection = sqlite3.connect(file, check_same_thread=False)
    saver = SqliteSaver(connection)
    saver.setup()
    connection.execute(f"PRAGMA synchronous={synchronous}")
    app = graph(step).compile(checkpointer=saver)

    names = itertools.count()

    def measure(at_once: int, seconds: float) -> tuple[int, float]:
        """How many steps were done, and how many a second, in at least so many seconds."""
        started = time.perf_counter()

        def one_by_one(_: int) -> int:
            done = 0
            while time.perf_counter() - started < seconds:
                assert app.invoke({"n": 0}, config(next(names)), durability=durability)["n"] == steps
                done += steps
            return done

        if at_once == 1:
            done = one_by_one(0)
        else:
            with ThreadPoolExecutor(at_once) as pool:
                done = sum(pool.map(one_by_one, range(at_once)))
        return done, done / (time.perf_counter() - started)

    measure(1, 0.2)
    _, alone = measure(1, seconds / 4)
    used = time.process_time()
    done, rate = measure(8 if way == "threads" else 1, seconds)
    used = time.process_time() - used
    report(rate, alone, done, used, connection.execute("SELECT count(*) FROM checkpoints").fetchone()[0])


async def in_loop() -> None:
    async with aiosqlite.connect(file) as connection:
        saver = AsyncSqliteSaver(connection)
        await saver.setup()
        await connection.execute(f"PRAGMA synchronous={synchronous}")
        app = graph(async_step).compile(checkpointer=saver)

        names = itertools.count()

        async def measure(at_once: int, seconds: float) -> tuple[int, float]:
            done, started = 0, time.perf_counter()

            async def one_by_one() -> None:
                nonlocal done
                while time.perf_counter() - started < seconds:
                    assert (await app.ainvoke({"n": 0}, config(next(names)), durability=durability))["n"] == steps
                    done += steps

            await asyncio.gather(*(one_by_one() for _ in range(at_once)))
            return done, done / (time.perf_counter() - started)

        await measure(1, 0.2)
        _, alone = await measure(1, seconds / 4)
        used = time.process_time()
        done, rate = await measure(min(workflows, 40), seconds)
        used = time.process_time() - used
        (rows,) = await (await connection.execute("SELECT count(*) FROM checkpoints")).fetchone()  # type: ignore[misc]
    report(rate, alone, done, used, rows)


if way == "async":
    asyncio.run(in_loop())
else:
    in_threads()
