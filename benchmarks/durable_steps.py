"""Durable steps per second: dspex beside LangGraph (SqliteSaver) and DBOS (SQLite), in one run, turn by turn.

    python benchmarks/durable_steps.py [--short] [--seconds 3] [--steps 25] [--rounds 3] [--json]

The step is the same everywhere: a dict with a counter goes in, one with the counter incremented comes out, and its
result is stored before the next step begins. The peers are installed from the package registry into a throwaway virtual
environment (`--peers` names a Python that has them); one that cannot be installed is left out with a sentence. How safe
a step is differs, so those that are as safe as each other are compared:

- process: it survives the death of any process, not of the machine. dspex: acknowledged by the log's own process.
  LangGraph, DBOS: written to the operating system, synchronous=OFF.
- power: it survives the loss of power. dspex: durability "power", on its SQLite log (one fsync for all records that
  wait) and on JetStream (an fsync for each). LangGraph, DBOS: synchronous=FULL.
- behind: the next step may begin before; the last few are lost with the process. dspex: the step is declared
  `read_only`. LangGraph: durability "async", synchronous=OFF. DBOS has none.

Each peer is first tried in the ways it offers (one after the other, threads, asyncio), and is measured in its fastest.
"alone" is one workflow at a time; "CPU" is the processor time of all processes for a step, which does not depend on
what else the machine does. Absolute figures are of this machine and this hour; the ratios are what travels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

STEPS = Path(__file__).with_name("steps")
PACKAGES = {"langgraph": ["langgraph", "langgraph-checkpoint-sqlite", "aiosqlite"], "dbos": ["dbos"]}
AT_ONCE = 200
"""Workflows of dspex that run at once; the peers, which gain nothing from more, run up to 40."""
LEVELS = ("process", "power", "behind")
OURS = {"process": ("jetstream", "archived"), "power": ("sqlite", "jetstream"), "behind": ("jetstream",)}
WAYS = {"langgraph": ("loop", "threads", "async"), "dbos": ("1", "8", "async")}


@dataclass
class Row:
    """One system at one level, and what was measured."""

    system: str
    level: str
    way: str
    python: Path
    rates: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    version: str = ""
    said: str = ""

    def measure(self, folder: Path, steps: int, seconds: float) -> float:
        """One run; raises RuntimeError with the last line it said."""
        script = STEPS / f"{self.system}_steps.py"
        command = [self.python, script, folder, AT_ONCE, steps, seconds, self.level, self.way]
        try:
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
            found = json.loads(done.stdout.splitlines()[-1])
        except (subprocess.TimeoutExpired, IndexError, ValueError) as error:
            words = done.stderr.strip() if not isinstance(error, subprocess.TimeoutExpired) else "no end in 600 s"
            raise RuntimeError((words or "it said nothing").splitlines()[-1][:300]) from None
        self.rates.append(found["rate"])
        self.alone.append(found["alone"])
        self.cpu.append(found["cpu"])
        self.version, self.said = found["version"], found["said"]
        return self.rates[-1]


def install(folder: Path, name: str) -> Path | None:
    """A Python that has the peer; None when it cannot be installed."""
    place = folder / f"venv-{name}"
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    command = [python, "-m", "pip", "-q", "--disable-pip-version-check", "install", *PACKAGES[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        print(f"{name} is left out: it cannot be installed here ({lines[-1][:200]})", file=sys.stderr)
        return None
    return python


def fastest(system: str, level: str, python: Path, folder: Path, steps: int, seconds: float) -> Row | None:
    """The peer at a level, in the way that is the fastest here."""
    tried: list[Row] = []
    for way in WAYS[system]:
        row = Row(system, level, way, python)
        try:
            row.measure(folder, steps, seconds)
            tried.append(row)
        except RuntimeError as error:
            print(f"{system} ({level}, {way}) is left out: {error}", file=sys.stderr)
    if not tried:
        return None
    best = max(tried, key=lambda row: row.rates[0])
    return Row(system, level, best.way, python)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one short round, each peer in one way only")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=Path, help="a Python that has the peers, in place of installing them")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seconds, rounds = (1.0, 1) if options.short else (options.seconds, options.rounds)
    ours = Path(sys.executable)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        rows = [Row("dspex", level, way, ours) for level in LEVELS for way in OURS[level]]
        for system in PACKAGES:
            python = options.peers or install(folder, system)
            for level in LEVELS if system == "langgraph" else LEVELS[:2]:
                if python and options.short:
                    rows.append(Row(system, level, WAYS[system][0], python))
                elif python and (row := fastest(system, level, python, folder, options.steps, seconds / 3)):
                    rows.append(row)
        for _ in range(rounds):
            for row in list(rows):
                try:
                    row.measure(folder, options.steps, seconds)
                except RuntimeError as error:
                    print(f"{row.system} ({row.level}, {row.way}) is left out: {error}", file=sys.stderr)
                    rows.remove(row)
    report(rows, as_json=options.json)
    return 0 if any(row.system == "dspex" for row in rows) else 1


def times(some: list[float], others: list[float]) -> float:
    """How many times as much, round by round, for what else the machine does changes from round to round."""
    return round(median(one / other for one, other in zip(some, others, strict=True)), 1)


def report(rows: list[Row], *, as_json: bool) -> None:
    """What was measured, level by level; a peer's line says how many times as fast dspex was."""
    told = []
    for level in LEVELS:
        here = [row for row in rows if row.level == level]
        own = next((row for row in here if row.system == "dspex"), None)
        for row in here:
            line: dict[str, Any] = {
                "level": level, "system": row.version, "durability": row.said, "rounds": list(map(round, row.rates)),
                "steps_per_second": round(median(row.rates)), "alone": round(median(row.alone)),
                "cpu_us": round(median(row.cpu) * 1e6),
            }  # fmt: skip
            if own and own is not row:
                line["dspex_is"] = times(own.rates, row.rates)
                line["dspex_alone_is"] = times(own.alone, row.alone)
                line["of_the_cpu"] = times(row.cpu, own.cpu) if all(own.cpu) else None
            told.append(line)
    if as_json:
        print(json.dumps(told))
        return
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}, load {load}")
    for line in told:
        rate, alone, cpu = line["steps_per_second"], line["alone"], line["cpu_us"]
        print(f"\n{line['level']:8} {line['system']}: {line['durability']}")
        print(f"    {rate:>8,} steps/s at once {alone:>8,} alone {cpu:>6,} µs of CPU a step")
        if "dspex_is" in line:
            ratios = f"{line['dspex_is']}x at once, {line['dspex_alone_is']}x alone, 1/{line['of_the_cpu']} of the CPU"
            print(f"    dspex: {ratios}")


if __name__ == "__main__":
    sys.exit(main())
