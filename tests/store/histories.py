"""Made-up logs of tasks: entries as a log has them, and a process that makes views of one until it is killed."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Raw

from dspex.core.codec import encode_commit, events_of, rfc3339
from dspex.core.events import (
    EffectRecorded,
    Event,
    Payload,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskDuplicate,
    TaskFailed,
    TaskRetried,
    TaskSleeping,
)
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects
from dspex.store.projections import Projection, Views
from dspex.store.tasks import BODIES, TASKS, TEXT

SUBJECTS = Subjects()
BEGAN = 1_760_000_000.0
WORDS = ["tea", "milk", "sugar", "cake", "Straße", "naïve", "42", "zebra"]
ALL: tuple[Projection, ...] = (TASKS, TEXT, BODIES)


def door(position: int, kind: str, program: str, body: object, headers: dict[str, str] | None = None) -> Entry:
    """A door message."""
    return Entry(
        position=position, time=BEGAN + position, subject=f"dspex.{kind}.{program}",
        body=body if isinstance(body, bytes) else msgspec.json.encode(body), headers=headers or {},
    )  # fmt: skip


def commit(position: int, aggregate: str, after: int, *payloads: Payload) -> Entry:
    """A commit behind version `after`."""
    events = [
        Event(aggregate, after + number, rfc3339(BEGAN + position), "tests", "1", "1", payload)
        for number, payload in enumerate(payloads, 1)
    ]
    body = encode_commit(events)
    return Entry(position=position, time=BEGAN + position, subject=f"dspex.event.{aggregate}", body=body, headers={})


def life(random: random.Random, task: int) -> Iterator[list[Payload]]:
    """The commits of one task, to its end or not."""
    attempt = 1
    while True:
        yield [TaskClaimed(attempt=attempt, agent=f"a-{attempt}", assignment="ab" * 16, code="c0de")]
        for number in range(random.randrange(3)):
            yield [EffectRecorded(key=f"~/x#{number}", name="x", digest="d", result=Raw(b"1"))]
        match random.randrange(8):
            case 0:
                yield [TaskSleeping(key="~/s", until=1.0), TaskSleeping(key="~/t", signal="go")]
            case 1:
                yield [TaskRetried(retry=attempt, type="ValueError", message="no", until=1.0)]
            case 2:
                yield [TaskFailed(code=500, type="KeyError", message="there is no sugar", seconds=0.5)]
                return
            case 3:
                yield [TaskDuplicate(of="1", key="k")]
                return
            case 4:
                yield [TaskDeadLettered(attempts=attempt, reason="it died")]
                return
            case 5:
                return
            case 6:
                yield [TaskCancelled(reason=random.choice(["", "no more tea"]))]
                return
            case _:
                yield [TaskCompleted(output=Raw(msgspec.json.encode({"said": random.choice(WORDS)})), seconds=0.25)]
                return
        attempt += 1


def history(seed: int, tasks: int) -> list[Entry]:
    """A log of some tasks, their commits interleaved, some scored by id or key, some never ended."""
    chance = random.Random(seed)
    entries: list[Entry] = []
    going: list[tuple[str, int, Iterator[list[Payload]]]] = []
    begun = 0
    while begun < tasks or going:
        position = len(entries) + 1
        if begun < tasks and (not going or chance.random() < 0.4):
            program = chance.choice(["shop", "bakery"])
            headers = {"Dspex-Key": f"k{chance.randrange(4)}"} if chance.random() < 0.5 else {}
            if chance.random() < 0.2 and begun:
                headers["Dspex-Parent"] = "1"
            body = b"not json" if chance.random() < 0.1 else {"wants": [chance.choice(WORDS), chance.choice(WORDS)]}
            entries.append(door(position, "task", program, body, headers))
            going.append((f"task.{program}.{position}", 0, life(chance, position)))
            begun += 1
        elif chance.random() < 0.2:
            named = chance.choice([chance.randrange(1, position + 1), f"k{chance.randrange(4)}", True, "9" * 40, None])
            score = chance.choice([0.25, 1, -3.5, "high", None, True])
            kind = chance.choice(["outcome", "outcome", "signal"])
            entries.append(door(position, kind, chance.choice(["shop", "bakery"]), {"task": named, "score": score}))
        else:
            number = chance.randrange(len(going))
            name, version, rest = going[number]
            payloads = next(rest, None)
            if payloads is None:
                del going[number]
                continue
            entries.append(commit(position, name, version, *payloads))
            going[number] = (name, version + len(payloads), rest)
    return entries


def apply(views: Views, entries: list[Entry], group: int) -> None:
    """Take the entries in, so many at once."""
    for start in range(0, len(entries), group):
        some = entries[start : start + group]
        events = [event for entry in some for event in events_of(entry, SUBJECTS)]
        views.advance(events, some[-1].position, f"mark {some[-1].position}")


def dump(views: Views) -> dict[str, object]:
    """All that the tables of the views say."""
    run = views.run
    found: dict[str, object] = {
        table: run.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in ("tasks", "mentions", "bodies")
    }
    found["texts"] = {
        word: run.execute("SELECT rowid FROM texts WHERE texts MATCH ? ORDER BY 1", (f'"{word}"',)).fetchall()
        for word in [*WORDS, "KeyError"]
    }
    return found


def _for_ever(file: Path) -> None:
    """Make views of a log, a few entries at a time, over and over."""
    entries = history(7, 400)
    views = Views(file, ALL, epoch="e")
    print("open", views.position, flush=True)  # noqa: T201
    while True:
        rest = [entry for entry in entries if entry.position > views.position]
        for start in range(0, len(rest), 7):
            apply(views, rest[start : start + 7], 7)
            time.sleep(0.0005)
        views.rebuild("tasks")
        views.rebuild("text")
        views.rebuild("bodies")


if __name__ == "__main__":
    _for_ever(Path(sys.argv[1]))
