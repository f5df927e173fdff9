"""Calls from one program to another: a task of its own, named by the idempotency key of the call.

Whoever performs the call again, after a crash, submits the same key; the other program runs once, and its result is
found by the key.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from dspex.agents.cancelling import CANCEL
from dspex.agents.guards import Guards
from dspex.agents.results import ELSEWHERE
from dspex.bus.client import Client, Message
from dspex.bus.objects import NatsObjects
from dspex.core import headers as h
from dspex.core.codec import rfc3339
from dspex.core.errors import ConnectionFailed, NotFound, TaskError, Unavailable, task_error
from dspex.core.ports import Objects
from dspex.core.subjects import Subjects, valid_token

__all__ = ["Calls", "fetched"]

ONE_WAIT = 5.0
"""Seconds of waiting asked of one agent; it may die meanwhile, and nobody would say so."""
PAUSE = 0.2
"""Seconds between questions while nobody is there to answer."""
LONGEST = 300.0
"""Seconds that a call waits which is refused for now; it fails when it is told to wait longer."""
UNKNOWN = 25
"""Questions after which a program without doors is taken for one that does not exist."""


class Calls:
    """Runs other programs for the programs of this process."""

    def __init__(self, client: Client, subjects: Subjects) -> None:
        self._client, self._subjects = client, subjects
        self.guards = Guards(client, subjects, math.inf)  # the caller's own time is the bound
        self._open: dict[str, set[tuple[str, str]]] = {}

    async def call(
        self, program: str, body: bytes, key: str, parent: str, more: Mapping[str, str] = MappingProxyType({}),
        *, deadline: float | None = None,
    ) -> bytes:  # fmt: skip
        """The output of `program` for `body`, to be done by `deadline` (seconds since the epoch). Ends when the other
        task ends: the caller's own time is the bound. `more` are headers of its submission.

        Raises TaskError as the other task ended, NotFound when there is no such program.
        """
        if not valid_token(program):
            raise NotFound(f"{program[:80]!r} is no program's name")
        headers = {h.KEY: key, h.PARENT: parent, h.CORRELATION: parent, h.CAUSATION: parent, **more}
        if deadline is not None:
            headers[h.DEADLINE] = rfc3339(deadline)
        task = await self._submit(program, body, headers)
        called = self._open.setdefault(parent, set())
        called.add((program, task))
        try:
            return await self._result(program, task)
        finally:
            called.discard((program, task))
            if not called:
                self._open.pop(parent, None)

    def cancel(self, parent: str) -> None:
        """The task that called is over: what it has called and still waits for need not go on. A hint: it is sent
        once, and a call whose caller died before is not known here."""
        for program, task in self._open.pop(parent, ()):
            value = f"task {parent}, which had called it, is over"
            body = msgspec.json.encode({"task": int(task), "name": CANCEL, "value": value})
            try:
                self._client.publish(self._subjects.door("signal", program), body)
            except ConnectionFailed:
                return

    async def _result(self, program: str, task: str) -> bytes:
        while True:
            reply = await self._ask(self._subjects.door("result", program), task.encode(), {h.WAIT: str(ONE_WAIT)})
            code = reply.headers.get(h.ERROR_CODE, "") if reply else ""
            if reply and not code and reply.status != 503:
                return reply.data
            if reply and code == ELSEWHERE:
                return await fetched(NatsObjects(self._client, self._subjects, program=program), reply)
            # With a task's id, 503 is how that task ended; without, nobody could say.
            if reply and code and (code not in ("202", "503") or (code == "503" and h.TASK in reply.headers)):
                raise _error(int(code), reply)
            if code != "202":
                await asyncio.sleep(PAUSE)

    async def _submit(self, program: str, body: bytes, headers: dict[str, str]) -> str:
        """Store the task, until the log says that it has it: one of the same key is the same task."""
        unknown = 0
        # What is private goes through an agent, which seals it before it is stored.
        door = "submit" if (await self.guards.of(program)).private else "task"
        while True:
            reply = await self._ask(self._subjects.door(door, program), body, headers)
            code = reply.headers.get(h.ERROR_CODE, "") if reply else ""
            wait = h.retry_after_of(reply.headers) if reply and code in ("429", "503") else None
            if wait is not None and wait <= LONGEST:  # nothing was stored, and there will be room
                await asyncio.sleep(wait)
                continue
            if reply and code and code != "503":
                raise _error(int(code), reply)
            if reply and reply.status != 503 and not code:
                answer = msgspec.json.decode(reply.data)
                if "error" not in answer:
                    return str(answer["seq"])
                raise Unavailable(f"the log refused it: {answer['error'].get('description', 'no reason given')}")
            unknown += reply is not None
            if unknown >= UNKNOWN:
                said = await self.guards.told(program)
                if said is None or not said.closed:  # closed doors open again; the caller's own time is the bound
                    raise NotFound(f"there is no program {program}")
                unknown = 0
            await asyncio.sleep(PAUSE)

    async def _ask(self, subject: str, body: bytes, headers: dict[str, str]) -> Message | None:
        try:
            return await self._client.request(subject, body, headers=headers, timeout=ONE_WAIT + 1)
        except (TimeoutError, ConnectionFailed):
            return None


async def fetched(objects: Objects, reply: Message) -> bytes:
    """The output that a reply says is in the object store. Raises NotFound when it is not there any more."""
    where = msgspec.json.decode(reply.data)
    name, task = where["object"]["name"], where["task"]
    body = await objects.get(name)
    if body is None:
        raise NotFound(f"the output of task {task}, object {name}, is not in the object store", task=task)
    return body


def _error(code: int, reply: Message) -> TaskError:
    error = msgspec.json.decode(reply.data).get("error") or {}
    return task_error(code, error.get("message", ""), type=error.get("type", ""), task=error.get("task"))
