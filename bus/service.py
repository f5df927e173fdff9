"""A NATS service as ADR-32 describes it: discovery, statistics, and endpoints that answer errors in plain words.

nats-py's own `micro` serves one request at a time per endpoint and answers an exception with its `repr`; this one
serves many, up to a bound, and never shows more than an error says on purpose.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dspex.bus.client import Client, Message
from dspex.core import headers as h
from dspex.core.codec import rfc3339
from dspex.core.errors import (
    ConnectionFailed,
    InvalidInput,
    LimitExceeded,
    LogCorrupt,
    LogError,
    TaskError,
    Unavailable,
)
from dspex.core.ports import Subscription

__all__ = ["Endpoint", "Request", "Service", "error_reply"]

logger = logging.getLogger("dspex.bus")

QUEUE = "q"
MAX_BODY = 64 << 10
"""Bytes of a question, unless its endpoint takes more."""
LINGER = 60.0
"""Seconds for which a request that was on its way is still taken after a stop."""
BUSY = 1.0
"""Seconds after which a request is worth trying again that came when a service had all it may work on."""
Handler = Callable[["Request"], Coroutine[Any, Any, None] | None]


def error_reply(error: TaskError, task: str | None = None) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an error reply: `{"error": {"type", "message", "task"}}` and the two service headers."""
    task = error.task or task
    body = msgspec.json.encode({"error": {"type": error.type, "message": error.message, "task": task}})
    fields = {h.ERROR_CODE: str(error.code), h.ERROR: " ".join(error.message.split())[:500]}
    if task:
        fields[h.TASK] = task
    if error.retry_after is not None:
        fields[h.RETRY_AFTER] = f"{error.retry_after:.3f}"
    return body, fields


class Request:
    """One request to an endpoint. Answer it once, with `respond` or `fail`."""

    __slots__ = ("_client", "_endpoint", "_started", "message")

    def __init__(self, message: Message, client: Client, endpoint: Endpoint) -> None:
        self.message, self._client, self._endpoint = message, client, endpoint
        self._started = time.perf_counter_ns()

    @property
    def data(self) -> bytes:
        return self.message.data

    @property
    def headers(self) -> dict[str, str]:
        return self.message.headers

    def respond(self, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        self._client.respond(self.message, data, headers=headers)
        self.done()

    def fail(self, error: TaskError) -> None:
        body, fields = error_reply(error)
        self._client.respond(self.message, body, headers=fields)
        self.done(error)

    def done(self, error: TaskError | None = None) -> None:
        """Count the request; for an answer that goes out some other way."""
        endpoint = self._endpoint
        endpoint.requests += 1
        endpoint.nanoseconds += time.perf_counter_ns() - self._started
        if error:
            endpoint.errors += 1
            endpoint.last_error = f"{error.code}:{error.message}"


@dataclass
class Endpoint:
    """A subject that is served, and how it went so far."""

    name: str
    subject: str
    handler: Handler
    queue: str = QUEUE
    metadata: Mapping[str, str] = field(default_factory=dict)
    most: int = MAX_BODY
    """Bytes of a body; one that has more is refused before anybody looks into it."""
    requests: int = 0
    errors: int = 0
    last_error: str = ""
    nanoseconds: int = 0

    def info(self) -> dict[str, Any]:
        return {"name": self.name, "subject": self.subject, "queue_group": self.queue, "metadata": dict(self.metadata)}

    def stats(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "subject": self.subject,
            "queue_group": self.queue,
            "num_requests": self.requests,
            "num_errors": self.errors,
            "last_error": self.last_error,
            "processing_time": self.nanoseconds,
            "average_processing_time": self.nanoseconds // max(self.requests, 1),
        }


class Service:
    """Endpoints under one name, found and measured through `$SRV.PING|INFO|STATS`.

    `limit` bounds how many requests may be worked on at once; one more is answered with 429. `data` gives what the
    statistics say beyond the standard (a function without arguments that returns something JSON can hold).
    """

    def __init__(
        self, client: Client, *, name: str, id: str, version: str, description: str = "",
        metadata: Mapping[str, str] | None = None, limit: int = 1024, data: Callable[[], object] | None = None,
    ) -> None:  # fmt: skip
        self._client, self._limit, self._data = client, limit, data
        self.identity = {"name": name, "id": id, "version": version, "metadata": dict(metadata or {})}
        self.description = description
        self.endpoints: list[Endpoint] = []
        self._started = rfc3339(time.time())
        self._subscriptions: dict[str, Subscription] = {}
        self._leaving: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, endpoint: Endpoint) -> None:
        """Begin to serve an endpoint."""
        self.endpoints.append(endpoint)
        subscription = self._client.subscribe(
            endpoint.subject, lambda message: self._take(endpoint, message), queue=endpoint.queue
        )
        self._subscriptions[endpoint.subject] = subscription

    def withdraw(self, endpoint: Endpoint) -> None:
        """Serve an endpoint no more."""
        self.endpoints.remove(endpoint)
        self._subscriptions.pop(endpoint.subject).close()

    def announce(self) -> None:
        """Answer discovery."""
        name, id = self.identity["name"], self.identity["id"]
        for verb, answer in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):
            for subject in (f"$SRV.{verb}", f"$SRV.{verb}.{name}", f"$SRV.{verb}.{name}.{id}"):
                self._subscriptions[subject] = self._client.subscribe(subject, _answering(self._client, answer))

    def stop(self) -> None:
        """Ask for no new request. What is on its way, or being worked on, is served; `finish` waits for it."""
        self._leaving = list(self._subscriptions.values())
        self._subscriptions.clear()
        for subscription in self._leaving:
            subscription.leave()
        asyncio.get_running_loop().call_later(LINGER, _close, self._leaving)  # nobody may finish

    async def finish(self, grace: float) -> None:
        """Wait up to `grace` seconds for the requests being worked on, then end them with what can be said now."""
        with suppress(ConnectionFailed):
            await self._client.flush()  # behind this, nothing more can come
        _close(self._leaving)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=1.0)

    def _take(self, endpoint: Endpoint, message: Message) -> None:
        request = Request(message, self._client, endpoint)
        try:
            if len(self._tasks) >= self._limit:
                sentence = f"{self._limit:,} requests are being worked on here; try again in a moment"
                raise LimitExceeded(sentence, retry_after=BUSY)
            if len(message.data) > endpoint.most:
                size = len(message.data)
                raise InvalidInput(f"the body has {size:,} bytes; {endpoint.name} takes {endpoint.most:,}")
            work = endpoint.handler(request)
        except Exception as error:
            _refuse(request, error)
        else:
            if work is not None:
                task = asyncio.get_running_loop().create_task(self._work(work, request))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _work(self, work: Coroutine[Any, Any, None], request: Request) -> None:
        try:
            await work
        except asyncio.CancelledError:
            _refuse(request, Unavailable("this agent stops; ask again, another one will answer"))
        except Exception as error:
            _refuse(request, error)

    def _ping(self) -> dict[str, Any]:
        return self.identity | {"type": "io.nats.micro.v1.ping_response"}

    def _info(self) -> dict[str, Any]:
        return self.identity | {
            "type": "io.nats.micro.v1.info_response",
            "description": self.description,
            "endpoints": [endpoint.info() for endpoint in self.endpoints],
        }

    def _stats(self) -> dict[str, Any]:
        extra = {"data": self._data()} if self._data else {}
        return (
            self.identity
            | extra
            | {
                "type": "io.nats.micro.v1.stats_response",
                "started": self._started,
                "endpoints": [endpoint.stats() for endpoint in self.endpoints],
            }
        )


def _close(subscriptions: list[Subscription]) -> None:
    for subscription in subscriptions:
        subscription.close()


def _refuse(request: Request, error: Exception) -> None:
    """Answer with what went wrong; what is not meant for clients goes to our own log."""
    if isinstance(error, (ConnectionFailed, LogError)) and not isinstance(error, LogCorrupt):
        logger.warning("a request on %s: %s", request.message.subject, error)
        error = Unavailable("the log does not answer now; try again in a moment")
    elif not isinstance(error, TaskError):
        logger.error("a request on %s failed", request.message.subject, exc_info=error)
        error = TaskError("dspex itself failed on this request; its log has the details", type="InternalError")
    try:
        request.fail(error)
    except ConnectionFailed:
        logger.debug("nobody can be told: the connection is closed")


def _answering(client: Client, answer: Callable[[], dict[str, Any]]) -> Callable[[Message], None]:
    def handle(message: Message) -> None:
        client.respond(message, msgspec.json.encode(answer()))

    return handle
