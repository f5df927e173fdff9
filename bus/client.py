"""The hardened NATS client: nats-py's connection, with its traps closed and a direct path for the hot messages.

What differs from nats-py as it comes:
- bytes that are not UTF-8 in a subject or reply never end the reading loop; and if that loop ever ends, we reconnect;
- it reconnects for ever, and says in one plain sentence every few seconds that it is trying;
- handlers are called straight from the reading loop with undecoded bytes: no queue that drops, no task a message;
- requests share one inbox and can be pipelined; what was in flight when the connection broke fails at once.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from typing import Self

from nats.errors import Error as NatsError

from dspex.bus.identity import Identity
from dspex.bus.wire import Handler, Message, Tap, Wire
from dspex.core.access import API
from dspex.core.errors import ConnectionFailed
from dspex.core.masking import masked

__all__ = ["Client", "Message"]

logger = logging.getLogger("dspex.bus")

CALL_TIMEOUT = 5.0
TICK = 0.25
"""Seconds between looks at the clock: a timeout is exact to so much."""
COMPLAIN_EVERY = 3.0
MAX_SUBJECTS = 4000
"""What fits into a control line of 4,096 bytes, the server's default, beside two lengths and the verb."""
FRAME = len("HPUB    \r\n\r\n")
HEADERS = len("NATS/1.0\r\n\r\n")
_SPACE = re.compile(r"\s")
_known_names: dict[str, bytes] = {}
_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class Client:
    """A connection to NATS: the `Connection` port, over nats-py.

    Make one with `await Client.connect(url)`. Handlers run in the reading loop, so they must not block; an exception
    in one is logged and costs nothing else.
    """

    def __init__(self, url: str, name: str, silent: bool = False) -> None:
        self.url, self.name = url, name
        self.credentials: str | None = None
        self.identity = Identity()
        self._wire = Wire()
        self._inbox, self._inbox_bytes, self._api = "", b"", ""
        self._loop = asyncio.get_running_loop()
        self._now = 0.0
        self._tokens = itertools.count(1)
        self._waiting: dict[bytes, tuple[asyncio.Future[Message], float]] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._lost_at: float | None = None
        self._complained = time.monotonic()
        self._silent = silent
        self._last_error: Exception | None = None
        self.on_reconnect: list[Callable[[], None]] = []
        self.on_closed: list[Callable[[], None]] = []

    @classmethod
    async def connect(
        cls, url: str, *, name: str = "dspex", wait: float | None = 2.0, credentials: str | None = None,
        silent: bool = False,
    ) -> Self:  # fmt: skip
        """Connect. `wait` is how many seconds to keep trying (None: for ever, with a sentence every few seconds).

        `url` may name several servers, separated by commas; `credentials` is the path of a NATS credentials file, or of
        a context (`.json`); `silent` leaves it to another process of the system to say that no server answers. Raises
        ConnectionFailed with a sentence that names the address, and ConfigurationError for credentials that cannot be
        used.
        """
        client = cls(url, name, silent)
        client._be(credentials)
        started = time.monotonic()
        while True:
            try:
                await client._open()
                return client
            except (TimeoutError, OSError, NatsError, ValueError) as error:
                client._wire.abandon()
                away = time.monotonic() - started
                reason = _reason(client._last_error or error)
                what = "the server refuses us" if "uthorization" in reason else "no NATS server answers"
                sentence = f"{what} at {masked(url)} ({reason})"
                if wait is not None and away >= wait:
                    raise ConnectionFailed(f"{sentence}; {_remedy(sentence)}") from None
                client._complain(f"{sentence}; trying again, {away:.0f} s so far")
                await asyncio.sleep(min(0.1 if wait is not None else 0.5, 0.5))
                client._wire = Wire()

    @classmethod
    async def connect_unless(
        cls, stopping: asyncio.Event, url: str, *, name: str = "dspex", credentials: str | None = None,
        silent: bool = False,
    ) -> Self | None:  # fmt: skip
        """Connect, trying for ever; None when `stopping` is set first."""
        connecting = asyncio.create_task(cls.connect(url, name=name, wait=None, credentials=credentials, silent=silent))
        stop = asyncio.create_task(stopping.wait())
        await asyncio.wait({connecting, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if connecting.done():
            return connecting.result()
        while not connecting.done():  # `asyncio.wait_for` may lose a cancellation that comes with an answer
            connecting.cancel()
            await asyncio.wait({connecting}, timeout=0.1)
        return None

    def _be(self, credentials: str | None) -> None:
        self.credentials, self.identity = credentials, Identity.load(credentials)
        self._inbox = f"{self.inbox()}."
        self._inbox_bytes = self._inbox.encode()
        self._api = self.identity.api

    async def _open(self) -> None:
        wire = self._wire
        await wire.connect(
            self.url.split(","), name=self.name, allow_reconnect=False, connect_timeout=5,
            reconnect_time_wait=0, max_reconnect_attempts=1, ping_interval=5, max_outstanding_pings=2,
            error_cb=self._on_error, disconnected_cb=self._on_lost, reconnected_cb=self._on_back,
            closed_cb=self._on_closed, **self.identity.options(),
        )  # fmt: skip
        # Only the first connect is ours to repeat; from here on the library does it, for ever.
        wire.options["allow_reconnect"] = True
        wire.options["reconnect_time_wait"] = 0.1
        wire.options["max_reconnect_attempts"] = -1
        if len(wire.servers) < self.url.count(",") + 1:
            wire.set_server_pool(self.url.split(","))
        self._now = self._loop.time()
        wire.tap(f"{self._inbox}*", "", self._on_reply)
        self._sweeper = asyncio.create_task(self._sweep(), name="dspex-call-timeouts")

    @property
    def max_payload(self) -> int:
        return self._wire._max_payload

    @property
    def connected(self) -> bool:
        return self._wire.is_connected

    def inbox(self) -> str:
        """A new subject for answers that only we may hear."""
        return f"{self.identity.inbox}.{secrets.token_hex(11)}"

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        """Send without waiting. ValueError for a subject or header that cannot be sent, or a body over the limit."""
        _check_subject(subject)
        if reply:
            _check_subject(reply)
        if self._api and subject.startswith(API):
            subject = self._api + subject[len(API) :]
        self._wire.send(self._command(subject.encode(), reply.encode(), data, headers))

    def respond(self, message: Message, data: bytes, *, headers: Mapping[str, str] | None = None) -> None:
        """Answer a request on the reply subject it came with, byte for byte."""
        reply = message.raw_reply
        if reply and b"\r" not in reply and b" " not in reply:
            self._wire.send(self._command(reply, b"", data, headers))

    def acknowledge(self, message: Message, word: bytes) -> None:
        """Tell JetStream what became of a delivery: `+ACK`, `+WPI`, `-NAK`."""
        self._wire.send(b"PUB %b  %d\r\n%b\r\n" % (message.raw_reply, len(word), word))

    def call(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, timeout: float = CALL_TIMEOUT
    ) -> asyncio.Future[Message]:
        """Send a request and return the future of its reply; it fails with TimeoutError after `timeout` seconds."""
        token = b"%x" % next(self._tokens)
        if self._api and subject.startswith(API):
            subject = self._api + subject[len(API) :]
        self._wire.send(self._command(subject.encode(), self._inbox_bytes + token, data, headers))
        future: asyncio.Future[Message] = self._loop.create_future()
        self._waiting[token] = (future, self._now + timeout)
        return future

    async def request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, timeout: float = 5.0
    ) -> Message:
        """Send a request and wait for one reply; no responders come as a message with status 503."""
        _check_subject(subject)
        async with asyncio.timeout(timeout):
            return await self.call(subject, data, headers=headers, timeout=timeout + 1)

    def subscribe(self, subject: str, handler: Handler, *, queue: str = "") -> Tap:
        _check_subject(subject)
        return self._wire.tap(subject, queue, handler)

    async def flush(self, timeout: float = 5.0) -> None:
        """Wait until the server has seen everything sent so far. Raises ConnectionFailed."""
        self._wire.push()
        try:
            await self._wire.flush(timeout=max(1, round(timeout)))
        except (NatsError, OSError, RuntimeError) as error:  # uvloop's word for a socket that is closed is RuntimeError
            raise ConnectionFailed(f"the NATS server does not answer ({_reason(error)})") from None

    def cut(self) -> None:
        """Break the connection, from any thread, so that the server knows that our loop stands still."""
        self._wire.cut()

    async def close(self) -> None:
        """Send what waits, then close."""
        if self._sweeper:
            self._sweeper.cancel()
        if not self._wire.is_closed:
            if self._wire.is_connected:
                self._wire.push()
                try:
                    await self._wire.flush(timeout=1)
                except (NatsError, OSError, RuntimeError):
                    logger.debug("not everything could be sent before closing")
            self.on_closed.clear()
            try:
                await self._wire.close()
            except (OSError, RuntimeError, NatsError) as error:  # while it connects again, its socket is closed
                logger.debug("closing: %s", error)
        self._fail_waiting("the connection to NATS was closed")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    # -- inside

    def _command(self, subject: bytes, reply: bytes, data: bytes, headers: Mapping[str, str] | None) -> bytes:
        frame = _frame(subject, reply, data, headers)
        # A frame is a little more than its payload; only one near a limit is looked at closely.
        if len(frame) > self._wire._max_payload or len(subject) + len(reply) > MAX_SUBJECTS:
            if len(subject) + len(reply) > MAX_SUBJECTS:
                raise ValueError(
                    f"subject and reply have {len(subject) + len(reply):,} bytes, more than a server takes"
                )
            size = len(frame) - len(subject) - len(reply) - FRAME if headers else len(data)
            if size > self._wire._max_payload:
                raise ValueError(f"{size:,} bytes are more than the server's limit of {self._wire._max_payload:,}")
        return frame

    def _on_reply(self, message: Message) -> None:
        waiting = self._waiting.pop(message.raw_subject[len(self._inbox) :], None)
        if waiting and not waiting[0].done():
            waiting[0].set_result(message)

    async def _sweep(self) -> None:
        """Expire calls. A token's timeout is nearly constant, so the table is nearly in order of expiry."""
        while True:
            await asyncio.sleep(TICK)
            self._now = now = self._loop.time()
            for token in [token for token, (_, expires) in self._waiting.items() if expires < now]:
                future, _ = self._waiting.pop(token)
                if not future.done():
                    future.set_exception(TimeoutError("no reply in time"))
                    future.exception()
            if self._lost_at is not None:
                away = time.monotonic() - self._lost_at
                self._complain(f"no NATS server answers at {masked(self.url)} for {away:.0f} s; trying on")

    def _fail_waiting(self, why: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for future, _ in waiting.values():
            if not future.done():
                future.set_exception(ConnectionFailed(why))
                future.exception()

    def _complain(self, sentence: str) -> None:
        now = time.monotonic()
        if now - self._complained >= COMPLAIN_EVERY:
            self._complained = now
            logger.log(logging.DEBUG if self._silent else logging.WARNING, sentence)

    async def _on_error(self, error: Exception) -> None:
        self._last_error = error
        if "permissions violation" in str(error).lower():
            logger.warning("the NATS server refused: %s", error)
        else:
            logger.debug("nats: %r", error)

    async def _on_lost(self) -> None:
        if not self._wire.is_closed:
            self._lost_at = time.monotonic()
            self._fail_waiting("the connection to NATS was lost; whether the request was carried out is unknown")

    async def _on_back(self) -> None:
        away = time.monotonic() - self._lost_at if self._lost_at is not None else 0.0
        self._lost_at = None
        logger.info("connected to NATS again after %.1f s", away)
        for callback in list(self.on_reconnect):
            try:
                callback()
            except ConnectionFailed as error:  # the others must begin anew all the same
                logger.debug("after a reconnect: %s", error)

    async def _on_closed(self) -> None:
        self._fail_waiting("the connection to NATS is closed")
        for callback in self.on_closed:
            callback()


def _frame(subject: bytes, reply: bytes, data: bytes, headers: Mapping[str, str] | None) -> bytes:
    if headers is None:
        return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(data), data)
    fields = b""
    for name, value in headers.items():
        fields += _field(name, value)
    size = len(fields) + HEADERS
    return b"HPUB %b %b %d %d\r\nNATS/1.0\r\n%b\r\n%b\r\n" % (
        subject, reply, size, size + len(data), fields, data,
    )  # fmt: skip


def _field(name: str, value: str) -> bytes:
    begin = _known_names.get(name)
    if begin is None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no header name")
        begin = f"{name}: ".encode()
        if len(_known_names) < 256:
            _known_names[name] = begin
    if "\r" in value or "\n" in value:
        value = value.replace("\r", " ").replace("\n", " ")
    return b"%b%b\r\n" % (begin, value.encode())


def _check_subject(subject: str) -> None:
    if not subject or _SPACE.search(subject):
        raise ValueError(f"{subject!r} is no subject")


def _remedy(sentence: str) -> str:
    context = "name a context with NATS_CREDS, as `dspex secure init` makes one"
    if "uthorization" in sentence:
        return f"the server has access rules, and lets in whom it knows: {context}"
    if "offers no TLS" in sentence:
        return "turn TLS on at the server, or take `ca` out of the context"
    if "certificate" in sentence.lower() or "tls" in sentence.lower():
        return f"the server wants TLS, with certificates that you trust: {context}"
    return "start one with `dspex up`, or name yours with --nats URL"


def _reason(error: BaseException) -> str:
    if isinstance(error, ConnectionRefusedError) or "Connect call failed" in str(error):
        return "connection refused"
    text = str(error).removeprefix("nats: ")
    return text or type(error).__name__
