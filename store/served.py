"""A log behind a process that reads it for others: agents write as they write to JetStream, and read through a door,
`dspex.log.rows` of a log process and `dspex.rows.<program>` on a system with access rules.

Those doors are for agents of ours: the request is JSON, the answer MessagePack, because a row is bytes and must come
back whole. Everybody else reads events through `dspex.log.read`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec

from dspex.core.errors import LogError
from dspex.core.ports import Connection, Entry
from dspex.core.subjects import Subjects, parse_aggregate
from dspex.store.api import Answer
from dspex.store.remote import Remote
from dspex.store.rules import SCAN_BYTES, subject_filter

__all__ = ["ENVELOPE", "Page", "ServedLog", "Wanted"]

ENVELOPE = 2048
"""Bytes that an answer takes beside one row; so much below the server's limit is the largest row."""
SOON, POLL = 0.005, 2.0
"""Seconds until a tail looks again: after a hint, which comes before the log has what it announces, and without one."""


class Wanted(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What is asked for: the row at a `position`, the `last` of an aggregate, or rows behind `after`: those of an
    `aggregate`, those that match `subject`, or all. `erase`: what came in the open at that position is to go."""

    position: int | None = None
    last: str | None = None
    aggregate: str | None = None
    after: int = 0
    limit: int = 1000
    subject: str | None = None
    erase: int | None = None


class Page(Answer, omit_defaults=True):
    """The answer. `more` says that the scan found more than fits here."""

    epoch: str = ""
    head: int = 0
    rows: list[Entry] = []
    more: bool = False


_decode_page = msgspec.msgpack.Decoder(Page).decode


class ServedLog(Remote):
    """The log that the process on the other side of `connection` reads; `epoch` is the one it told, `door` where it is
    asked, and `erasable` says that it can take a message out."""

    def __init__(
        self, connection: Connection, subjects: Subjects, epoch: str, *, patience: float = 30.0, door: str = "",
        erasable: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(connection, subjects, epoch, patience=patience)
        self._door, self.erasable = door or subjects.log("rows"), erasable
        self._bells: set[asyncio.Event] = set()

    async def read(self, aggregate: str) -> list[Entry]:
        """All commits of an aggregate, oldest first; never stale."""
        name = ".".join(parse_aggregate(aggregate))
        found: list[Entry] = []
        while True:
            page = await self._ask(Wanted(aggregate=name, after=found[-1].position if found else 0))
            found += page.rows
            if not page.more:
                return found

    async def last(self, aggregate: str) -> Entry | None:
        """The newest commit of an aggregate; never stale."""
        return await self._newest(self._subjects.event(".".join(parse_aggregate(aggregate))))

    async def entry(self, position: int) -> Entry | None:
        """What stands at a position; never stale."""
        if position <= 0:
            return None
        rows = (await self._ask(Wanted(position=position))).rows
        return rows[0] if rows else None

    async def scan(self, after: int, limit: int = 1000, subject: str | None = None) -> list[Entry]:
        """Up to `limit` entries behind position `after`, in order, without gaps."""
        if subject is not None:
            subject_filter(subject)
        found: list[Entry] = []
        size, more = 0, limit > 0
        while more and len(found) < limit and size < SCAN_BYTES:
            page = await self._ask(Wanted(after=after, limit=limit - len(found), subject=subject))
            found += page.rows
            size += sum(len(entry.body) for entry in page.rows)
            more = page.more
            after = found[-1].position if found else after
        return found

    async def tail(self, after: int, subject: str | None = None) -> AsyncIterator[Entry]:
        """All entries behind `after` and then every new one; ends when the log is closed."""
        if self._api.closed:
            raise LogError("the log is closed")
        bell = asyncio.Event()
        hint = self._connection.subscribe(subject or f"{self._subjects.prefix}.>", lambda _: bell.set())
        self._bells.add(bell)
        pause = POLL
        try:
            while not self._api.closed:
                bell.clear()
                try:
                    entries = await self.scan(after, subject=subject)
                except LogError:
                    if self._api.closed:
                        return
                    raise
                for entry in entries:
                    after = entry.position
                    yield entry
                if entries or self._api.closed:
                    continue
                try:
                    async with asyncio.timeout(pause):
                        await bell.wait()
                    pause = SOON
                except TimeoutError:
                    pause = min(2 * pause, POLL)
        finally:
            self._bells.discard(bell)
            hint.close()

    async def head(self) -> int:
        """The position of the newest entry; 0 when the log is empty."""
        return (await self._ask(Wanted(limit=0))).head

    async def erase(self, position: int) -> None:
        """Have a door message of the program taken out; one that is gone already is fine. Raises LogError."""
        await self._ask(Wanted(erase=position))

    async def close(self) -> None:
        """End the tails; the connection stays open. Closing twice is fine."""
        self._api.closed = True
        for bell in self._bells:
            bell.set()

    async def _reachable(self) -> None:
        await self.head()

    async def _newest(self, pattern: str, deadline: float | None = None) -> Entry | None:
        name = self._subjects.aggregate_of(pattern)
        rows = (await self._ask(Wanted(last=name), deadline)).rows
        return rows[0] if rows else None

    async def _ask(self, wanted: Wanted, deadline: float | None = None) -> Page:
        page = await self._api.ask(self._door, wanted, _decode_page, deadline)
        if page.epoch != self._epoch:
            raise LogError(f"this was log {self._epoch} and is log {page.epoch} now; restart what was reading it")
        return page
