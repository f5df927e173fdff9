"""The protocols that the outside must satisfy: a log to write to, a connection to talk through.

Every implementation of a port passes the port's suite in `dspex.store.contract`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from dspex.core.events import Event, Head

__all__ = [
    "MAX_OBJECT",
    "Appended",
    "Backend",
    "Conflict",
    "Connection",
    "Entry",
    "Kept",
    "KeyChange",
    "Keys",
    "Log",
    "Message",
    "Objects",
    "Stored",
    "Subscription",
    "Taken",
]  # fmt: skip

MAX_OBJECT = 64 << 20
"""The most bytes that an object beside the log may have."""


class Entry(Struct, frozen=True, kw_only=True, gc=False):
    """One message of the log: a commit or a door message. `time` is when it was stored, seconds since the epoch."""

    position: int
    time: float
    subject: str
    body: bytes
    headers: dict[str, str]


class Appended(Struct, frozen=True):
    """The append is in the log; `head` is where the aggregate stands now."""

    head: Head


class Conflict(Struct, frozen=True):
    """The aggregate is not where the writer thought; nothing was written; `head` is where it stands."""

    head: Head


class Stored(Struct, frozen=True):
    """A row is in the log, at this position, since this time in seconds since the epoch."""

    position: int
    time: float


class Taken(Struct, frozen=True):
    """The subject's newest row is not where the writer thought, but at this position (0: there is none); nothing was
    written."""

    position: int


class Log(Protocol):
    """A totally ordered, append-only sequence of commits and door messages. Positions start at 1 and only grow.

    Every method raises LogError when the log cannot answer (unreachable, full, closed); an append that raised may
    be retried with the same events: it is stored at most once.
    """

    @property
    def epoch(self) -> str:
        """Which log this is; a recreated log has another epoch."""

    async def append(self, aggregate: str, events: Sequence[Event], expected: Head) -> Appended | Conflict:
        """Append one commit if the aggregate still stands at `expected`.

        The events carry the versions `expected.version + 1` and on (ValueError otherwise). Retrying the very same
        append returns the same Appended as the first time, unless others have appended since: then Conflict.
        Appended means durable to the degree the log was opened with.
        """

    async def store(self, subject: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Store a door message and return its position."""

    async def read(self, aggregate: str) -> list[Entry]:
        """All commits of an aggregate, oldest first; never stale: it shows every append acknowledged before."""

    async def last(self, aggregate: str) -> Entry | None:
        """The newest commit of an aggregate; never stale."""

    async def entry(self, position: int) -> Entry | None:
        """What stands at a position; never stale."""

    async def scan(self, after: int, limit: int = 1000, subject: str | None = None) -> list[Entry]:
        """Up to `limit` entries behind position `after`, in order, without gaps.

        `subject` is a filter as NATS knows them (`*` one token, `>` the rest). An empty list means that none is
        there now.
        """

    def tail(self, after: int, subject: str | None = None) -> AsyncIterator[Entry]:
        """All entries behind `after`, in order, without gaps, and then every new one as it comes. Close it to end."""

    async def head(self) -> int:
        """The position of the newest entry; 0 when the log is empty."""

    async def close(self) -> None:
        """Give back what the log holds open. Closing twice is fine."""


class Kept(Struct, frozen=True):
    """An object that is there: its name, its size in bytes, and when it was last put, in seconds since the epoch."""

    name: str
    size: int
    time: float


class Objects(Protocol):
    """Values beside the log that are too large for it. An object's name is the SHA-256 of what it holds, in hex, so it
    never changes. Every method raises LogError when the store cannot answer."""

    async def put(self, data: bytes) -> str:
        """Keep a value and return its name. Putting it again is fine, and makes it young again. At most 64 MiB."""

    async def get(self, name: str) -> bytes | None:
        """The value of this name; None when it is not here. Raises LogCorrupt when it is not what was put."""

    async def delete(self, name: str, *, before: float | None = None) -> bool:
        """Remove an object, unless it was put again after the time `before`; whether it went. Its bytes are
        overwritten as far as the store can."""

    async def list(self) -> list[Kept]:
        """What is there now."""

    async def tidy(self, before: float) -> int:
        """Remove what puts that were cut off before that time have left; how many."""


class KeyChange(Struct, frozen=True):
    """A key that was made, or forgotten (`key` is None). Numbers grow; a name's newest change counts."""

    number: int
    name: str
    key: bytes | None


class Keys(Protocol):
    """The keys that private values are sealed with, beside the log and never in it. A name is one subject token. A key
    that was forgotten is gone for good: its name never gets another. Raises LogError when the store cannot answer."""

    async def create(self, name: str, key: bytes | None = None) -> bytes:
        """The key of this name, made now (of 32 random bytes, or this one) unless it is there. Raises Forgotten."""

    async def get(self, name: str) -> bytes:
        """The key of this name; never stale. Raises NotFound when it is not here, Forgotten when it was forgotten."""

    async def forget(self, name: str) -> bool:
        """Destroy a key: its bytes are overwritten as far as the store can. Whether there was one. Doing it again, also
        after it was cut off, is fine."""

    async def changes(self, after: int, limit: int = 1000) -> list[KeyChange]:
        """Up to `limit` changes with numbers above `after`, in order; one that a later change replaced may be left
        out."""
class Backend(Log, Protocol):
    """A log that a log process can own and serve to a whole system: it also takes rows as they came from the bus."""

    def put(
        self, subject: str, body: bytes, headers: Mapping[str, str], expected: int | None = None
    ) -> Awaitable[Stored | Taken]:
        """Write these bytes as they are, if the subject's newest row still stands at `expected` (None: in any case).

        Called many times before the first result is awaited; positions follow the order of the calls. The result is
        there when the row is as durable as the log was opened for. Raises LogError, at once or when awaited, when
        nothing was written; a write that failed leaves no part of itself.
        """


class Message(Protocol):
    """A message as it came. Bytes that are not UTF-8 show as backslash escapes; header names are kept as sent."""

    @property
    def subject(self) -> str: ...
    @property
    def reply(self) -> str: ...
    @property
    def data(self) -> bytes: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def status(self) -> int:
        """The status code in the header line, e.g. 503 for no responders; 0 when there is none."""


class Subscription(Protocol):
    """Interest in a subject."""

    def leave(self) -> None:
        """Ask for no more; messages that are on their way still come, until `close`."""

    def close(self) -> None:
        """End it; messages that come later are dropped."""


class Connection(Protocol):
    """A connection to NATS that survives reconnects. Raises ConnectionFailed when it is closed for good."""

    @property
    def max_payload(self) -> int:
        """The largest message body the server takes, in bytes."""

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Send without waiting; buffered up to a bound while the server is away (ConnectionFailed past it)."""

    def call(self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None) -> Awaitable[Message]:
        """Send a request and return its reply's future, so that many can be under way.

        The future fails with ConnectionFailed when the connection is lost: whether the request was carried out is
        then unknown.
        """

    async def request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, timeout: float = 5.0
    ) -> Message:
        """Send a request and wait for one reply, at most `timeout` seconds (TimeoutError).

        A subject that nobody serves gives a message with status 503, it does not raise.
        """

    def subscribe(self, subject: str, handler: Callable[[Message], None], *, queue: str = "") -> Subscription:
        """Call `handler` for every message, in order, from the reading loop: it must not block or raise."""
