"""The demo's work: the example programs with their labelled inputs, the system they run on, and the count of what
became of every task, taken from the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspex.compose.caller import Caller

__all__ = ["Job", "Part", "Running", "Tally", "load", "running"]

START = 60.0
OURS = ("DSPEX_", "NATS_")


@dataclass(frozen=True)
class Part:
    """One program of the demo: its file, its agents, and labelled inputs with the function that judges outputs."""

    name: str
    app: Path
    agents: int
    inputs: list[dict[str, Any]]
    labels: list[dict[str, Any]]
    judge: Callable[[dict[str, Any], bytes], float]


@dataclass(frozen=True)
class Job:
    """One task to be submitted: which program, and which of its inputs."""

    part: Part
    number: int

    @property
    def body(self) -> bytes:
        return json.dumps(self.part.inputs[self.number]).encode()


def examples_folder() -> Path:
    """Where the example programs are."""
    import dspex.examples

    return Path(str(dspex.examples.__file__)).parent


def load(file: str, agents: int, fields: tuple[str, ...]) -> Part:
    """An example with its labelled inputs; `fields` are those of a labelled example that are the input."""
    from dspex.compose.app import load_app

    app = examples_folder() / file
    (program,) = load_app(str(app))
    module = sys.modules[program.__module__]
    labels = list(module.examples())

    def judge(label: dict[str, Any], output: bytes) -> float:
        return float(module.score(label, program.Output.decode(output)))

    inputs = [{name: label[name] for name in fields} for label in labels]
    return Part(program.name, app, agents, inputs, labels, judge)


@dataclass
class Running:
    """A system that was started for the demo."""

    process: asyncio.subprocess.Process
    url: str
    data: Path


@asynccontextmanager
async def running(programs: list[tuple[str, Path, int]]) -> AsyncIterator[Running]:
    """`dspex up` on a data folder that is removed afterwards: (name, file, agents) each. Raises ConfigurationError."""
    from dspex.core.errors import ConfigurationError

    folder = Path(tempfile.mkdtemp(prefix="dspex-demo-"))
    process: asyncio.subprocess.Process | None = None
    try:
        tables = [
            f"[programs.{name}]\napp = {json.dumps(str(app.resolve()))}\nagents = {agents}\n"
            for name, app, agents in programs
        ]
        (folder / "dspex.toml").write_text("\n".join(tables))
        errors = folder / "up.log"
        with errors.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "dspex", "up", str(folder / "dspex.toml"), "--data", str(folder / "data"),
                "--json", stdout=asyncio.subprocess.PIPE, stderr=stderr, stdin=asyncio.subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if not name.startswith(OURS)},
                start_new_session=True,
            )  # fmt: skip
        assert process.stdout is not None
        line = b""
        with contextlib.suppress(TimeoutError):
            line = await asyncio.wait_for(process.stdout.readline(), START)
        told = json.loads(line) if line else {}
        if not told.get("ready"):
            said = errors.read_text(errors="replace").strip().splitlines()
            raise ConfigurationError(f"the demo's system did not start: {said[-1] if said else 'it said nothing'}")
        yield Running(process, told["nats"], folder / "data")
    finally:
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.shield(asyncio.wait_for(process.wait(), 20))
            except TimeoutError:
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Tally:
    """What the log says about the tasks of the demo; it is only told events, and counts them."""

    jobs: dict[str, Job] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    failed: set[str] = field(default_factory=set)
    outputs: dict[str, bytes] = field(default_factory=dict)
    taken_over: set[str] = field(default_factory=set)
    crashed: dict[str, str] = field(default_factory=dict)
    back: dict[str, str] = field(default_factory=dict)
    position: int = 0

    def hear(self, event: dict[str, Any]) -> str | None:
        """Take note of an event; the task's id when it is the first end of one."""
        self.position = event["position"]
        task, data = event["aggregate"].rpartition(".")[2], event["data"]
        match event["type"]:
            case "TaskClaimed" if data["attempt"] > 1:
                self.taken_over.add(task)
            case "TaskCompleted" | "TaskFailed" | "TaskDeadLettered" | "TaskDuplicate":
                self.ends[task] += 1
                if event["type"] == "TaskCompleted":
                    self.outputs[task] = json.dumps(data["output"]).encode()
                else:
                    self.failed.add(task)
                return str(task) if self.ends[task] == 1 else None
            case "AgentCrashed":
                self.crashed.setdefault(task, event["time"])
            case "AgentStarted" if task in self.crashed:
                self.back.setdefault(task, event["time"])
        return None

    async def follow(self, caller: Caller) -> AsyncIterator[str]:
        """The ids of tasks as they end, for ever."""
        while True:
            page = await caller.read_log(wait=5.0, after=self.position, limit=500)
            for event in page["events"]:
                task = self.hear(event)
                if task is not None:
                    yield task
            self.position = max(self.position, page["next"])

    def of(self, part: Part) -> Iterator[tuple[str, Job]]:
        return ((task, job) for task, job in self.jobs.items() if job.part is part)

    def score(self, task: str) -> float:
        job = self.jobs[task]
        return job.part.judge(job.part.labels[job.number], self.outputs[task])

    def summary(self, part: Part) -> dict[str, Any]:
        """One program's figures. `lost` are tasks that have no end, `twice` those that have more than one."""
        tasks = [task for task, _ in self.of(part)]
        right = sum(self.score(task) == 1.0 for task in tasks if task in self.outputs)
        return {
            "program": part.name, "submitted": len(tasks), "completed": sum(task in self.outputs for task in tasks),
            "failed": sum(task in self.failed for task in tasks), "lost": sum(not self.ends[task] for task in tasks),
            "twice": sum(self.ends[task] > 1 for task in tasks), "accuracy": round(right / max(len(tasks), 1), 4),
        }  # fmt: skip

    def away(self, agent: str) -> float | None:
        """Seconds from an agent's death to its successor's start, both as the log has them."""
        if agent not in self.crashed or agent not in self.back:
            return None
        died, came = (datetime.fromisoformat(at) for at in (self.crashed[agent], self.back[agent]))
        return (came - died).total_seconds()
