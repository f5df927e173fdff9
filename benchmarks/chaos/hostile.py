"""A client that means harm: it sends what nobody should, at every door that a client can reach.

What it may not do on a system that was started with `--secure` is tested in tests/e2e/test_leaks.py; on one that is
open to all, whoever may write to `dspex.event.>` may write anything (SECURITY.md), so that this one keeps to the doors,
to the subjects that agents serve, to replies and to what it has seen at the doors before.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, deque
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit

__all__ = ["Fuzzer"]

DOORS = ("ask", "task", "submit", "result", "outcome", "signal", "variables.chaos.get", "variables.chaos.propose")
HEADERS = (
    "Dspex-Key", "Dspex-Deadline", "Dspex-Fork", "Dspex-Assignment", "Dspex-Code", "Dspex-Parent", "Dspex-Reply",
    "Dspex-Sealed", "Dspex-Wait", "Dspex-Task", "Dspex-Time", "Dspex-Known", "Dspex-Actor", "Dspex-Causation",
    "Nats-Service-Error-Code", "Nats-Request-Info", "Status", "traceparent", "dspex-KEY", "X", "\xe9\xff",
)  # fmt: skip
VALUES = (
    "", "0", "-1", "NaN", "1e999", "42@7", "1@1", "999999999999999999999", "x" * 5000, "\xff\xfe",
    "2026-13-45T99:99:99Z", "dspex.task.chaos", "dspex.event.task.chaos.1", "_INBOX.x",
    "null", "{}", "../../etc/passwd", "%s%n", "\x00", "é",
)  # fmt: skip
KINDS = (
    "bytes", "bytes", "types", "deep", "huge", "headers", "headers", "subject", "replay", "replay", "flipped", "reply",
    "raw",
)  # fmt: skip
PAUSE = 0.004


class Fuzzer:
    """Sends hostile messages over a socket of its own, as long as the context lasts; `sent` counts them by kind."""

    def __init__(self, url: str, chance: random.Random) -> None:
        address = urlsplit(url)
        self._host, self._port = address.hostname or "127.0.0.1", address.port or 4222
        self._chance = chance
        self._seen: deque[tuple[bytes, bytes, bytes]] = deque(maxlen=2000)
        self.sent: Counter[str] = Counter()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._attack())]
        return self

    async def __aexit__(self, *raised: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _attack(self) -> None:
        while True:
            with suppress(OSError, EOFError):
                await self._connected()
            await asyncio.sleep(0.1)  # the server throws out who breaks its rules

    async def _connected(self) -> None:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        listening = asyncio.create_task(self._listen(reader, writer))
        wants = b"SUB dspex.task.chaos 1\r\nSUB dspex.signal.chaos 2\r\nSUB _INBOX.evil.> 3\r\n"
        writer.write(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n' + wants)
        try:
            while not listening.done():
                writer.write(self._one())
                await writer.drain()
                await asyncio.sleep(PAUSE)
        finally:
            listening.cancel()
            writer.close()

    async def _listen(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep what others send to the doors, so that it can be sent again, late, twice or with a byte changed."""
        while line := await reader.readline():
            words = line.split()
            if words[:1] == [b"PING"]:
                writer.write(b"PONG\r\n")
            elif words[:1] == [b"MSG"] or words[:1] == [b"HMSG"]:
                body = await reader.readexactly(int(words[-1]) + 2)
                header = int(words[-2]) if words[0] == b"HMSG" else 0
                if words[1].startswith(b"dspex."):
                    self._seen.append((words[1], body[:header], body[header:-2]))

    def _one(self) -> bytes:
        """The bytes of one hostile message."""
        kind = self._chance.choice(KINDS)
        if kind in ("replay", "flipped") and not self._seen:
            kind = "types"
        self.sent[kind] += 1
        made: bytes = getattr(self, f"_{kind}")()
        return made

    def _door(self) -> bytes:
        door = self._chance.choice(DOORS)
        return f"dspex.{door}".encode() if "." in door else f"dspex.{door}.chaos".encode()

    def _bytes(self) -> bytes:
        return _publish(self._door(), self._chance.randbytes(self._chance.randrange(200)))

    def _types(self) -> bytes:
        junk: list[Any] = [
            None, [], {}, "x", 1, True, {"n": "1", "kind": "quick"}, {"n": 1, "kind": 7}, {"n": 10**30, "kind": "x"},
            {"n": 1, "kind": "quick", "more": 1}, {"task": {}}, {"task": -1}, {"task": "1", "name": 5}, {"task": 1e300},
            {"task": 10**40, "name": "cancel"}, {"key": ""}, {"values": {"x": []}}, {"task": 1, "score": "high"},
            {"task": None, "name": "cancel", "value": {"a": [1] * 100}}, {"n": 1, "kind": "quick", "seconds": -1},
        ]  # fmt: skip
        return _publish(self._door(), json.dumps(self._chance.choice(junk)).encode())

    def _deep(self) -> bytes:
        depth = self._chance.choice((65, 1000, 100_000))
        opening, closing = self._chance.choice(((b"[", b"]"), (b'{"a":', b"}")))
        return _publish(self._door(), opening * depth + b"1" + self._chance.choice((closing * depth, b"")))

    def _huge(self) -> bytes:
        if self._chance.random() < 0.9:  # few: each is of a megabyte and more
            return self._types()
        size = self._chance.choice(((1 << 20) + 1, 3 << 20))
        return _publish(self._door(), b'{"n": 1, "kind": "quick", "more": "' + b"x" * size + b'"}')

    def _headers(self) -> bytes:
        named = [
            (self._chance.choice(HEADERS), self._chance.choice(VALUES)) for _ in range(self._chance.randrange(1, 5))
        ]
        body = json.dumps({"n": self._chance.randrange(100), "kind": "quick", "seconds": 0.0}).encode()
        return _publish(self._door(), body, _header(named))

    def _subject(self) -> bytes:
        subjects = (
            b"dspex.ask.chaos.x", b"dspex.task.\xff\xfe", b"dspex.ask.nobody", b"dspex.control.chaos.cancel",
            b"dspex.privacy.forget", b"dspex.log.read", b"dspex.log.tail", b"dspex.log.rows",
            b"dspex.registry.register", b"dspex.registry.guard", b"dspex.archive.tasks", b"dspex.archive.state",
            b"dspex.archive.views", b"$SRV.INFO",
            b"dspex.result.\xc3\x28", b"dspex.lm.x", b"_INBOX.\xff", b"_R_.\xff", b"dspex.chunk.chaos.1",
        )  # fmt: skip
        return _publish(self._chance.choice(subjects), self._chance.randbytes(self._chance.randrange(60)))

    def _replay(self) -> bytes:
        subject, header, body = self._chance.choice(self._seen)
        return _publish(subject, body, header)

    def _flipped(self) -> bytes:
        subject, _, body = self._chance.choice(self._seen)
        if not body:
            return self._types()
        changed = bytearray(body)
        changed[self._chance.randrange(len(changed))] ^= 1 << self._chance.randrange(8)
        return _publish(subject, bytes(changed))

    def _reply(self) -> bytes:
        """Answers that nobody asked for, at inboxes that may be somebody's."""
        inbox = self._chance.choice((b"_INBOX.", b"_R_.")) + b"%d" % self._chance.randrange(1000)
        return _publish(inbox, b'{"n": 1, "value": 666}', _header([("Dspex-Task", "1")]))

    def _raw(self) -> bytes:
        """What is no message at all, which the server answers by closing the connection."""
        if self._chance.random() < 0.8:
            return self._types()
        return self._chance.choice((b"\x00\xff\r\n", b"PUB\r\n", b"PUB x 99999999999\r\n", b"HPUB a 5 3\r\nabc\r\n"))


def _header(named: list[tuple[str, str]]) -> bytes:
    lines = b"".join(name.encode("latin-1") + b": " + _line(value) + b"\r\n" for name, value in named)
    return b"NATS/1.0\r\n" + lines + b"\r\n"


def _line(value: str) -> bytes:
    try:
        return value.encode("latin-1")
    except UnicodeEncodeError:
        return value.encode()


def _publish(subject: bytes, body: bytes, header: bytes = b"") -> bytes:
    reply = b"_INBOX.evil.1"
    if header:
        return b"HPUB %b %b %d %d\r\n%b%b\r\n" % (subject, reply, len(header), len(header) + len(body), header, body)
    return b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, len(body), body)
