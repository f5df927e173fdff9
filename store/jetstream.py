"""The log in a JetStream stream: compare-and-set appends, reads from the stream's leader, and no gaps.

A reply that is missing or says "wrong last sequence" proves nothing: the append may be there. Whatever is in
doubt is settled by reading the aggregate's last message from the leader and comparing its bytes with those
that were sent.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Mapping, Sequence

import msgspec

from dspex.core.errors import ConnectionFailed, LogError
from dspex.core.events import Event, Head
from dspex.core.headers import EXPECTED
from dspex.core.ports import Appended, Conflict, Connection, Entry, Message
from dspex.core.subjects import Subjects, parse_aggregate
from dspex.store.api import LONGEST_NAP, NAP, Answer, Api, microseconds_of, without_server_fields
from dspex.store.cursor import Cursor
from dspex.store.rules import (
    SCAN_BYTES,
    commit_body,
    door_size,
    first_version,
    head_of,
    microseconds,
    subject_filter,
)

__all__ = ["JetStreamLog"]

_OVERHEAD = 128
"""What the header of an append takes of a message's size, at most."""

_UNPROVEN = frozenset({10071, 10164, 10158})
"""Wrong last sequence, or another append under way in the cluster: read, then decide."""

_BATCH_WAIT = 5.0


class _Ack(Answer):
    seq: int = 0


_decode_ack = msgspec.json.Decoder(_Ack).decode


class JetStreamLog:
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
        self._connection, self._subjects, self._epoch = connection, subjects, epoch
        self._api = Api(connection, subjects.stream, patience)
        self._inbox = inbox
        self._cursors: set[Cursor] = set()

    @property
    def epoch(self) -> str:
        """Which log this is."""
        return self._epoch

    async def append(self, aggregate: str, events: Sequence[Event], expected: Head) -> Appended | Conflict:
        """Append one commit if the aggregate still stands at `expected`."""
        body = commit_body(aggregate, events, expected, self._connection.max_payload - _OVERHEAD)
        subject = self._subjects.event(aggregate)
        ack: _Ack | None = None
        try:  # as in _try, without the cost of another coroutine for each task
            reply = await self._api.send(subject, body, {EXPECTED: str(expected.position)})
            ack = _decode_ack(reply.data)
            if ack.error is None and ack.seq:
                return Appended(Head(events[-1].version, ack.seq))
        except (TimeoutError, ConnectionFailed, msgspec.DecodeError):
            pass
        return await self._settle(subject, body, events[-1].version, expected, ack)

    async def store(self, subject: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Store a door message and return its position.

        The LogError says whether nothing was stored or that it is unknown: unlike an append, a door message
        cannot be recognized afterwards, so it is sent again only when the first was surely not stored.
        """
        door_size(self._subjects, subject, body, headers, self._connection.max_payload)
        try:
            reply = await self._api.send(subject, body, headers or None)
            if reply.status == 503:  # no such door, or the stream has no leader just now
                await self._newest(">")
                reply = await self._api.send(subject, body, headers or None)
            if reply.status == 503:
                raise LogError(f"the log does not take {subject}: no program of that name is registered")
            ack = _decode_ack(reply.data)
        except (TimeoutError, ConnectionFailed, msgspec.DecodeError) as error:
            raise LogError(f"whether the message to {subject} was stored is unknown: {error}") from None
        if ack.error is not None or not ack.seq:
            raise LogError(f"the log refused the message to {subject}: {_said(ack)}")
        return ack.seq

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

    # -- appends

    async def _try(self, subject: str, body: bytes, position: int) -> _Ack | None:
        """One attempt; None when what came of it is unknown."""
        try:
            reply = await self._api.send(subject, body, {EXPECTED: str(position)})
            return _decode_ack(reply.data)
        except (TimeoutError, ConnectionFailed, msgspec.DecodeError):
            return None

    async def _settle(
        self, subject: str, body: bytes, version: int, expected: Head, ack: _Ack | None
    ) -> Appended | Conflict:
        """Find out what became of an append whose reply did not say Appended, and go on until it is known."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._api.patience
        nap = NAP
        while True:
            if ack is not None and ack.error is None and ack.seq:
                return Appended(Head(version, ack.seq))
            if ack is not None and ack.error is not None and not _heals(ack):
                raise LogError(f"the log refused an append to {subject}: {_said(ack)}")
            last = await self._newest(subject, deadline)
            if last is not None and last.body == body:
                return Appended(Head(version, last.position))
            if (last.position if last is not None else 0) != expected.position:
                return Conflict(head_of(last.body, last.position) if last is not None else Head())
            if loop.time() > deadline:
                raise LogError(f"the log did not confirm an append to {subject} within {self._api.patience:.0f} s")
            await asyncio.sleep(nap)
            nap = min(nap * 2, LONGEST_NAP)
            ack = await self._try(subject, body, expected.position)

    async def _end(self, subject: str | None) -> int:
        """The position of the newest entry that matches, 0 when there is none.

        Only `>` is cheap: any other wildcard costs the server 0.1 µs a subject that it matches. But `>` finds
        nothing when the stream's newest message was deleted.
        """
        newest = await self._newest(subject or ">")
        if newest is None and subject in (None, ">"):
            newest = await self._newest(f"{self._subjects.prefix}.>")
        return newest.position if newest is not None else 0

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


def _heals(ack: _Ack) -> bool:
    """Whether a refusal may pass with time, or is to be decided by reading."""
    return ack.error is not None and (ack.error.err_code in _UNPROVEN or ack.error.code == 503)


def _said(ack: _Ack) -> str:
    return ack.error.description if ack.error is not None else "no position in the reply"
