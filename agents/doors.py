"""What an agent answers directly: `ask`, `submit`, `result`, the `variables` and the `dlq` of its program.

An ask is a submission with a return address: it is stored like any task, runs on whichever agent is free, and that
agent answers. So an ask is as durable as any task, and the crash of an agent costs it a second, not its answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import msgspec

from dspex.agents.assignments import Assignments, decode_proposal
from dspex.agents.guards import CLOSED_FOR as DOORS_AGAIN
from dspex.agents.guards import Guards, Told
from dspex.agents.letters import Letters
from dspex.agents.owners import asker_of
from dspex.agents.results import Results, task_id_of
from dspex.agents.worker import Worker
from dspex.bus.client import Client, Message
from dspex.bus.service import Endpoint, Request, Service
from dspex.core import headers as h
from dspex.core.errors import ConnectionFailed, InvalidAssignment, InvalidInput, LogError, Unavailable
from dspex.core.subjects import Subjects

__all__ = ["Doors"]

logger = logging.getLogger("dspex.agents")

MAX_INPUT = 64 << 20
"""Bytes of an Input; the server's own limit for a message is nearly always less."""
MAX_VALUES = 1 << 20
"""Bytes of a proposal."""
MAX_HEADERS = 32 << 10
"""Bytes of headers that an ask may carry; JetStream stores up to twice as much."""

AGAIN, PATIENCE = 0.05, 5.0
"""Seconds until a submission is sent again that nobody took, and for how long: a log process starts anew in less."""
CLOSED = 1.0
"""Seconds for which a door that was found closed is not tried again."""

_OURS = re.compile(r"(?i)dspex-|traceparent|tracestate")
_NEVER = {h.REPLY.lower(), h.TASK.lower(), h.SEALED.lower()}
_Then = Callable[[Request, "asyncio.Future[Message]"], None]


class Doors:
    """The endpoints of one agent."""

    def __init__(
        self, worker: Worker, client: Client, subjects: Subjects, service: Service, results: Results,
        assignments: Assignments,
    ) -> None:  # fmt: skip
        self._worker, self._client, self._subjects, self._results = worker, client, subjects, results
        self._assignments = assignments
        self._told = Guards(client, subjects)
        self._closed, self._closed_until = "", 0.0
        self._asking: asyncio.Future[Told | None] | None = None
        program = worker.program
        self._task_subject = subjects.door("task", program.name)
        description = program.describe()
        schemas = {
            "input_schema": msgspec.json.encode(description.input_schema).decode(),
            "output_schema": msgspec.json.encode(description.output_schema).decode(),
        }
        name = program.name
        service.serve(Endpoint("ask", subjects.door("ask", name), self.ask, metadata=schemas, most=MAX_INPUT))
        service.serve(Endpoint("submit", subjects.door("submit", name), self.submit, metadata=schemas, most=MAX_INPUT))
        service.serve(Endpoint("result", subjects.door("result", name), self.result))
        service.serve(Endpoint("variables-get", subjects.variables(name, "get"), self.variables))
        letters = Letters(
            program, client, results.log, subjects, results, worker.vault_on(client), assignments, worker.source
        )
        service.serve(Endpoint("dlq-retry", subjects.dlq(name, "retry"), letters.retry))
        service.serve(Endpoint("dlq-drop", subjects.dlq(name, "drop"), letters.drop))
        service.serve(Endpoint("variables-propose", subjects.variables(name, "propose"), self.propose, most=MAX_VALUES))

    def ask(self, request: Request) -> Coroutine[Any, Any, None] | None:
        """Refuse what is not an Input; store the rest, with the return address."""
        headers = self._checked(request)
        reply = request.message.raw_reply
        if not reply.startswith((b"_INBOX.", b"_R_.")):
            raise InvalidInput("an ask needs a reply subject that is an inbox; send it as a request")
        try:
            headers[h.REPLY] = reply.decode("ascii")
        except UnicodeDecodeError:
            raise InvalidInput("the reply subject is not text; use an inbox of your client") from None
        if self._worker.guard.private:
            return self._store_sealed(request, headers, self._stored)
        self._store(request, request.data, headers, self._stored)
        return None

    def submit(self, request: Request) -> Coroutine[Any, Any, None] | None:
        """Like an ask that does not wait: answered with what the log said, and the task's id in it."""
        headers = self._checked(request)
        if self._worker.guard.private:
            return self._store_sealed(request, headers, self._submitted)
        self._store(request, request.data, headers, self._submitted)
        return None

    async def _store_sealed(self, request: Request, headers: dict[str, str], then: _Then) -> None:
        """A private input is sealed before anything is stored of it."""
        worker = self._worker
        try:
            body, sealed = await worker.vault_on(self._client).sealed_message(
                worker.name, request.data, worker.guard
            )
        except (LogError, ConnectionFailed) as error:
            raise Unavailable(f"the key for a private input could not be stored: {error}") from None
        if len(body) > self._client.max_payload - MAX_HEADERS:
            size = self._client.max_payload
            raise InvalidInput(f"the input has {len(body):,} bytes when it is sealed; the server takes {size:,}")
        self._store(request, body, headers | sealed, then)

    def _checked(self, request: Request) -> dict[str, str]:
        """The headers to be stored. Raises InvalidInput for what is no task, LimitExceeded and Unavailable for what
        cannot be taken now."""
        if self._client is self._worker.client:  # and not in the loop's place
            self._worker.pulse = time.monotonic()  # a loop with much to read does not stand still
        self._check_open()
        self._worker.backlog.check(len(request.data))
        headers = _forwarded(request)
        size = sum(len(name) + len(value.encode()) for name, value in headers.items())
        if size > MAX_HEADERS:
            raise InvalidInput(f"the headers have {size:,} bytes; {MAX_HEADERS:,} are allowed")
        h.key_of(headers)
        h.deadline_of(headers, 0.0)
        self._worker.program.decode(request.data)
        if self._worker.limits.known:
            self._worker.limits.refuse(headers, self._worker.pending)
        return headers

    def _store(self, request: Request, body: bytes, headers: dict[str, str], then: _Then) -> None:
        asker = asker_of(self._client, request.headers)
        subject = f"{self._task_subject}.{asker}" if asker else self._task_subject
        backlog, size = self._worker.backlog, len(body)
        backlog.begin(size)

        def ended(request: Request, stored: asyncio.Future[Message]) -> None:
            backlog.end(size, stored=stored.exception() is None and stored.result().status == 0)
            then(request, stored)

        try:
            self._send(request, subject, body, headers, ended, asyncio.get_running_loop().time() + PATIENCE)
        except BaseException:
            backlog.end(size, stored=False)
            raise

    def _submitted(self, request: Request, stored: asyncio.Future[Message]) -> None:
        """Give the log's word on; or say that there is none."""
        if stored.exception() is None and b'"seq"' in stored.result().data:
            request.respond(stored.result().data)
        else:
            self._stored(request, stored)

    def _send(
        self, request: Request, subject: str, body: bytes, headers: dict[str, str], then: _Then, until: float
    ) -> None:
        """Send a submission; again when nobody was there to take it, for then it is surely not stored."""
        loop = asyncio.get_running_loop()

        def answered(stored: asyncio.Future[Message]) -> None:
            nobody = stored.exception() is None and stored.result().status == 503
            if nobody and loop.time() < until and not self._is_closed():
                self._ask_why()
                loop.call_later(AGAIN, again, stored)
            else:
                then(request, stored)

        def again(stored: asyncio.Future[Message]) -> None:
            if self._is_closed():
                then(request, stored)
                return
            try:
                self._send(request, subject, body, headers, then, until)
            except ConnectionFailed:
                then(request, stored)

        asyncio.ensure_future(self._client.call(subject, body, headers=headers)).add_done_callback(answered)

    # -- closed doors

    def _is_closed(self) -> bool:
        return asyncio.get_running_loop().time() < self._closed_until

    def _check_open(self) -> None:
        if self._is_closed():
            raise Unavailable(self._closed, retry_after=DOORS_AGAIN)

    def _ask_why(self) -> None:
        """Nobody takes what we store: ask the registrar whether the doors are closed, once at a time."""
        if self._asking is not None:
            return
        asking = self._asking = asyncio.ensure_future(self._told.told(self._worker.name))

        def answered(done: asyncio.Future[Told | None]) -> None:
            self._asking = None
            said = None if done.cancelled() or done.exception() else done.result()
            if said and said.closed:
                self._closed, self._closed_until = said.closed, asyncio.get_running_loop().time() + CLOSED

        asking.add_done_callback(answered)

    def _stored(self, request: Request, stored: asyncio.Future[Message]) -> None:
        """The log took the submission, or it did not: then say so, for nobody else will answer."""
        error = stored.exception()
        if error is None and stored.result().status and self._is_closed():
            with suppress(ConnectionFailed):
                request.fail(Unavailable(self._closed, retry_after=DOORS_AGAIN))
            return
        if error is None:
            answer = stored.result()
            refused = msgspec.json.decode(answer.data).get("error") if answer.data else {"description": "no stream"}
            if not refused:
                request.done()
                return
            logger.warning("the log refused a submission: %s", refused.get("description"))
        text = "the log did not take the task; try again, with the same Dspex-Key to be safe"
        try:
            request.fail(Unavailable(text))
        except ConnectionFailed:
            logger.debug("nobody can be told: the connection is closed")

    async def result(self, request: Request) -> None:
        wait = h.wait_of(request.headers)
        kind, name = task_id_of(request.data)
        task = await self._results.find(kind, name, asker_of(self._client, request.headers))
        try:
            body, headers = await self._results.wait(task, wait)
        except asyncio.CancelledError:  # this agent stops: say how things stand instead of nothing
            body, headers = await self._results.wait(task, 0.0)
        request.respond(body, headers)

    def variables(self, request: Request) -> None:
        program = self._worker.program
        request.respond(msgspec.json.encode(describe_variables(program)))


    async def propose(self, request: Request) -> None:
        """Check values against the program's own space, which has its rules too, and have them in the log."""
        values, base, why = decode_proposal(request.data)
        who = request.headers.get(h.ACTOR, "")
        try:
            found = await self._assignments.propose(values, base=base, who=who, why=why)
        except InvalidAssignment as error:
            raise InvalidInput(str(error)) from None
        except LogError as error:
            raise Unavailable(str(error)) from None
        answer = {
            "program": self._worker.name, "assignment": found.assignment.hash, "values": found.assignment.to_json(),
            "version": found.version, "fresh": found.fresh,
        }  # fmt: skip
        request.respond(msgspec.json.encode(answer))


def describe_variables(program: Any) -> dict[str, Any]:
    """What `variables.<program>.get` answers: the values in force, their hash and version, and the whole space."""
    space = program.space()
    return {
        "program": program.name,
        "version": 0,
        "assignment": program.assignment.hash,
        "values": space.resolve(program.assignment),
        "space": space.to_json(),
    }


def _forwarded(request: Request) -> dict[str, str]:
    if not request.message.has_headers:
        return {}
    return {
        name: value
        for name, value in request.headers.items()
        if _OURS.match(name) and name.lower() not in _NEVER
    }
