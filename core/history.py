"""What a task remembers of its earlier attempts, and a fork of its parent, read from its events."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from dspex.core.events import EffectRecorded, EffectRetried, Event, TaskForked, TaskRetried, TaskSleeping

__all__ = ["Memory", "remembered"]


@dataclass
class Memory:
    """The records by place, how often each was tried again, until when each place waits, and how often a clean retry
    has begun the task anew.

    Of a fork: `seed` is the task whose random numbers it draws, `keys` the one whose idempotency keys it has, `shared`
    the places whose records are its parent's, and `missing` how many of those it has not copied yet."""

    records: dict[str, EffectRecorded] = field(default_factory=dict)
    until: dict[str, float | None] = field(default_factory=dict)
    life: int = 0
    tries: dict[str, int] = field(default_factory=dict)
    seed: str = ""
    keys: str = ""
    shared: set[str] = field(default_factory=set)
    missing: int = 0


def remembered(events: Iterable[Event]) -> Memory:
    """The memory after `events`. A clean retry forgets everything; another one only what failed, for that is what is
    to be done again."""
    memory = Memory()
    for event in events:
        match event.data:
            case EffectRecorded() as record:
                memory.records[record.key] = record
                if memory.missing:
                    memory.shared.add(record.key)
                    memory.missing -= 1
            case EffectRetried(key=key, retry=retry, until=until):
                memory.tries[key], memory.until[key] = retry, until
            case TaskSleeping(key=key, until=until):
                memory.until[key] = until
            case TaskForked(seed=seed, life=life, waits=waits, records=records, keys=keys):
                memory = Memory(until=dict(waits), life=life, seed=seed, missing=records, keys=keys or "")
            case TaskRetried(clean=True):
                memory = Memory(life=memory.life + 1, seed=memory.seed, keys=memory.keys)
            case TaskRetried():
                memory.records = {key: record for key, record in memory.records.items() if not record.error}
                memory.tries.clear()
                memory.shared &= memory.records.keys()
    return memory
