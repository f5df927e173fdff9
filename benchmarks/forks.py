"""Forks at random events with other values, while agents, supervisor and server are killed at random points.

    python benchmarks/forks.py [--log sqlite] [--parents 20] [--forks 200] [--kills 40] [--seed 1] [--json]

Every effect writes a line into a file of its own accord, so what was really performed is counted outside of the log.
Exit code 1 when a promise is broken: a shared effect was performed, one of a fork's own was performed under two keys or
not at all, a parent has changed, or an output does not begin with what was shared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.chaos import VICTIMS  # noqa: E402 - found by the line above
from tests.e2e.plain import Story  # noqa: E402
from tests.e2e.running import Running  # noqa: E402

from dspex import ConnectionFailed, DeadlineExceeded, NotFound, Unavailable, afork  # noqa: E402

APP = f"{ROOT / 'tests' / 'e2e' / 'forking.py'}:Trip"
SECONDS = 0.15
"""What an effect of a fork takes, so that kills meet some under way."""
AWAY = (ConnectionFailed, DeadlineExceeded, Unavailable, NotFound, TimeoutError)
"""What an asker gets while those who answer are being started again."""


class Made(NamedTuple):
    """A fork: of whom, at which event, with how many nights."""

    parent: int
    at: int
    nights: int
    task: int


async def fork_one(system: Running, chance: random.Random, parents: list[int]) -> Made:
    parent, at, nights = chance.choice(parents), chance.randint(0, 9), chance.randint(1, 4)
    values = {"nights": nights, "input.seconds": SECONDS}
    while True:
        try:
            made = await afork(parent, at=at, values=values, url=system.url)
            return Made(parent, at, nights, int(made.task))
        except AWAY:
            await asyncio.sleep(0.2)


async def campaign(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    chance, book = random.Random(options.seed), folder / "book"
    book.touch()
    with Running(folder / "data", (APP, 3), log=options.log) as system:
        async with await system.plain() as plain:
            parents = [await plain.submit("trip", {"book": str(book)}) for _ in range(options.parents)]
            ended = {task: (await plain.final("trip", task)).json for task in parents}
            before = commits_of(await plain.story(), parents)
            theirs = len(book.read_text().splitlines())
            made, killed = [], Counter[str]()
            for number in range(options.forks):
                made.append(await fork_one(system, chance, parents))
                if (number + 1) * options.kills // options.forks > sum(killed.values()):
                    victim = chance.choices(["agent", "supervisor", "server"], [8, 1, 1])[0]
                    try:
                        os.kill(VICTIMS[victim](system), signal.SIGKILL)
                        killed[victim] += 1
                    except (StopIteration, IndexError, ProcessLookupError):
                        pass  # it is just being started again
            outputs = {each.task: (await plain.final("trip", each.task, patience=180)).json for each in made}
            # One whose acknowledgement was lost was asked for again: there are two of it then.
            submitted = (await plain.story()).submitted("trip")
            story = await plain.until_ended("trip", submitted)
    story.check_once("trip", submitted)
    lines = [line.split() for line in book.read_text().splitlines()[theirs:]]
    found = judge(story, made, ended, outputs, lines)
    return {
        "forks": len(submitted) - len(parents), "kills": dict(killed), **found,
        "parents_changed": sum(before[task] != commits for task, commits in commits_of(story, parents).items()),
    }  # fmt: skip


def commits_of(story: Story, tasks: list[int]) -> dict[int, list[tuple[int, bytes]]]:
    """Where every commit of these tasks stands, and its bytes."""
    names = {f"dspex.event.task.trip.{task}": task for task in tasks}
    found: dict[int, list[tuple[int, bytes]]] = defaultdict(list)
    for entry in story.entries:
        if entry.subject in names:
            found[names[entry.subject]].append((entry.position, entry.body))
    return found


def judge(
    story: Story, made: list[Made], ended: dict[int, Any], outputs: dict[int, Any], lines: list[list[str]]
) -> dict[str, int]:
    """What the log, the outputs and the book say of the promises."""
    found = Counter[str]()
    performed: dict[str, Counter[str]] = defaultdict(Counter)
    for place, key in lines:
        performed[key][place] += 1
    for task in set(story.submitted("trip")) - set(ended):
        events = story.events(f"task.trip.{task}")
        records = [event for event in events if event["type"] == "EffectRecorded"]
        copies = [event for event in records if "/" in event["causationid"]]
        [forked] = [event["data"] for event in events if event["type"] == "TaskForked"]
        found["attempts"] += sum(event["type"] == "TaskClaimed" for event in events)
        found["shared"] += len(copies)
        found["effects"] += sum("visit" in event["data"]["key"] for event in records if event not in copies)
        found["recorded_twice"] += len(records) - len({event["data"]["key"] for event in records})
        found["wrongly_shared"] += not len(copies) == forked["records"] == max(0, min(forked["at"], 8) - 1)
    for each in made:
        output, parent = outputs[each.task], ended[each.parent]
        same = output["drawn"] == parent["drawn"] and (each.at < 2 or output["began"] == parent["began"])
        found["wrong_outputs"] += (each.at > 0 and not same) or len(output["trail"]) != 4 + each.nights
    found["not_performed_once"] = abs(len(performed) - found["effects"])
    found["under_two_keys"] = sum(len(places) > 1 for places in performed.values())
    found["in_flight_repeated"] = sum(sum(places.values()) - 1 for places in performed.values())
    return dict(found)


PROMISES = (
    "recorded_twice", "wrongly_shared", "wrong_outputs", "not_performed_once", "under_two_keys", "parents_changed",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log", choices=("jetstream", "sqlite"), default="jetstream", help="where the log is")
    parser.add_argument("--parents", type=int, default=20)
    parser.add_argument("--forks", type=int, default=200)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dspex-forks-") as folder:
        found = asyncio.run(campaign(options, Path(folder)))
    if options.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:>20}  {value}")
    return 1 if any(found[name] for name in PROMISES) else 0


if __name__ == "__main__":
    sys.exit(main())
