"""The log in memory: a real peer of the others that forgets everything when its process ends."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence

from dspex.core.errors import LogError
from dspex.core.events import Event, Head
from dspex.core.ports import Appended, Conflict, Entry
from dspex.core.subjects import Subjects
from dspex.store.rules import MAX_PAYLOAD, SCAN_BYTES, commit_body, door_size, microseconds, subject_filter

__all__ = ["MemoryLog"]


class MemoryLog:
    """A log that is a list. Use it in one event loop; closing it keeps nothing."""

    def __init__(self, subjects: Subjects | None = None, *, max_payload: int = MAX_PAYLOAD) -> None:
        self._subjects = subjects or Subjects()
        self._max_payload = max_payload
        self._epoch = uuid.uuid4().hex
        self._entries: list[Entry] = []
        self._of: dict[str, list[Entry]] = {}
        self._heads: dict[str, Head] = {}
        self._grown = asyncio.Event()
        self._closed = False

    @property
    def epoch(self) -> str:
        """Which log this is."""
        return self._epoch

    async def append(self, aggregate: str, events: Sequence[Event], expected: Head) -> Appended | Conflict:
        """Append one commit if the aggregate still stands at `expected`."""
        self._check()
        body = commit_body(aggregate, events, expected, self._max_payload)
        head = self._heads.get(aggregate, Head())
        subject = self._subjects.event(aggregate)
        if head != expected:
            if head.version == events[-1].version and self._of[subject][-1].body == body:
                return Appended(head)
            return Conflict(head)
        head = Head(events[-1].version, self._write(subject, body, {}))
        self._heads[aggregate] = head
        return Appended(head)

    async def store(self, subject: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Store a door message and return its position."""
        self._check()
        door_size(self._subjects, subject, body, headers, self._max_payload)
        return self._write(subject, body, dict(headers))

    async def read(self, aggregate: str) -> list[Entry]:
        """All commits of an aggregate, oldest first."""
        self._check()
        return list(self._of.get(self._subjects.event(aggregate), ()))

    async def last(self, aggregate: str) -> Entry | None:
        """The newest commit of an aggregate."""
        self._check()
        entries = self._of.get(self._subjects.event(aggregate))
        return entries[-1] if entries else None

    async def entry(self, position: int) -> Entry | None:
        """What stands at a position."""
        self._check()
        return self._entries[position - 1] if 1 <= position <= len(self._entries) else None

    async def scan(self, after: int, limit: int = 1000, subject: str | None = None) -> list[Entry]:
        """Up to `limit` entries behind position `after`, in order, without gaps."""
        self._check()
        matches = subject_filter(subject) if subject is not None else None
        found: list[Entry] = []
        size = 0
        for index in range(max(after, 0), len(self._entries)):
            if len(found) >= limit or size > SCAN_BYTES:
                break
            entry = self._entries[index]
            if matches is None or matches(entry.subject):
                found.append(entry)
                size += len(entry.body)
        return found

    async def tail(self, after: int, subject: str | None = None) -> AsyncIterator[Entry]:
        """All entries behind `after` and then every new one; ends when the log is closed."""
        self._check()
        matches = subject_filter(subject) if subject is not None else None
        index = max(after, 0)
        while not self._closed:
            grown = self._grown
            while index < len(self._entries):
                entry = self._entries[index]
                index += 1
                if matches is None or matches(entry.subject):
                    yield entry
            if not self._closed:
                await grown.wait()

    async def head(self) -> int:
        """The position of the newest entry; 0 when the log is empty."""
        self._check()
        return len(self._entries)

    async def close(self) -> None:
        """End the tails. Closing twice is fine."""
        self._closed = True
        self._grown.set()

    def reopened(self) -> MemoryLog:
        """The same log again after it was closed: its entries and its epoch, in a new object."""
        again = MemoryLog(self._subjects, max_payload=self._max_payload)
        again._epoch, again._entries, again._of, again._heads = (
            self._epoch,
            self._entries,
            self._of,
            self._heads,
        )
        return again

    def _check(self) -> None:
        if self._closed:
            raise LogError("the log is closed")

    def _write(self, subject: str, body: bytes, headers: dict[str, str]) -> int:
        now = microseconds(time.time_ns() // 1000)
        entry = Entry(position=len(self._entries) + 1, time=now, subject=subject, body=bytes(body), headers=headers)
        self._entries.append(entry)
        self._of.setdefault(subject, []).append(entry)
        grown, self._grown = self._grown, asyncio.Event()
        grown.set()
        return entry.position
