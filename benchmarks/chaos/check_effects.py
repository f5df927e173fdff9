"""Was what the log has never done again, by nobody, and nothing before its time?"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator

from benchmarks.chaos.evidence import Evidence, Violation
from benchmarks.chaos.history import Performance
from benchmarks.chaos.told import Event

__all__ = ["claims", "performed", "recorded_once", "repeats", "timers"]

COUNTED = ("step", "pay")
"""The effects that tell the counter when they are performed."""
ROUNDING = 1e-3
"""Seconds by which a time that was written down and read again may differ."""


def recorded_once(seen: Evidence) -> Iterator[Violation]:
    """No place of a task is recorded twice in one life (a clean retry begins another)."""
    for door in seen.told.tasks():
        places: Counter[tuple[int, str]] = Counter(
            (life, event.data["key"]) for life, event in _records(seen.told.events(door.position))
        )
        for (_, place), times in places.items():
            if times > 1:
                yield Violation("recorded_once", f"{place} is recorded {times} times", door.position)


def performed(seen: Evidence) -> Iterator[Violation]:
    """What is recorded was performed; one key stands for one effect; and no attempt that claimed its task behind the
    record of an effect performed it again. One that had claimed it before may have been frozen in between."""
    by_key: dict[str, list[Performance]] = defaultdict(list)
    for each in seen.performances:
        by_key[each.key].append(each)
    for door in seen.told.tasks():
        if seen.expected(door.json, door.headers) is None:
            continue
        events = seen.told.events(door.position)
        for life, event in _records(events):
            if event.data["name"] not in COUNTED:
                continue
            done = by_key.get(idempotency_key(door.position, life, event.data["key"]), [])
            if not done:
                yield Violation("performed", f"{event.data['key']} was recorded, and not performed", door.position)
            for late in (one for one in done if _claimed(events, one, seen.skew) > event.position):
                what = f"performed {late.at - event.time:.3f} s after its record, by an attempt that claimed behind it"
                yield Violation("performed", f"{event.data['key']} was {what}", door.position, event.position)
    for key, done in by_key.items():
        if len({each.value for each in done}) > 1:
            yield Violation("performed", f"two effects were performed under the key {key}")


def _claimed(events: list[Event], one: Performance, skew: float) -> int:
    """Where the claim of the attempt stands that performed this: before an effect leaves its process, it is in the
    log."""
    agent = f"/agents/{one.agent}"
    claims = [event for event in events if event.type == "TaskClaimed" and event.source == agent]
    return max((claim.position for claim in claims if claim.time <= one.at + skew), default=0)


def repeats(seen: Evidence) -> int:
    """Effects that were under way when their process died, and were performed once more under the same key."""
    attempts: dict[str, set[str]] = defaultdict(set)
    for each in seen.performances:
        attempts[each.key].add(each.attempt)
    return sum(len(found) - 1 for found in attempts.values())


def idempotency_key(task: int, life: int, place: str) -> str:
    """The key that docs/durable.md promises to an effect of a task that is no fork."""
    return hashlib.sha256(f"{task}/{life}/{place}".encode()).hexdigest()[:32]


def claims(seen: Evidence) -> Iterator[Violation]:
    """Attempts are numbered 1, 2, 3 …, and between two claims only the holder writes; asleep, nobody does.

    One that died before it wrote anything is not in the log, so the first claim there may be of attempt 2.
    """
    holders = {"EffectRecorded", "TaskCompleted", "TaskSleeping", "TaskRetried"}
    for door in seen.told.tasks():
        holder, attempt, asleep = "", 0, 0
        for event in seen.told.events(door.position):
            if event.type == "TaskClaimed":
                number, holder, asleep = event.data["attempt"], f"/agents/{event.data['agent']}", 0
                if number != attempt + 1 and (attempt, number) != (0, 2):
                    what = f"attempt {number} after attempt {attempt}"
                    yield Violation("claims", what, door.position, event.position)
                attempt = number
            elif event.type in holders:
                if event.source != holder:
                    what = f"{event.type} of {event.source}, and {holder or 'nobody'} holds it"
                    yield Violation("claims", what, door.position, event.position)
                if asleep and event.position != asleep:
                    yield Violation("claims", f"{event.type} while it sleeps", door.position, event.position)
                if event.type in ("TaskSleeping", "TaskRetried"):
                    asleep = event.position


def timers(seen: Evidence) -> Iterator[Violation]:
    """Nothing that waits for a time alone goes on before it: by the clock of the counter, and by the log's own.

    A deadline may be given in the submission; before it, nothing fails with 408.
    """
    starts: dict[str, float] = {}
    for each in seen.performances:
        starts[each.key] = min(each.at, starts.get(each.key, each.at))
    for door in seen.told.tasks():
        due, events = seen.expected(door.json, door.headers), seen.told.events(door.position)
        waits = {event.data["key"]: event.data.get("until") for event in events if event.type == "TaskSleeping"}
        for _, event in _records(events):
            until = waits.get(event.data["key"]) if event.data["name"] == "sleep" else None
            if until and event.time + seen.skew + ROUNDING < until:
                yield Violation("timers", f"it slept {until - event.time:.3f} s less", door.position, event.position)
        if due and due.at_least:
            records = [event for _, event in _records(events) if event.data["name"] == "step"]
            times = [starts.get(idempotency_key(door.position, 0, event.data["key"]), 0.0) for event in records]
            if len(times) > 1 and times[-1] - times[0] + ROUNDING < due.at_least:
                yield Violation("timers", f"it slept {times[-1] - times[0]:.3f} of {due.at_least} s", door.position)
        ending = seen.told.ending(door.position)
        seconds = door.headers.get("Dspex-Deadline", "")
        late = ending and ending.type == "TaskFailed" and ending.data["code"] == 408
        if ending and late and seconds.replace(".", "").isdecimal():
            early = door.time + float(seconds) - ending.time
            if early > seen.skew:
                yield Violation("timers", f"its deadline passed {early:.3f} s early", door.position, ending.position)


def _records(events: list[Event]) -> Iterator[tuple[int, Event]]:
    """The records of a task, each with the number of the life that it is of."""
    life = 0
    for event in events:
        if event.type == "TaskRetried" and event.data.get("clean"):
            life += 1
        elif event.type == "EffectRecorded":
            yield life, event
