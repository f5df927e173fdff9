"""The control door of one supervisor and of its agents: `dspex.control.<agent>.<verb>`, answered by its voice.

What is asked for goes to the supervisor over the line, by number, and its answer comes back by that number. Who waits
for something that takes long (a reload) is told 202 after `Dspex-Wait` and asks again with the same `id`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import msgspec

from dspex.agents.link import Link
from dspex.bus.service import Endpoint, Request, Service
from dspex.core import headers as h
from dspex.core.codec import NOT_JSON
from dspex.core.errors import InvalidInput, Unavailable, task_error
from dspex.core.subjects import Subjects, valid_token

__all__ = ["Control"]

MAX_ASKED = 256
"""Requests that wait for the supervisor at once."""
MAX_BODY = 4096
SOON = 5.0
"""Seconds in which a supervisor answers what it does at once."""
LONG = {"reload"}


class Control:
    """Serves the door of `name` as soon as that is known, and those of its agents while they are there."""

    def __init__(self, service: Service, subjects: Subjects, link: Link) -> None:
        self._service, self._subjects, self._link = service, subjects, link
        self._open: dict[str, Endpoint] = {}
        self._asked: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._number = 0

    def serve(self, names: Collection[str]) -> None:
        """Answer for exactly these."""
        for name in set(names) - set(self._open):
            if valid_token(name):
                endpoint = Endpoint(f"control-{name}", self._subjects.control(name, "*"), self._take)
                self._open[name] = endpoint
                self._service.serve(endpoint)
        for name in set(self._open) - set(names):
            self._service.withdraw(self._open.pop(name))

    def hear(self, message: dict[str, Any]) -> None:
        """An answer of the supervisor."""
        asked = self._asked.get(message["answer"])
        if asked and not asked.done():
            asked.set_result(message)

    async def _take(self, request: Request) -> None:
        _, agent, verb = request.message.subject.removeprefix(f"{self._subjects.prefix}.").split(".")
        body = _read(request.data)
        patience = h.wait_of(request.headers) if verb in LONG else SOON
        if len(self._asked) >= MAX_ASKED:
            raise Unavailable(f"{MAX_ASKED} requests wait for the supervisor already; try again in a moment")
        self._number += 1
        number, future = self._number, asyncio.get_running_loop().create_future()
        self._asked[number] = future
        try:
            wanted = {"agent": agent, "verb": verb, "body": body, "by": request.headers.get(h.ACTOR, "")[:200]}
            if not self._link.send({"control": number, **wanted}):
                raise Unavailable("the supervisor does not listen; try again in a moment")
            async with asyncio.timeout(patience):
                answer = await future
        except TimeoutError:
            if verb in LONG:
                raise task_error(202, f"{agent} is at it; ask again with the same id", type="Pending") from None
            raise Unavailable(f"the supervisor did not answer within {patience:.0f} s") from None
        finally:
            del self._asked[number]
        error = answer.get("error")
        if error:
            raise task_error(error["code"], error["message"], type=error["type"])
        request.respond(msgspec.json.encode(answer["body"]))


def _read(data: bytes) -> dict[str, Any]:
    """A request's body. Raises InvalidInput."""
    if len(data) > MAX_BODY:
        raise InvalidInput(f"the request has {len(data):,} bytes; {MAX_BODY:,} are enough")
    try:
        return msgspec.json.decode(data or b"{}", type=dict[str, Any])
    except (*NOT_JSON, msgspec.ValidationError):
        raise InvalidInput('the request is no JSON object; write it like {"program": "qabot", "agents": 8}') from None
