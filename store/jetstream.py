"""The log in a JetStream stream: compare-and-set appends, reads from the stream's leader, and no gaps."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

from dspex.core.errors import LogError
from dspex.core.ports import Connection, Entry, Message
from dspex.core.subjects import Subjects, parse_aggregate
from dspex.store.api import microseconds_of, without_server_fields
from dspex.store.cursor import Cursor
from dspex.store.remote import Remote
from dspex.store.rules import SCAN_BYTES, first_version, microseconds, subject_filter

__all__ = ["JetStreamLog"]

_BATCH_WAIT = 5.0


class JetStreamLog(Remote):
    """A log in the stream that `subjects` names, which must exist; `epoch` is the one it was made with.

    `patience` is how many seconds an operation goes on trying while the server is away, has no leader or
    answers nothing; then it raises LogError. The connection is the caller's: closing the log does not close
    it.
    """

    def __init__(
        self,
        connection: Connection,
        subjects: Subjects,
        epoch: str,
        *,
        patience: float = 30.0,
        inbox: str = "_INBOX",
    ) -> None:
        super().__init__(connection, subjects, epoch, patience=patience)
        self._inbox = inbox
        self._cursors: set[Cursor] = set()

    async def read(self, aggregate: str) -> list[Entry]:
        """All commits of an aggregate, oldest first; never stale.

        The leader says which commit is the last. Those before it come in one batch from any replica (ADR-31);
        what a replica that lags does not have comes from the leader.
        """
        subject = self._subjects.event(".".join(parse_aggregate(aggregate)))
        last = await self._newest(subject)
        if last is None:
            return []
        if first_version(last) == 1:
            return [last]
        found = await self._batch(subject, last.position)
        while not found or found[-1].position < last.position:
            after = found[-1].position if found else 0
            entry = await self._api.message({"seq": after + 1, "next_by_subj": subject})
            if entry is None:
                break
            found.append(entry)
        return found

    async def last(self, aggregate: str) -> Entry | None:
        """The newest commit of an aggregate; never stale."""
        return await self._newest(self._subjects.event(".".join(parse_aggregate(aggregate))))

    async def entry(self, position: int) -> Entry | None:
        """What stands at a position; never stale."""
        return await self._api.message({"seq": position}) if position > 0 else None

    async def scan(self, after: int, limit: int = 1000, subject: str | None = None) -> list[Entry]:
        """Up to `limit` entries behind position `after`, in order, without gaps.

        The leader says how far the log goes; an ephemeral consumer gives the entries up to there.
        """
        if subject is not None:
            subject_filter(subject)
        found: list[Entry] = []
        until = await self.head() if limit > 0 else 0
        if until <= after:
            return found
        size = 0
        exact = subject is None
        cursor = self._cursor(after, subject)
        try:
            await cursor.open()
            while len(found) < limit and size < SCAN_BYTES and cursor.position < until:
                if not exact and cursor.exhausted:  # the leader knows whether this replica had it all
                    until, exact = await self._end(subject), True
                    continue
                entries = await cursor.take(limit - len(found))
                if not entries:  # a replica that lags, or the newest was forgotten since
                    until = await self._end(subject)
                found += entries
                size += sum(len(entry.body) for entry in entries)
        finally:
            self._release(cursor)
        return found

    async def tail(self, after: int, subject: str | None = None) -> AsyncIterator[Entry]:
        """All entries behind `after` and then every new one; ends when the log is closed."""
        if self._api.closed:
            raise LogError("the log is closed")
        cursor = self._cursor(after, subject)
        try:
            while not self._api.closed:
                try:
                    entries = await cursor.take(1000)
                except LogError:
                    if self._api.closed:
                        return
                    raise
                for entry in entries:
                    yield entry
        finally:
            self._release(cursor)

    async def head(self) -> int:
        """The position of the newest entry; 0 when the log is empty."""
        return await self._end(None)

    async def close(self) -> None:
        """End the tails; the connection stays open. Closing twice is fine."""
        self._api.closed = True
        for cursor in self._cursors:
            cursor.wake()

    async def _end(self, subject: str | None) -> int:
        """The position of the newest entry that matches, 0 when there is none.

        Only `>` is cheap: any other wildcard costs the server 0.1 µs a subject that it matches. But `>` finds
        nothing when the stream's newest message was deleted.
        """
        newest = await self._newest(subject or ">")
        if newest is None and subject in (None, ">"):
            newest = await self._newest(f"{self._subjects.prefix}.>")
        return newest.position if newest is not None else 0

    async def _reachable(self) -> None:
        await self._newest(">")

    async def _newest(self, pattern: str, deadline: float | None = None) -> Entry | None:
        return await self._api.message({"last_by_subj": pattern}, deadline)

    # -- many messages

    async def _batch(self, subject: str, until: int) -> list[Entry]:
        """Commits of one subject up to a position, as far as the replica that answers has them: maybe not to
        the end.

        Only for event subjects: a door's client could send headers that look like the server's own.
        """
        loop = asyncio.get_running_loop()
        found: list[Entry] = []
        ended: asyncio.Future[None] = loop.create_future()

        def take(message: Message) -> None:
            if ended.done():
                return
            headers = message.headers
            position = int(headers.get("Nats-Sequence", 0))
            if message.status or headers.get("Nats-Subject") != subject or (found and position <= found[-1].position):
                ended.set_result(None)
                return
            time = microseconds(microseconds_of(headers["Nats-Time-Stamp"]))
            kept = without_server_fields(headers)
            found.append(Entry(position=position, time=time, subject=subject, body=message.data, headers=kept))
            if position >= until:
                ended.set_result(None)

        inbox = f"{self._inbox}.{secrets.token_hex(11)}"
        subscription = self._connection.subscribe(inbox, take)
        try:
            while not found or found[-1].position < until:
                before = len(found)
                after = found[-1].position if found else 0
                ended = loop.create_future()
                what = {"seq": after + 1, "next_by_subj": subject, "batch": 1000}
                self._api.publish(f"DIRECT.GET.{self._subjects.stream}", what, inbox)
                try:
                    async with asyncio.timeout(_BATCH_WAIT):
                        await ended
                except TimeoutError:
                    break  # the leader is asked for the rest
                if len(found) == before:
                    break
        finally:
            subscription.close()
        return found

    def _cursor(self, after: int, subject: str | None) -> Cursor:
        cursor = Cursor(self._api, after, subject, self._inbox)
        self._cursors.add(cursor)
        return cursor

    def _release(self, cursor: Cursor) -> None:
        self._cursors.discard(cursor)
        cursor.close()
