"""The beginning of a fork: what it shares with its parent is copied into its own log, before its program runs.

After that the fork needs its parent for nothing: it is resumed, replayed, exported and forgotten by itself.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from dspex.agents.owners import same_tenant
from dspex.agents.reader import kept_submission
from dspex.agents.results import forgotten
from dspex.agents.run import Run
from dspex.agents.writer import MAX_COMMIT, RECORD, Superseded
from dspex.core.codec import decode_commit
from dspex.core.errors import NotFound
from dspex.core.events import EffectRecorded, Event, Payload, TaskForked
from dspex.core.fork import Shared, shared
from dspex.core.history import remembered
from dspex.core.ports import Conflict, Log
from dspex.core.subjects import Subjects, aggregate

__all__ = ["begin_fork"]


async def begin_fork(run: Run, parent: str, at: int, log: Log, subjects: Subjects, *, retry: bool = False) -> None:
    """See to it that the log has all that the task shares with its parent, and the run remembers it. An attempt that
    died over it is gone on with. A `retry` does again what had failed. Raises NotFound, InvalidInput, Superseded,
    LogError."""
    has_begun = any(isinstance(event.data, TaskForked) for event in run.history)
    if has_begun and not remembered(run.history).missing:
        return
    part = await _shared(run, parent, at, log, subjects, retry)
    history = list(run.history)
    if not has_begun:
        history += await _commit(run, run.events([part.forked] if run.claimed else [part.forked, run.claim()]))
    copied = sum(isinstance(event.data, EffectRecorded) for event in history)
    todo = part.records[copied:]
    while todo:
        batch, todo = _first(todo)
        copies = run.events([_unpaid(event.data) for event in batch])
        # What an event was copied from is what caused it.
        history += await _commit(
            run, [replace(copy, causation=event.id) for copy, event in zip(copies, batch, strict=True)]
        )
    run.history = history


async def _commit(run: Run, events: list[Event]) -> list[Event]:
    if isinstance(await run.commit(events), Conflict):
        raise Superseded(f"task {run.id} was taken over by another attempt")
    return events


async def _shared(run: Run, parent: str, at: int, log: Log, subjects: Subjects, retry: bool) -> Shared:
    entry = await log.entry(int(parent)) or await kept_submission(log, subjects, parent, run.program)
    if entry is None and int(parent) <= await log.head():
        raise forgotten(run.program, parent)
    if (
        entry is None or subjects.door_of(entry.subject) != ("task", run.program)
        or (subjects.tenants and not same_tenant(subjects, run.delivery.subject, entry.subject))
    ):  # fmt: skip
        raise NotFound(f"{run.program} has no task {parent} to fork")
    entries = await log.read(aggregate("task", run.program, parent))
    return shared((it for each in entries for it in decode_commit(each.body, each.position)), parent, at, retry=retry)


def _unpaid(payload: Payload) -> Payload:
    """A record whose effect the parent has paid for: a fork pays nothing for it."""
    return msgspec.structs.replace(payload, usage=UNSET) if isinstance(payload, EffectRecorded) else payload


def _first(todo: list[Event]) -> tuple[list[Event], list[Event]]:
    """What goes into the next commit, and the rest."""
    size = count = 0
    while count < len(todo):
        # Copies are as the log has them, so what they take is counted, whatever they hold and in whatever form.
        size += RECORD + len(msgspec.json.encode(todo[count].data))
        if count and size > MAX_COMMIT:
            break
        count += 1
    return todo[:count], todo[count:]
