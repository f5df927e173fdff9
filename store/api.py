"""JetStream's API as the store uses it: requests that may be repeated freely, and what their answers look
like."""

from __future__ import annotations

import asyncio
import calendar
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

import msgspec

from dspex.core.errors import ConnectionFailed, LogError
from dspex.core.headers import EXPECTED
from dspex.core.ports import Connection, Entry, Message
from dspex.store.rules import microseconds

__all__ = ["Answer", "Api", "Problem", "entry_of", "microseconds_of", "without_server_fields"]

NO_MESSAGE = 10037
NAP, LONGEST_NAP = 0.005, 0.5
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 2.0
"""A request that comes while the stream has no leader is never answered: ask again soon, then less often."""

_SERVER_FIELDS = frozenset(
    f"Nats-{field}" for field in ("Stream", "Subject", "Sequence", "Time-Stamp", "Num-Pending", "Last-Sequence")
) | {EXPECTED}
_encode = msgspec.json.Encoder().encode


class Problem(msgspec.Struct):
    """Why JetStream refused."""

    code: int = 0
    err_code: int = 0
    description: str = ""


class Answer(msgspec.Struct):
    """What every answer may hold."""

    error: Problem | None = None


A = TypeVar("A", bound=Answer)


class _Stored(msgspec.Struct):
    subject: str
    seq: int
    time: str
    data: bytes = b""
    hdrs: bytes = b""


class _Got(Answer):
    message: _Stored | None = None


_decode_got = msgspec.json.Decoder(_Got).decode


class Api:
    """One stream's API. `patience` is how many seconds a request goes on while nobody answers it."""

    def __init__(self, connection: Connection, stream: str, patience: float) -> None:
        self.connection, self.stream, self.patience = connection, stream, patience
        self._get = f"$JS.API.STREAM.MSG.GET.{stream}"
        self.closed = False

    def send(self, subject: str, body: bytes, headers: Mapping[str, str] | None = None) -> Awaitable[Message]:
        """The reply's future. A connection that takes nothing more is a LogError at once."""
        if self.closed:
            raise LogError("the log is closed")
        try:
            return self.connection.call(subject, body, headers=headers)
        except ConnectionFailed as error:
            raise LogError(str(error)) from None

    def publish(self, verb: str, what: object, reply: str = "") -> None:
        """Send a request whose answers come to an inbox, or to nobody."""
        try:
            body = _encode(what) if what is not None else b""
            self.connection.publish(f"$JS.API.{verb}", body, reply=reply)
        except ConnectionFailed as error:
            raise LogError(str(error)) from None

    async def message(self, what: Mapping[str, object], deadline: float | None = None) -> Entry | None:
        """One message as the stream's leader has it, or None: `seq`, `last_by_subj`, or `seq` with
        `next_by_subj`."""
        got = await self.ask(self._get, what, _decode_got, deadline)
        return entry_of(got.message) if got.message is not None else None

    async def request(self, verb: str, what: object, decode: Callable[[bytes], A]) -> A:
        """An API request that may be repeated freely. LogError when refused or not answered."""
        return await self.ask(f"$JS.API.{verb}", what, decode, None)

    async def ask(
        self, subject: str, what: object, decode: Callable[[bytes], A], deadline: float | None = None
    ) -> A:
        """A request on any subject that may be repeated freely. LogError when refused or not answered."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self.patience if deadline is None else deadline
        body = _encode(what)
        nap, wait = NAP, _FIRST_WAIT
        while True:
            try:
                async with asyncio.timeout(max(0.01, min(wait, deadline - loop.time()))):
                    reply = await self.send(subject, body)
                if reply.status != 503:
                    answer = decode(reply.data)
                    problem = answer.error
                    if problem is None or problem.err_code == NO_MESSAGE:
                        return answer
                    if problem.code != 503:
                        raise LogError(f"the log refused {subject}: {problem.description}")
                    why = problem.description
                else:
                    why = "nobody serves it now"
            except (TimeoutError, ConnectionFailed, msgspec.DecodeError) as error:
                why = str(error) or "no answer"
            if loop.time() > deadline:
                raise LogError(f"the log {self.stream} cannot be reached: {why}")
            await asyncio.sleep(nap)
            nap, wait = min(nap * 2, LONGEST_NAP), min(wait * 2, _LONGEST_WAIT)


def entry_of(stored: _Stored) -> Entry:
    """A message of the API's answer as an entry."""
    time = microseconds(microseconds_of(stored.time))
    headers = _fields(stored.hdrs)
    return Entry(position=stored.seq, time=time, subject=stored.subject, body=stored.data, headers=headers)


def microseconds_of(text: str) -> int:
    """RFC 3339 in UTC with up to nine decimals, as Go writes it, to whole microseconds since the epoch; cut,
    not rounded."""
    whole, _, fraction = text.rstrip("Z").partition(".")
    date, _, clock = whole.partition("T")
    year, month, day = map(int, date.split("-"))
    hour, minute, second = map(int, clock.split(":"))
    seconds = calendar.timegm((year, month, day, hour, minute, second, 0, 0, 0))
    return seconds * 1_000_000 + int((fraction + "000000")[:6])


def without_server_fields(headers: Mapping[str, str]) -> dict[str, str]:
    """The sender's headers of a direct get's reply, and not the condition of an append."""
    return {name: value for name, value in headers.items() if name not in _SERVER_FIELDS}


def _fields(raw: bytes) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in raw.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            headers[name.strip().decode("ascii", "backslashreplace")] = value.strip().decode(
                "utf-8", "backslashreplace"
            )
    headers.pop(EXPECTED, None)
    return headers
