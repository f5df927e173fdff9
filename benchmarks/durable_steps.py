"""Durable steps per second: dspex beside LangGraph (SqliteSaver) and DBOS (SQLite), in one run, turn by turn.

    python benchmarks/durable_steps.py [--workflows 40] [--steps 25] [--rounds 3] [--json]

The step is the same everywhere: a dict with a counter goes in, one with the counter incremented comes out, and the next
step begins when the one before is safe. The peers are installed from PyPI into a throwaway virtual environment; one
that cannot be installed is left out with a sentence. What "safe" means is not the same everywhere, and is printed:

- dspex, durability "process": every record is acknowledged by nats-server (a process of its own) before the next step
  begins; no fsync per step. It survives the death of any process of ours, not of the machine.
- LangGraph SqliteSaver: WAL as it comes with synchronous=FULL, the default, so an fsync of the WAL for each checkpoint;
  the same with synchronous=OFF is measured too, which is what "process" means.
- DBOS on SQLite: as it comes. Its PRAGMAs are printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]

PEERS = {
    "langgraph": ["langgraph", "langgraph-checkpoint-sqlite"],
    "dbos": ["dbos"],
}

LANGGRAPH = '''
import sqlite3, sys, time
from typing import TypedDict
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.graph import END, START, StateGraph

folder, workflows, steps, sync = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]

class State(TypedDict):
    n: int

def step(state):
    return {"n": state["n"] + 1}

graph = StateGraph(State)
graph.add_node("step", step)
graph.add_edge(START, "step")
graph.add_conditional_edges("step", lambda state: "step" if state["n"] < steps else END)
connection = sqlite3.connect(f"{folder}/lg-{time.time_ns()}.db", check_same_thread=False)
saver = SqliteSaver(connection)
saver.setup()
connection.execute(f"PRAGMA synchronous={sync}")
app = graph.compile(checkpointer=saver)
def run(name):
    config = {"configurable": {"thread_id": name}, "recursion_limit": steps + 10}
    try:
        return app.invoke({"n": 0}, config, durability="sync")["n"]
    except TypeError:
        return app.invoke({"n": 0}, config)["n"]
run("warm")
started = time.perf_counter()
for w in range(workflows):
    assert run(f"w{w}") == steps
seconds = time.perf_counter() - started
rows = connection.execute("SELECT count(*) FROM checkpoints").fetchone()[0]
assert rows >= workflows * steps, rows
pragmas = [connection.execute(f"PRAGMA {p}").fetchone()[0] for p in ("journal_mode", "synchronous")]
print(f"RESULT {workflows * steps / seconds} journal_mode={pragmas[0]} synchronous={pragmas[1]}")
'''

DBOS = '''
import logging, sqlite3, sys, time
from concurrent.futures import ThreadPoolExecutor
from dbos import DBOS
folder, workflows, steps, _ = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
file = f"{folder}/dbos-{time.time_ns()}.db"
url = f"sqlite:///{file}"
DBOS(config={"name": "steps", "system_database_url": url, "log_level": "ERROR", "run_admin_server": False})

@DBOS.step()
def step(state):
    return {"n": state["n"] + 1}

@DBOS.workflow()
def flow():
    state = {"n": 0}
    for _ in range(steps):
        state = step(state)
    return state["n"]

DBOS.launch()
flow()
started = time.perf_counter()
with ThreadPoolExecutor(8) as pool:
    assert set(pool.map(lambda _: flow(), range(workflows))) == {steps}
seconds = time.perf_counter() - started
connection = sqlite3.connect(file)
rows = connection.execute("SELECT count(*) FROM operation_outputs").fetchone()[0]
assert rows >= workflows * steps, rows
mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
print(f"RESULT {workflows * steps / seconds} journal_mode={mode} synchronous as its engine sets it", flush=True)
import os
os._exit(0)
'''

OURS = '''
import asyncio, sys, time
from dspex import Program, Schema, System, effect
folder, workflows, steps, agents = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

@effect
async def step(state: dict[str, int]) -> dict[str, int]:
    return {"n": state["n"] + 1}

class Flow(Program):
    timeout = 3000
    class Input(Schema):
        steps: int
    class Output(Schema):
        n: int
    async def predict(self, input: Input) -> Output:
        state = {"n": 0}
        for _ in range(input.steps):
            state = await step(state)
        return self.Output(n=state["n"])

if __name__ == "__main__":
    with System(Flow, agents=agents, data=f"{folder}/ours-{time.time_ns()}", durability="process") as system:
        system.ask(steps=steps)
        one = time.perf_counter()
        for _ in range(max(3, workflows // 10)):
            assert system.ask(steps=steps).n == steps
        one = max(3, workflows // 10) * steps / (time.perf_counter() - one)
        started = time.perf_counter()
        tasks = [system.submit(steps=steps) for _ in range(workflows)]
        assert {system.result(task).n for task in tasks} == {steps}
        seconds = time.perf_counter() - started
        kinds = [event["type"] for event in system.events(tasks[-1])]
        assert kinds.count("EffectRecorded") == steps, kinds
        said = f"acknowledged by nats-server, no fsync a step; one workflow at a time {one:,.0f}/s"
        print(f"RESULT {workflows * steps / seconds} {said}")
'''


def install(folder: Path, name: str) -> Path | None:
    """A Python that has the peer; None when it cannot be installed."""
    place = folder / f"venv-{name}"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    command = [python, "-m", "pip", "-q", "--disable-pip-version-check", "install", *PEERS[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} is left out: it cannot be installed here ({done.stderr.strip().splitlines()[-1][:200]})")
        return None
    return python


def measure(python: Path, code: str, folder: Path, *arguments: object) -> tuple[float, str]:
    """Steps per second, and what the run says of its durability."""
    script = folder / f"run-{time.time_ns()}.py"
    script.write_text(code)
    done = subprocess.run(
        [python, script, folder, *map(str, arguments)], capture_output=True, text=True, timeout=600, cwd=folder
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(done.stderr[-2000:])
    _, figure, said = lines[0].split(" ", 2)
    return float(figure), said


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workflows", type=int, default=40)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="a Python that has the peers, in place of installing them")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        runs = {"dspex": (Path(sys.executable), OURS, 1)}
        for name, code, variants in (("langgraph", LANGGRAPH, ("FULL", "OFF")), ("dbos", DBOS, ("default",))):
            python = options.peers or install(folder, name)
            if python:
                runs |= {f"{name} ({variant})": (python, code, variant) for variant in variants}
        figures: dict[str, list[float]] = {name: [] for name in runs}
        said = {}
        for _ in range(options.rounds):
            for name, (python, code, variant) in list(runs.items()):
                try:
                    figure, said[name] = measure(python, code, folder, options.workflows, options.steps, variant)
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    print(f"{name} is left out: {str(error).strip().splitlines()[-1][:300]}")
                    runs.pop(name)
                    continue
                figures[name].append(figure)
        ours = median(figures["dspex"])
        report = {
            name: {"steps_per_second": round(median(found)), "rounds": [round(f) for f in found],
                   "dspex_is": round(ours / median(found), 1), "durability": said[name]}
            for name, found in figures.items() if found
        }  # fmt: skip
    if options.json:
        print(json.dumps(report))
    else:
        for name, row in report.items():
            rate, ratio = row["steps_per_second"], row["dspex_is"]
            print(f"{name:18} {rate:>8,} steps/s   dspex is {ratio}x   {row['durability']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
