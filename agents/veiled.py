"""A log as its archive may keep it: what came in the open for a private program is sealed in it.

Sealing is the same whoever does it and whenever, so the archive can be compared with the log through the same veil,
also when the message in the log was erased meanwhile: then the task's own events have it, sealed the same way.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec

from dspex.agents.reader import kept_submission
from dspex.agents.vault import Key, Vault, sealed_input, sealed_signal, submission_of, task_key
from dspex.core import headers as h
from dspex.core.codec import NOT_JSON, decode_commit, sealed_body
from dspex.core.errors import Forgotten, LogCorrupt
from dspex.core.events import Event, Head, ProgramRegistered
from dspex.core.ports import Appended, Conflict, Entry, Log
from dspex.core.sealing import Guard, guard_of
from dspex.core.subjects import Subjects

__all__ = ["VeiledLog", "guard_in", "task_in"]

MAX_HOLES = 100
"""Positions without a message that are looked up one by one; where more are missing, retention took them."""
MAX_KNOWN = 10_000
"""Programs whose guards are remembered."""


class VeiledLog:
    """The `Log` port over another log, with what is private of door messages sealed."""

    def __init__(self, log: Log, subjects: Subjects, vault: Vault) -> None:
        self.beneath, self._subjects, self._vault = log, subjects, vault
        self._guards: dict[str, Guard] = {}

    @property
    def epoch(self) -> str:
        return self.beneath.epoch

    async def append(self, aggregate: str, events: Sequence[Event], expected: Head) -> Appended | Conflict:
        return await self.beneath.append(aggregate, events, expected)

    async def store(self, subject: str, body: bytes, headers: Mapping[str, str]) -> int:
        return await self.beneath.store(subject, body, headers)

    async def read(self, aggregate: str) -> list[Entry]:
        return await self.beneath.read(aggregate)

    async def last(self, aggregate: str) -> Entry | None:
        return await self.beneath.last(aggregate)

    async def entry(self, position: int) -> Entry | None:
        found = await self.beneath.entry(position)
        if found is None:
            return await kept_submission(self.beneath, self._subjects, str(position)) if position > 0 else None
        return await self._veiled(found)

    async def scan(self, after: int, limit: int = 1000, subject: str | None = None) -> list[Entry]:
        found = await self.beneath.scan(after, limit, subject)
        if subject is None and found:
            found = await self._filled(after, found)
        plain = self._subjects.event("")
        programs = self._subjects.event("program.")
        veiled = [
            entry if entry.subject.startswith(plain) and not entry.subject.startswith(programs)
            else await self._veiled(entry)
            for entry in found
        ]  # fmt: skip
        return [entry for entry in veiled if entry is not None]

    async def tail(self, after: int, subject: str | None = None) -> AsyncIterator[Entry]:
        async for entry in self.beneath.tail(after, subject):
            veiled = await self._veiled(entry)
            if veiled is not None:
                yield veiled

    async def head(self) -> int:
        return await self.beneath.head()

    async def close(self) -> None:
        await self.beneath.close()

    # -- inside

    async def _filled(self, after: int, found: list[Entry]) -> list[Entry]:
        """The entries, and in their places the submissions that were erased among them."""
        have = {entry.position for entry in found}
        holes = found[-1].position - after - len(found)
        if not holes:
            return found
        kept = {entry.position: entry for entry in found}
        for entry in found:
            name = self._subjects.aggregate_of(entry.subject) or ""
            if not (name.startswith("task.") and b'"InputSealed"' in entry.body):
                continue
            position = int(name.rpartition(".")[2])
            if after < position and position not in have:
                submission = self._submission(entry, name)
                if submission is not None:
                    kept[position] = submission
        if holes - (len(kept) - len(found)) <= MAX_HOLES:
            for position in range(after + 1, found[-1].position):
                if position not in kept:  # its commit may stand behind what was scanned
                    submission = await kept_submission(self.beneath, self._subjects, str(position))
                    if submission is not None:
                        kept[position] = submission
        return [kept[position] for position in sorted(kept)]

    def _submission(self, entry: Entry, name: str) -> Entry | None:
        try:
            return submission_of(name.rpartition(".")[2], decode_commit(entry.body, entry.position), self._subjects)
        except LogCorrupt:
            return None

    async def _veiled(self, entry: Entry) -> Entry | None:
        """The entry as it may be kept; None when nobody may know it any more."""
        door = self._subjects.door_of(entry.subject)
        if door is None:
            if entry.subject.startswith(self._subjects.event("program.")):
                self._guards.clear()
            return entry
        kind, program = door
        if kind == "outcome" or h.sealed(entry.headers):
            return entry
        guard = await self._guard(program)
        if not guard.guarded:
            return entry
        key = await self._key(kind, entry)
        if key is None:
            return None
        if kind == "task":
            value, held = sealed_input(key, program, entry.body, guard)
            body = sealed_body(value, held.sealed)
        else:
            body = sealed_signal(key, program, entry.body)
        names = ((name.title() if name.lower().startswith("dspex-") else name, name) for name in h.ours(entry.headers))
        headers = {shown: entry.headers[name] for shown, name in names} | {h.SEALED: key.name}
        return Entry(
            position=entry.position, time=entry.time, subject=entry.subject, body=body, headers=headers,
        )  # fmt: skip

    async def _key(self, kind: str, entry: Entry) -> Key | None:
        """The key of the task that an entry is about. A signal of which nobody can say has a key that nobody keeps."""
        task = str(entry.position) if kind == "task" else task_in(entry.body)
        if not task:
            return Key("forgotten", secrets.token_bytes(32))
        door = self._subjects.door_of(entry.subject)
        owner = door[1] if door and self._subjects.tenants else ""
        name = task_key(self.beneath.epoch, task, owner)
        try:
            return Key(name, await self._vault.make(name))
        except Forgotten:
            return None

    async def _guard(self, program: str) -> Guard:
        if program not in self._guards:
            if len(self._guards) >= MAX_KNOWN:
                self._guards.clear()
            self._guards[program] = await guard_in(self.beneath, program)
        return self._guards[program]


async def guard_in(log: Log, program: str) -> Guard:
    """What any of a program's registrations guards: an older one may have taken what a newer does not."""
    found = Guard()
    for entry in await log.read(f"program.{program}.0"):
        for event in decode_commit(entry.body, entry.position):
            if isinstance(event.data, ProgramRegistered):
                one = guard_of(event.data.input_schema, event.data.output_schema)
                found = Guard(found.input | one.input, found.output | one.output, found.secret or one.secret)
    return found


def task_in(body: bytes) -> str:
    try:
        task = str(msgspec.json.decode(body).get("task"))
    except (*NOT_JSON, AttributeError):
        return ""
    return task if task.isascii() and task.isdecimal() and len(task) < 19 else ""
