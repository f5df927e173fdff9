"""HTTP as an effect: one request, recorded with its answer, by the standard library alone.

    from dspex import http
    reply = await http("GET", "https://example.org/price", headers={"Authorization": Secret("env:TOKEN")})

A secret is looked up when the request leaves, so that the log holds only where it is.
"""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPConnection, HTTPSConnection
from typing import Any

from dspex.agents.secrets import Secret, reveal
from dspex.core.effects import effect, idempotency_key, time_left, when_cut
from dspex.core.errors import ConfigurationError, EffectFailed
from dspex.core.schema import Schema

__all__ = ["HttpReply", "http"]

MAX_REPLY = 512 << 10
"""Bytes of a body that is taken in; more is a failure, for it would be recorded."""
TIMEOUT = 30.0


class HttpReply(Schema):
    """What a server answered, whatever its status. Header names are in lower case; bytes that are not UTF-8 show as
    backslash escapes."""

    status: int
    headers: dict[str, str]
    body: str


@effect(hidden=("headers",))
def http(
    method: str, url: str, *, headers: Mapping[str, str] | None = None, body: str | bytes | None = None,
    timeout: float = TIMEOUT,
) -> HttpReply:  # fmt: skip
    """Send one HTTP request and record its answer; a repeat after a crash carries the same `Idempotency-Key`.

    Each step takes at most what is left of the task's time, and when the task is cancelled the connection is closed. A
    value of type Secret in `headers` is replaced by what it refers to. Raises EffectFailed when there is no answer
    within `timeout` seconds for each step, when it has more than 512 KiB, and for a URL that is not http or https.
    """
    left = time_left()
    if not left:
        raise EffectFailed(f"{method} {url[:200]} was not sent: the time of the task is up", name="http")
    if not url.lower().startswith(("http://", "https://")):
        raise EffectFailed(f"{url[:80]!r} is no http or https URL", name="http")
    sent = {name: _value(value) for name, value in (headers or {}).items()}
    if key := idempotency_key():
        sent.setdefault("Idempotency-Key", key)
    data = body.encode() if isinstance(body, str) else body
    request = urllib.request.Request(url, data=data, headers=sent, method=method.upper())
    try:
        with _OPENER.open(request, timeout=min(timeout, left)) as reply:
            return _reply(reply)
    except urllib.error.HTTPError as error:  # an answer like any other
        with error:
            return _reply(error)
    except (OSError, ValueError) as error:
        # Only the kind: its words may hold a header's value.
        reason = getattr(error, "reason", None) or type(error).__name__
        kind = reason if isinstance(reason, str) else type(reason).__name__
        raise EffectFailed(f"{method} {url[:200]} got no answer: {kind}", name="http") from None


class _Plain(HTTPConnection):
    """A connection that is closed when nobody waits for the answer any more."""

    def connect(self) -> None:
        super().connect()
        when_cut(lambda: _shut(self.sock))


class _Secure(HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        when_cut(lambda: _shut(self.sock))


class _PlainHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Plain, request)


class _SecureHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(_Secure, request)


def _shut(sock: socket.socket | None) -> None:
    """Wake the thread that reads from it."""
    if sock is not None:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


_OPENER = urllib.request.build_opener(_PlainHandler, _SecureHandler)


def _reply(reply: Any) -> HttpReply:
    body: bytes = reply.read(MAX_REPLY + 1)
    if len(body) > MAX_REPLY:
        raise EffectFailed(f"the answer has more than {MAX_REPLY:,} bytes", name="http")
    return HttpReply(
        status=reply.status, headers={name.lower(): value for name, value in reply.headers.items()},
        body=body.decode("utf-8", "backslashreplace"),
    )  # fmt: skip


def _value(value: str) -> str:
    if not isinstance(value, Secret):
        return value
    try:
        return reveal(value)
    except ConfigurationError as error:
        raise EffectFailed(str(error), name="http") from None
