"""What a campaign found, as numbers, as a table, and as JSON."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from statistics import median
from typing import Any

from benchmarks.chaos.campaign import Run
from benchmarks.chaos.check_effects import repeats
from benchmarks.chaos.checker import check
from benchmarks.chaos.evidence import Violation
from benchmarks.chaos.told import TERMINAL

__all__ = ["Found", "judge", "table"]

FULL = 0.9
"""The part of the calm rate that counts as the full one again."""
Found = dict[str, Any]


def judge(run: Run) -> Found:
    """The figures of one class, and every promise that was broken."""
    seen, told = run.evidence, run.evidence.told
    violations = check(seen)
    acknowledged = {op.task for op in seen.history.submitted()}
    ended = sorted(ending.time for door in told.tasks() if (ending := told.ending(door.position)))
    lost = {v.task for v in violations if v.check == "acknowledged"} | {
        task for task in acknowledged if task not in told.doors or not told.ending(task)
    }
    records = sum(event.type == "EffectRecorded" for name, events in told.aggregates.items() for event in events)
    return {
        "class": run.name,
        "tasks": sum(1 for _ in told.tasks()),
        "acknowledged": len(acknowledged),
        "operations": len(seen.history.ops),
        "unknown": sum(op.outcome == "unknown" for op in seen.history),
        "faults": dict(Counter(happened.name for happened in run.happened)),
        "lost": len(lost),
        "completed_twice": _twice(run, violations),
        "effects": records,
        "recorded_repeated": sum(v.check in ("recorded_once", "performed") for v in violations),
        "in_flight_repeated": repeats(seen),
        "endings": dict(Counter(e.type for door in told.tasks() if (e := told.ending(door.position)))),
        "rows": len(told.rows),
        "rate": round(_rate(ended, run.began, min((h.began for h in run.happened), default=run.ended)), 1),
        "recovery": _spread(_next(ended, run)),
        "full_rate": _spread(_full(ended, run)),
        "violations": [asdict(violation) for violation in violations],
    }


def _twice(run: Run, violations: Iterable[Violation]) -> int:
    """Tasks with more than one ending, and keys under which more than one task completed."""
    told, by_key = run.evidence.told, Counter[tuple[str, str]]()
    twice = 0
    for door in told.tasks():
        types = [event.type for event in told.events(door.position) if event.type in TERMINAL]
        twice += len(types) > 1
        if door.key and "TaskCompleted" in types:
            by_key[door.program, door.key] += 1
    return twice + sum(count > 1 for count in by_key.values())


def _rate(ended: Sequence[float], start: float, end: float) -> float:
    """Tasks that ended in the median second from `start` to `end`, its first two left out."""
    seconds = Counter(int(when - start) for when in ended if start <= when < end)
    calm = [seconds[n] for n in range(2, int(end - start))]
    return median(calm) if calm else 0.0


def _next(ended: Sequence[float], run: Run) -> list[float]:
    """From each fault to the next task that ended."""
    found = [(happened.since, bisect_left(ended, happened.since)) for happened in run.happened]
    return [ended[at] - since for since, at in found if at < len(ended) and since < run.ended]


def _full(ended: Sequence[float], run: Run) -> list[float]:
    """From each fault to the first second in which as many tasks ended as in a calm one."""
    first = min((happened.began for happened in run.happened), default=run.ended)
    due = FULL * _rate(ended, run.began, first)
    found = []
    for happened in run.happened:
        at = happened.since
        while at + 1 < run.ended:
            if bisect_left(ended, at + 1) - bisect_left(ended, at) >= due:
                found.append(at - happened.since)
                break
            at += 0.1
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"p50": round(median(values), 2), "max": round(max(values), 2)} if values else {}


COLUMNS = (
    ("class", "class"), ("faults", "faults"), ("tasks", "tasks"), ("acknowledged", "acknowledged"), ("lost", "lost"),
    ("completed_twice", "completed twice"), ("recorded_repeated", "recorded effects repeated"),
    ("in_flight_repeated", "in flight repeated"), ("recovery", "next completion, s"), ("full_rate", "full rate, s"),
    ("violations", "broken"),
)  # fmt: skip


def table(found: Iterable[Found]) -> str:
    """The classes as a table in Markdown."""
    lines = ["| " + " | ".join(title for _, title in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(_cell(one[name]) for name, _ in COLUMNS) + " |" for one in found]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if isinstance(value, dict):
        if value.keys() <= {"p50", "max"}:
            return f"{value['p50']:.2f}, {value['max']:.2f}" if value else "none"
        return str(sum(value.values()))
    if isinstance(value, list):
        return str(len(value))
    return f"{value:,}" if isinstance(value, int) else str(value)
