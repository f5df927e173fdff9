"""The writing half of a log that is reached through NATS: compare-and-set appends, and what is in doubt.

A reply that is missing or says "wrong last sequence" proves nothing: the append may be there. Whatever is in doubt is
settled by reading the aggregate's newest message from where the truth is, and comparing its bytes with those that were
sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from dspex.core.errors import ConnectionFailed, LogError
from dspex.core.events import Event, Head
from dspex.core.headers import EXPECTED
from dspex.core.ports import Appended, Conflict, Connection, Entry
from dspex.core.subjects import Subjects
from dspex.store.api import LONGEST_NAP, NAP, Answer, Api
from dspex.store.rules import commit_body, door_size, head_of

__all__ = ["Remote"]

_OVERHEAD = 128
"""What the header of an append takes of a message's size, at most."""

_UNPROVEN = frozenset({10071, 10164, 10158})
"""Wrong last sequence, or another append under way in the cluster: read, then decide."""


class _Ack(Answer):
    seq: int = 0


_decode_ack = msgspec.json.Decoder(_Ack).decode


class Remote:
    """`patience` is how many seconds an operation goes on trying while nobody answers; then it raises LogError. The
    connection is the caller's: closing the log does not close it."""

    def __init__(self, connection: Connection, subjects: Subjects, epoch: str, *, patience: float = 30.0) -> None:
        self._connection, self._subjects, self._epoch = connection, subjects, epoch
        self._api = Api(connection, subjects.stream, patience)

    async def _newest(self, pattern: str, deadline: float | None = None) -> Entry | None:
        """The newest entry of a subject, from where the truth is. Raises LogError past the deadline."""
        raise NotImplementedError

    async def _reachable(self) -> None:
        """Wait until the log answers. Raises LogError."""
        raise NotImplementedError

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
                await self._reachable()
                reply = await self._api.send(subject, body, headers or None)
            if reply.status == 503:
                raise LogError(f"the log does not take {subject}: no program of that name is registered")
            ack = _decode_ack(reply.data)
        except (TimeoutError, ConnectionFailed, msgspec.DecodeError) as error:
            raise LogError(f"whether the message to {subject} was stored is unknown: {error}") from None
        if ack.error is not None or not ack.seq:
            raise LogError(f"the log refused the message to {subject}: {_said(ack)}")
        return ack.seq

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

def _heals(ack: _Ack) -> bool:
    """Whether a refusal may pass with time, or is to be decided by reading."""
    return ack.error is not None and (ack.error.err_code in _UNPROVEN or ack.error.code == 503)


def _said(ack: _Ack) -> str:
    return ack.error.description if ack.error is not None else "no position in the reply"
