"""Idempotency keys: the same program and key never run twice, whenever they come."""

from __future__ import annotations

from hashlib import sha256

from dspex.agents.journal import events_for
from dspex.core.codec import decode_commit
from dspex.core.events import Head, KeyBound
from dspex.core.ports import Appended, Log
from dspex.core.subjects import aggregate

__all__ = ["bind", "key_aggregate"]


def key_aggregate(program: str, key: str, tenant: str = "") -> str:
    """The aggregate that says whose a key is; a key may hold any text, so its hash stands in the name. Each tenant has
    keys of its own."""
    text = f"{tenant}\0{key}" if tenant else key
    return aggregate("key", program, sha256(text.encode()).hexdigest()[:32])


async def bind(log: Log, program: str, key: str, task: str, source: str, tenant: str = "") -> str:
    """Bind a key to a task for good; return the task that has it, which is another one when it came first."""
    name = key_aggregate(program, key, tenant)
    events = events_for(name, Head(), [KeyBound(key=key, task=task)], source=source, correlation=task, causation=task)
    if isinstance(await log.append(name, events, Head()), Appended):
        return task
    entry = await log.last(name)
    assert entry is not None, "a conflict means that somebody has bound the key"
    bound = decode_commit(entry.body, entry.position)[0].data
    assert isinstance(bound, KeyBound)
    return bound.task
