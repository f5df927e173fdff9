"""The log process's ear: what is published to the doors and to the events goes into the log, and is answered as
JetStream would answer it.

Whoever publishes gets `{"stream": "DSPEX", "seq": 42}` when the row is on disk, error 10071 when the aggregate does not
stand where the writer thought, and nothing or an error when nothing was written. Only then the queue hears of it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import cast

import msgspec

from dspex.agents.queue import Queue
from dspex.agents.vault import Vault, sealed_signal
from dspex.agents.veiled import task_in
from dspex.bus.client import Client, Message
from dspex.core import headers as h
from dspex.core.errors import ConnectionFailed, DspexError, Forgotten, LogCorrupt, LogError
from dspex.core.ports import Backend, Entry, Stored, Subscription, Taken
from dspex.core.sealing import Guard
from dspex.core.standing import Brief, Standing, briefs
from dspex.core.subjects import STORED_DOORS, Subjects, parse_aggregate
from dspex.store.served import ENVELOPE

__all__ = ["Host"]

logger = logging.getLogger("dspex.agents")

MAX_SEALING = 1024
"""Private values that are being sealed at once."""
MAX_IDS = 100_000
ID_WINDOW = 120.0
"""Seconds for which `Nats-Msg-Id` is remembered, as JetStream does; how many, and not beyond the process's life."""
BAD, WRONG_LAST, TOO_LARGE, FAILED, WRONG_STREAM = 10003, 10071, 10054, 10077, 10060
MESSAGE_ID, EXPECTED_STREAM, EXPECTED_LAST = "Nats-Msg-Id", "Nats-Expected-Stream", "Nats-Expected-Last-Sequence"
_NEVER = frozenset({"nats-rollup", "nats-ttl", "nats-schedule", "nats-batch-id", "nats-incr"})
"""What would change or forget other rows: the log has none of it."""


class Host:
    """Takes rows in for one log. `queue` and `standing` hear of what was stored, in the order of positions."""

    def __init__(
        self, client: Client, log: Backend, subjects: Subjects, standing: Standing, queue: Queue, vault: Vault
    ) -> None:
        self._vault = vault
        self._sealing: set[asyncio.Task[None]] = set()
        self._client, self._log, self._subjects, self._standing, self._queue = client, log, subjects, standing, queue
        self._limit = client.max_payload - ENVELOPE
        self._open: dict[tuple[str, str], Subscription] = {}
        self._guards: dict[str, Guard] = {}
        self._ids: dict[str, tuple[float, asyncio.Future[Stored | Taken]]] = {}
        self._loop = asyncio.get_running_loop()
        self._events_begin = len(subjects.event(""))
        self._newest = 0

    def listen(self, newest: int) -> None:
        """Take in events from now on; the log stands at `newest`."""
        self._newest = newest
        self._client.subscribe(self._subjects.events, self._event)

    def open_doors(self, guards: Mapping[str, Guard], shut: Collection[tuple[str, str]] = ()) -> None:
        """Take in what comes to the doors of exactly these programs, but those that are `shut` (door, program): nobody
        answers for what is not there. What is private of them is sealed before it is written."""
        wanted = {(door, program) for program in guards for door in STORED_DOORS} - set(shut)
        self._guards.update(guards)  # what came before a door was closed is still to be stored
        for door, program in wanted - set(self._open):
            subject = self._subjects.door(door, program)
            self._open[door, program] = self._client.subscribe(subject, self._door_of(door, program))
        for place in set(self._open) - wanted:
            self._open.pop(place).close()

    # -- what comes in

    def _event(self, message: Message) -> None:
        name = message.subject[self._events_begin :]
        try:
            parse_aggregate(name)
            events = briefs(message.data)
        except (LogCorrupt, ValueError) as error:
            self._refuse(message, 400, BAD, str(error))
            return
        expected = message.headers.get(h.EXPECTED, "") if message.has_headers else ""
        if any(event.aggregate != name for event in events):
            self._refuse(message, 400, BAD, f"a commit to {name} holds events of another aggregate")
        elif not expected.isdecimal():
            self._refuse(message, 400, BAD, f"a commit needs {h.EXPECTED}: the position that it stands behind")
        elif len(message.data) > self._limit:
            self._refuse(message, 400, TOO_LARGE, "message size exceeds maximum allowed")
        else:
            self._put(message, message.subject, {}, int(expected), lambda it: self._committed(it, events))

    def _door_of(self, door: str, program: str) -> Callable[[Message], None]:
        subject = self._subjects.door(door, program)

        def take(message: Message) -> None:
            headers = message.headers if message.has_headers else {}
            if door != "outcome" and self._guards[program].guarded and h.SEALED not in headers:
                if len(self._sealing) >= MAX_SEALING:
                    self._refuse(message, 503, FAILED, "too many private values are being sealed; try again")
                    return
                task = self._loop.create_task(self._sealed(message, door, program, take))
                self._sealing.add(task)
                task.add_done_callback(self._sealing.discard)
                return
            if headers and (problem := self._problem(headers)):
                self._refuse(message, *problem)
                return
            size = len(message.data) + sum(len(name) + len(value.encode()) + 4 for name, value in headers.items())
            if size > self._limit:
                self._refuse(message, 400, TOO_LARGE, "message size exceeds maximum allowed")
                return
            kept = {name: value for name, value in headers.items() if name != h.EXPECTED} if headers else headers
            known = self._known(headers.get(MESSAGE_ID), message)
            if known:
                return
            future = self._put(
                message, subject, kept, None, lambda it: self._submitted(it, door, program, subject, message.data, kept)
            )
            if future is not None and MESSAGE_ID in headers:
                self._ids[headers[MESSAGE_ID]] = self._loop.time() + ID_WINDOW, future

        return take

    async def _sealed(
        self, message: Message, door: str, program: str, take: Callable[[Message], None]
    ) -> None:
        """Seal what came in the open for a private program: a row, once written, can never be taken out again."""
        guard = self._guards[program]
        try:
            if door == "task":
                body, sealed = await self._vault.sealed_message(program, message.data, guard)
            else:
                task = task_in(message.data)
                key = await self._vault.key_of({}, self._log.epoch, task or "0")
                body, sealed = sealed_signal(key, program, message.data), {h.SEALED: key.name}
        except Forgotten as error:
            self._refuse(message, 400, BAD, str(error))
            return
        except (DspexError, TimeoutError) as error:
            self._refuse(message, 503, FAILED, f"it could not be sealed: {error}")
            return
        sent = message.headers if message.has_headers else {}
        asked = {name: value for name, value in sent.items() if name.lower().startswith("nats-")}
        headers = {**asked, **h.ours(sent), **sealed}
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        raw = f"NATS/1.0\r\n{fields}\r\n".encode("utf-8", "backslashreplace")
        take(Message(message.raw_subject, message.raw_reply, body, raw))

    def _put(
        self, message: Message, subject: str, headers: dict[str, str], expected: int | None,
        then: Callable[[Stored], None],
    ) -> asyncio.Future[Stored | Taken] | None:  # fmt: skip
        try:
            future = _waited(self._log.put(subject, message.data, headers, expected))
        except LogError as error:
            self._refuse(message, 503, FAILED, str(error))
            return None
        future.add_done_callback(lambda it: self._done(it, message, then))
        return future

    def _done(
        self, future: asyncio.Future[Stored | Taken], message: Message, then: Callable[[Stored], None]
    ) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is not None:
            if not isinstance(error, LogError):
                logger.error("a row could not be written", exc_info=error)
            self._refuse(message, 503, FAILED, str(error))
            return
        found = future.result()
        if isinstance(found, Taken):
            self._refuse(message, 400, WRONG_LAST, f"wrong last sequence: {found.position}")
            return
        self._newest = max(self._newest, found.position)
        self._answer(message, b'{"stream":"%b","seq":%d}' % (self._subjects.stream.encode(), found.position))
        then(found)

    def _committed(self, stored: Stored, events: list[Brief]) -> None:
        try:
            for position in self._standing.commit(stored.position, events):
                self._queue.left(position)
        except msgspec.MsgspecError as error:  # an event of a shape that is not ours
            logger.warning("position %d is not understood: %s", stored.position, error)

    def _submitted(
        self, stored: Stored, door: str, program: str, subject: str, body: bytes, headers: dict[str, str]
    ) -> None:
        if self._standing.door(stored.position, door, program, body):
            position, time = stored.position, stored.time
            entry = Entry(position=position, time=time, subject=subject, body=body, headers=headers)
            self._queue.add(door, program, entry)

    # -- what JetStream's headers ask

    def _problem(self, headers: dict[str, str]) -> tuple[int, int, str] | None:
        """Why headers of JetStream's own forbid to store the message; None when they don't."""
        stream, last = headers.get(EXPECTED_STREAM), headers.get(EXPECTED_LAST)
        if stream is not None and stream != self._subjects.stream:
            return 400, WRONG_STREAM, "expected stream does not match"
        if last is not None and last != str(self._newest):
            return 400, WRONG_LAST, f"wrong last sequence: {self._newest}"
        if h.EXPECTED in headers:
            return 400, BAD, f"{h.EXPECTED} is for events; a door takes every message"
        if any(name.lower() in _NEVER for name in headers):
            return 400, BAD, "the log takes no rollups, schedules, batches, counters or times to live"
        return None

    def _known(self, identity: str | None, message: Message) -> bool:
        """Whether a message of this `Nats-Msg-Id` came before; then it is answered as a duplicate."""
        if identity is None:
            return False
        now = self._loop.time()
        while self._ids:
            first = next(iter(self._ids))
            if self._ids[first][0] > now and len(self._ids) < MAX_IDS:
                break
            del self._ids[first]
        known = self._ids.get(identity)
        if known is None:
            return False
        future = known[1]
        if future.done() and (future.cancelled() or future.exception() is not None):
            del self._ids[identity]  # it was not stored
            return False
        future.add_done_callback(lambda it: self._say_duplicate(it, message))
        return True

    def _say_duplicate(self, future: asyncio.Future[Stored | Taken], message: Message) -> None:
        if not future.cancelled() and future.exception() is None:
            position = future.result().position
            stream = self._subjects.stream.encode()
            self._answer(message, b'{"stream":"%b","seq":%d,"duplicate":true}' % (stream, position))

    # -- answers

    def _refuse(self, message: Message, code: int, kind: int, why: str) -> None:
        error = {"code": code, "err_code": kind, "description": why}
        self._answer(message, msgspec.json.encode({"error": error, "stream": self._subjects.stream, "seq": 0}))

    def _answer(self, message: Message, body: bytes) -> None:
        try:
            self._client.respond(message, body)
        except ConnectionFailed:  # it is in the log, or it is not: whoever asked has to look
            logger.debug("an answer could not be given")


def _waited(work: Awaitable[Stored | Taken]) -> asyncio.Future[Stored | Taken]:
    """A future as it is, anything else that can be awaited as a task's."""
    return cast("asyncio.Future[Stored | Taken]", asyncio.ensure_future(work))
