"""Faults under load, and the checker that judges them.

    make chaos ARGS="--faults kill-agent,stop-server --tasks 10000 --seed 7 --log sqlite"

Each class of faults gets a system of its own; `a+b` is one class of two faults, `kill` all that kill, `mixed`
everything on one machine, `all` each fault as a class of its own, and the mixes. Exit code 1 when a promise is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.chaos.campaign import Options, Unavailable, campaign
from benchmarks.chaos.faults import FAULTS, MIXES
from benchmarks.chaos.history import History
from benchmarks.chaos.report import Found, judge, table

SHORT = Options(tasks=400, seed=4, rate=40.0, every=(0.8, 1.6), agents=2, clients=4, faults=9, most=9)
CLASSES = "kill,stop,restart-server,full-disk,slow,clock,hostile,mixed,cluster-mixed"
"""What is run when nothing is named."""
SHORT_FAULTS = (
    "kill-agent", "kill-registrar", "kill-archivist", "kill-supervisor", "kill-server", "stop-agent", "restart-server",
    "slow-agent", "slow-client", "clock-ahead", "clock-behind", "hostile",
)  # fmt: skip


def classes(text: str) -> dict[str, tuple[str, ...]]:
    """The classes that a command names, each with its faults. Raises ValueError."""
    found: dict[str, tuple[str, ...]] = {}
    for name in text.split(","):
        if name == "all":
            found |= {fault: (fault,) for fault in FAULTS} | MIXES
        elif name in MIXES:
            found[name] = MIXES[name]
        else:
            found[name] = tuple(name.split("+"))
            for fault in found[name]:
                if fault not in FAULTS:
                    raise ValueError(f"there is no fault {fault!r}: {', '.join([*FAULTS, *MIXES])} or all")
    return found


def options_of(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", default=CLASSES, help="classes: " + ", ".join([*FAULTS, *MIXES]))
    parser.add_argument("--tasks", type=int, default=10_000, help="acknowledged tasks of each class")
    parser.add_argument("--seed", type=int, default=1, help="the same seed: the same tasks and the same faults")
    parser.add_argument("--log", choices=("jetstream", "sqlite"), default="jetstream", help="where the log is")
    parser.add_argument("--rate", type=float, default=100.0, help="tasks begun in a second, at most")
    parser.add_argument("--every", default="5:40", help="seconds between two faults, from:to")
    parser.add_argument("--agents", type=int, default=3)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--short", action="store_true", help="400 tasks, one class of most faults")
    parser.add_argument("--keep", type=Path, help="keep histories, logs and words in this folder")
    parser.add_argument("--json", action="store_true", help="one object for each class")
    return parser.parse_args(arguments)


def run_one(name: str, faults: tuple[str, ...], options: Options, keep: Path | None) -> Found:
    """One class, from its start to its figures."""
    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - begun:6.1f}s {line}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as place:
        history = History()
        try:
            run = asyncio.run(campaign(name, faults, options, Path(place), history, say))
        finally:
            if keep:
                keep.mkdir(parents=True, exist_ok=True)
                history.save(keep / f"{name}-{options.log}-{options.seed}.history")
                shutil.copy(Path(place, "words"), keep / f"{name}-{options.log}-{options.seed}.words")
        found = judge(run) | {"log": options.log, "seed": options.seed}
        if keep:
            rows = [[row.position, row.time, row.subject, row.headers, row.body.decode(errors="replace")]
                    for row in run.evidence.told.rows]  # fmt: skip
            (keep / f"{name}-{options.log}-{options.seed}.log").write_text("\n".join(map(json.dumps, rows)))
    for violation in found["violations"]:
        say(f"BROKEN {violation}")
    return found


def main(arguments: list[str]) -> int:
    given = options_of(arguments)
    low, _, high = given.every.partition(":")
    options = Options(
        tasks=given.tasks, seed=given.seed, log=given.log, rate=given.rate, every=(float(low), float(high or low)),
        agents=given.agents, clients=given.clients,
    )  # fmt: skip
    try:
        wanted = classes(given.faults)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if given.short:
        wanted, options = {"short": SHORT_FAULTS}, replace(SHORT, log=given.log)
    print(f"seed {options.seed}, log {options.log}, {options.tasks} tasks a class", file=sys.stderr)
    found: list[Found] = []
    for name, faults in wanted.items():
        try:
            found.append(run_one(name, faults, options, given.keep))
        except Unavailable as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        if given.json:
            print(json.dumps(found[-1]), flush=True)
    if not given.json:
        print(table(found))
    broken = [one["class"] for one in found if one["violations"] or one["lost"] or one["completed_twice"]]
    print(f"broken: {', '.join(broken)}" if broken else "every promise held", file=sys.stderr)
    return 1 if broken or not found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
