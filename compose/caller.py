"""The doors as a Python caller uses them: ask, submit, result, score, and what runs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, Self

import msgspec

from dspex.agents.calls import fetched
from dspex.agents.guards import CLOSED_FOR, Guards
from dspex.agents.results import ELSEWHERE
from dspex.bus.client import Client, Message
from dspex.bus.objects import NatsObjects
from dspex.core import headers as h
from dspex.core.access import Role, account_of
from dspex.core.codec import decode_page
from dspex.core.errors import ConfigurationError, ConnectionFailed, NotFound, TaskError, Unavailable, task_error
from dspex.core.events import Event
from dspex.core.subjects import Subjects, valid_token

__all__ = ["Caller"]

ONE_WAIT = 5.0
"""Seconds of waiting asked of one agent; it may die meanwhile, and nobody would say so."""
SUBMIT_WAIT = 10.0
"""Seconds for an agent to seal a private input and store it."""
LETTER_TRIES = 3
"""Times that an agent is asked to retry or drop a dead letter when no answer comes."""
FORGET_WAIT = 60.0
"""Seconds for the archivist to forget a task."""
AWAY = 0.2
"""Seconds between questions while nobody is there to answer."""

JITTER = 0.25
"""Up to so much longer than it was told to, a caller waits."""

GATHER = 0.25
"""Seconds without another answer after which discovery is taken as complete."""


class Nobody(Unavailable):
    """A door has no responders, so nothing was done."""


class Caller:
    """A client of one installation. Bodies are JSON bytes; every refusal is a TaskError with its code."""

    def __init__(self, client: Client, prefix: str = "dspex") -> None:
        self.client, self.subjects = client, Subjects(prefix)
        self._guards = Guards(client, self.subjects)
        self._keeper: Client | None = None

    @classmethod
    async def connect(
        cls, url: str, *, prefix: str = "dspex", wait: float | None = 2.0, credentials: str | None = None
    ) -> Self:
        """Connect to an installation. Raises ConnectionFailed."""
        return cls(await Client.connect(url, name="dspex caller", wait=wait, credentials=credentials), prefix)

    async def close(self) -> None:
        if self._keeper:
            await self._keeper.close()
        await self.client.close()

    async def keeper(self) -> tuple[Client, Subjects]:
        """A connection that keys and large values are read with, and its names: our own, or, on a system with access
        rules, that of its archivist, whose identity stands beside the console's. Raises ConfigurationError."""
        own = self.client.identity
        if not own.secured:
            return self.client, self.subjects
        context = Path(self.client.credentials or "").with_name(f"{Role.ARCHIVIST}.json")
        if self._keeper is None:
            if account_of(Role.CONSOLE) != own.account or not context.is_file():
                raise ConfigurationError(
                    f"private and large values are read by those who have the data folder's own identities: {context} "
                    "is not there"
                )
            self._keeper = await Client.connect(self.client.url, name="dspex keeper", credentials=str(context))
        return self._keeper, Subjects(self.subjects.prefix, tenants=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def ask(
        self, program: str, body: bytes, *, timeout: float = 60.0, key: str | None = None,
        headers: Mapping[str, str] | None = None, retries: int | None = 0,
    ) -> tuple[bytes, str]:  # fmt: skip
        """Run and wait: the output's bytes and the task's id.

        `retries` is how often to ask again, within `timeout`, when it was refused for now (429, 503 with a time to try
        again) and so nothing was stored; None is as often as time allows.

        An answer that does not come says nothing about the task. With a `key` the same ask may be sent again, and
        `result` finds the task by it; the key costs one more commit.
        """
        fields = dict(headers or {}) if key is None else {**(headers or {}), h.KEY: key}
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        while True:
            try:
                left = max(0.001, until - loop.time())
                reply = await self._request(self._door("ask", program), body, left, fields or None)
                return await self._output(reply), reply.headers.get(h.TASK, "")
            except TaskError as error:
                # With a task's id it is how that task ended, and not for us to repeat.
                if error.retry_after is None or error.task is not None or retries == 0:
                    raise
                wait = max(error.retry_after, AWAY) * (1 + JITTER * random.random())  # so that not all come at once
                if loop.time() + wait >= until:
                    raise
                retries = None if retries is None else retries - 1
            await asyncio.sleep(wait)

    async def head(self) -> int:
        """The position of the newest entry of the log."""
        reply = await self._request(self.subjects.log("head"), b"", 5.0, None)
        return int(msgspec.json.decode(reply.data)["head"])

    async def asked(self, program: str, after: int, correlation: str) -> str | None:
        """The task that was stored behind position `after` with that `Dspex-Correlation`; None when there is none."""
        async for event in self.events(after=after, program=program):
            if event["type"] == "TaskSubmitted" and event["correlationid"] == correlation:
                return str(event["aggregate"]).rpartition(".")[2]
        return None

    async def submit(
        self, program: str, body: bytes, *, key: str | None = None, headers: Mapping[str, str] | None = None,
        checked: bool = False,
    ) -> str:  # fmt: skip
        """Store a task and return its id; from then on it cannot be lost. `checked`: an agent, when one serves, first
        refuses what is no Input."""
        fields = dict(headers or {})
        if key is not None:
            fields[h.KEY] = key
        private = (await self._guards.of(program)).private  # then an agent seals it before it is stored
        if private or checked:
            try:
                reply = await self._request(self._door("submit", program), body, SUBMIT_WAIT, fields or None)
                return str(msgspec.json.decode(reply.data)["seq"])
            except Nobody:
                if private:
                    raise
        return str(await self._store("task", program, body, fields))

    async def result(self, program: str, task: str, *, timeout: float = 60.0) -> bytes:
        """The output of a task by id or key, waited for, also while the server or the agents are away.

        Raises TaskError with code 202 when it is not done in time.
        """
        output, _ = await self.find(program, task, timeout=timeout)
        return output

    async def find(self, program: str, task: str, *, timeout: float = 60.0) -> tuple[bytes, str]:
        """Like `result`, with the task's id, which a key does not tell."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        while True:
            wait = max(0.0, min(until - loop.time(), ONE_WAIT))
            try:
                reply = await self._request(
                    self._door("result", program), task.encode(), wait + 1, {h.WAIT: f"{wait:.3f}"}
                )
                return await self._output(reply), reply.headers.get(h.TASK, task)
            except (TaskError, ConnectionFailed) as error:
                # With a task, 503 is how that task ended; without, nobody could say.
                away = isinstance(error, Unavailable) and error.task is None
                again = isinstance(error, ConnectionFailed) or away or error.type == "NoAnswer"
                if loop.time() >= until or not (again or error.code == 202):  # type: ignore[union-attr]
                    raise
                if again:
                    await asyncio.sleep(AWAY)

    async def score(self, program: str, task: str, score: float, feedback: str = "") -> int:
        """Score a task; returns the position of the outcome in the log."""
        body: dict[str, Any] = {"task": int(task) if task.isdecimal() else task, "score": score}
        if feedback:
            body["feedback"] = feedback
        return await self._store("outcome", program, msgspec.json.encode(body), {})

    async def signal(self, program: str, task: str, name: str, value: Any) -> int:
        """Tell a task something; returns the signal's position in the log."""
        body = {"task": int(task) if task.isdecimal() else task, "name": name, "value": value}
        return await self._store("signal", program, msgspec.json.encode(body), {})

    async def retry(
        self, task: str, *, program: str = "", clean: bool = False, values: Mapping[str, Any] | None = None,
        actor: str = "",
    ) -> dict[str, Any]:  # fmt: skip
        """Submit a task that ended without an output again: `{"program", "task", "retried", "fresh"}`, `retried` being
        the new task. Without its `program` the log is asked for that.

        Raises Conflict for a task that is under way or has its output, NotFound, InvalidInput, Unavailable.
        """
        body = {"task": task, "clean": clean, "set": dict(values or {}), "actor": actor}
        return await self._letter("retry", program or await self.program_of(task), body)

    async def drop(self, task: str, why: str, *, program: str = "", actor: str = "") -> dict[str, Any]:
        """Have nothing more done about a task that ended without an output: `{"program", "task", "dropped", "fresh"}`.
        Raises as `retry` does."""
        body = {"task": task, "why": why, "actor": actor}
        return await self._letter("drop", program or await self.program_of(task), body)

    async def _letter(self, verb: str, program: str, body: dict[str, Any]) -> dict[str, Any]:
        if not valid_token(program):
            raise NotFound(f"{program[:80]!r} is no program's name")
        subject = self.subjects.dlq(program, verb)
        for left in range(LETTER_TRIES - 1, -1, -1):
            try:
                reply = await self._request(subject, msgspec.json.encode(body), SUBMIT_WAIT, None)
                break
            except TaskError as error:  # the agent may have died of another dead letter; asking twice is asking once
                if not left or error.type != "NoAnswer":
                    raise
        return msgspec.json.decode(reply.data, type=dict[str, Any])

    async def forget(self, task: str, reason: str = "", *, actor: str = "", force: bool = False) -> dict[str, Any]:
        """Have what a task holds forgotten, for good: `{"task", "program", "keys", "objects", "later"}`.

        Raises Conflict for a task that has not ended (unless `force`) or that holds nothing sealed, NotFound,
        Unavailable when no archivist has the archive open.
        """
        wanted = {"task": task, "reason": reason, "actor": actor, "force": force}
        subject = self.subjects.privacy("forget")
        reply = await self._request(subject, msgspec.json.encode(wanted), FORGET_WAIT, None)
        return msgspec.json.decode(reply.data, type=dict[str, Any])

    async def variables(self, program: str) -> dict[str, Any]:
        """The values in force and the space they are from."""
        reply = await self._request(self.subjects.variables(program, "get"), b"", 5.0, None)
        return msgspec.json.decode(reply.data, type=dict[str, Any])

    async def limits(self, verb: str = "ls", *, who: str = "", **wanted: Any) -> dict[str, Any]:
        """Ask the limiter: `ls` gives `{"limits": […]}`; `set` (`scope`, `limits`, `why`) and `clear` (`scope`) give
        how the scope stands then. Raises InvalidInput, NotFound, Unavailable."""
        body = msgspec.json.encode(wanted) if wanted else b""
        reply = await self._request(self.subjects.limits(verb), body, 10.0, {h.ACTOR: who} if who else None)
        return msgspec.json.decode(reply.data, type=dict[str, Any])

    async def propose(
        self, program: str, values: Mapping[str, Any], *, base: str | None = None, who: str = "", why: str = ""
    ) -> dict[str, Any]:
        """Make values known, on top of those with the hash `base` or of those in force, so that tasks may run on them:
        `{"program", "assignment", "values", "version", "fresh"}`. Raises InvalidInput, NotFound, Unavailable."""
        body = {"values": values, "why": why} | ({"base": base} if base else {})
        fields = {h.ACTOR: who} if who else None
        door = self.subjects.variables(program, "propose")
        reply = await self._request(door, msgspec.json.encode(body), 10.0, fields)
        return msgspec.json.decode(reply.data, type=dict[str, Any])

    async def log_head(self) -> dict[str, Any]:
        """Which log this is, and where it ends: `{"epoch", "head", "log"}`; `log` names the backend."""
        reply = await self._request(self.subjects.log("head"), b"", 5.0, None)
        return msgspec.json.decode(reply.data, type=dict[str, Any])

    async def read_log(self, *, wait: float | None = None, **query: Any) -> dict[str, Any]:
        """One page of the log: `{"epoch", "events", "next", "head"}`. `wait` seconds for something new (tail)."""
        verb = "read" if wait is None else "tail"
        fields = None if wait is None else {h.WAIT: str(wait)}
        reply = await self._request(
            self.subjects.log(verb), msgspec.json.encode(query), 15.0 + (wait or 0), fields
        )
        return msgspec.json.decode(reply.data, type=dict[str, Any])

    async def events(self, **query: Any) -> AsyncIterator[dict[str, Any]]:
        """Every event that the query names, page by page, up to where the log stands now."""
        after = int(query.pop("after", 0))
        while True:
            page = await self.read_log(after=after, **{"limit": 1000, **query})
            for event in page["events"]:
                yield event
            if page["next"] <= after or page["next"] >= page["head"]:
                return
            after = page["next"]

    async def pages(self, **query: Any) -> AsyncIterator[list[Event]]:
        """The same as `events`, a page at a time and decoded. Raises LogCorrupt as well."""
        after = int(query.pop("after", 0))
        while True:
            body = msgspec.json.encode({"after": after, "limit": 1000, **query})
            reply = await self._request(self.subjects.log("read"), body, 15.0, None)
            page = decode_page(reply.data)
            yield page.events
            if page.next <= after or page.next >= page.head:
                return
            after = page.next

    async def archive(self, verb: str, query: object, *, timeout: float = 15.0) -> bytes:
        """What the archivist answers. Raises Unavailable when none has an archive open now."""
        reply = await self._request(self.subjects.archive(verb), msgspec.json.encode(query), timeout, None)
        return reply.data

    async def program_of(self, task: str) -> str:
        """Which program a task id belongs to. Raises NotFound."""
        page = await self.read_log(task=task, limit=1)
        if not page["events"]:
            raise NotFound(f"the log has no task {task}")
        return str(page["events"][0]["data"]["program"])

    async def gather(self, verb: str = "STATS") -> list[dict[str, Any]]:
        """What every dspex service of this installation answers to PING, INFO or STATS."""
        answers: list[dict[str, Any]] = []
        heard = asyncio.Event()

        def take(message: Message) -> None:
            if message.status or not message.data:
                return
            answer = msgspec.json.decode(message.data)
            if answer.get("metadata", {}).get("dspex") == self.subjects.prefix:
                answers.append(answer)
            heard.set()

        inbox = self.client.inbox()
        subscription = self.client.subscribe(inbox, take)
        try:
            self.client.publish(f"$SRV.{verb}", b"", reply=inbox)
            while True:
                heard.clear()
                try:
                    await asyncio.wait_for(heard.wait(), GATHER)
                except TimeoutError:
                    return answers
        finally:
            subscription.close()

    async def programs(self) -> list[str]:
        """The names of the programs that have doors here, whether or not an agent serves them now."""
        answers = await self.gather()
        return sorted({name for answer in answers for name in (answer.get("data") or {}).get("programs", ())})

    async def fleet(self) -> list[dict[str, Any]]:
        """How many agents of each program each supervisor is to have: one dict a program and supervisor."""
        found = []
        for answer in await self.gather():
            data = answer.get("data") or {}
            for program, it in (data.get("fleet") or {}).items():
                found.append(
                    {"program": program, "supervisor": data["supervisor"], "agents": it["agents"],
                     "serving": it["serving"], "least": it["scale"]["least"], "most": it["scale"]["most"],
                     "by": it["by"], "why": it["why"], "code": it["code"], "rolling": it["rolling"]}
                )  # fmt: skip
        return sorted(found, key=lambda it: (it["program"], it["supervisor"]))

    async def control(
        self, agent: str, verb: str, body: Mapping[str, Any], *, actor: str = "", timeout: float = 10.0
    ) -> dict[str, Any]:
        """Have an agent or a supervisor do something: scale, reload, drain, stop, restart. Raises TaskError.

        What takes long is asked for again, by the `id` in the body, until it is done or `timeout` seconds are over.
        """
        if not valid_token(agent):
            raise NotFound(f"{agent[:80]!r} is no agent's name")
        until = asyncio.get_running_loop().time() + timeout
        fields = {h.ACTOR: actor, h.WAIT: str(ONE_WAIT)}
        while True:
            try:
                reply = await self._request(
                    self.subjects.control(agent, verb), msgspec.json.encode(body), ONE_WAIT + 10.0, fields
                )
                return msgspec.json.decode(reply.data, type=dict[str, Any])
            except TaskError as error:
                if error.code != 202 or asyncio.get_running_loop().time() >= until:
                    raise

    async def processes(self) -> list[dict[str, Any]]:
        """Everything that runs, also what is supervised and down; one dict a process, as `dspex ps --json` shows it."""
        found: dict[str, dict[str, Any]] = {}
        own: dict[str, Mapping[str, Any]] = {}
        for answer in await self.gather():
            data = answer.get("data") or {}
            for process in data.get("processes", ()):
                found.setdefault(process["agent"], _process(process))
            if "agent" in data:
                own[data["agent"]] = data
        for name, data in own.items():  # it knows best how it is, and its supervisor the rest
            above = {key: found.get(name, {}).get(key) for key in ("supervisor", "why")}
            found[name] = _process({**data, **above})
        order = {"root": 0, "server": 1, "supervisor": 2, "registrar": 3, "log": 3, "archivist": 4}
        return sorted(found.values(), key=lambda p: (order.get(p.get("role") or "", 5), p["agent"]))

    async def breakers(self) -> list[dict[str, Any]]:
        """The circuit breakers that agents have asked since they started, as whoever knows most of each has it."""
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for answer in await self.gather():
            data = answer.get("data") or {}
            for breaker in data.get("breakers", ()):
                place = data["program"], breaker["effect"]
                rank = breaker["version"], breaker["calls"]
                if place not in found or (found[place]["version"], found[place]["calls"]) < rank:
                    found[place] = {"program": data["program"], **breaker}
        return [found[place] for place in sorted(found)]

    async def reset_breaker(self, program: str, effect: str, *, who: str = "") -> dict[str, Any]:
        """Close a circuit breaker by hand: `{"program", "effect", "before", "state", "version"}`."""
        door, body = self.subjects.breakers(program, "reset"), msgspec.json.encode({"effect": effect})
        reply = await self._request(door, body, 10.0, {h.ACTOR: who} if who else None)
        return msgspec.json.decode(reply.data, type=dict[str, Any])

    # -- inside

    def _door(self, door: str, program: str) -> str:
        if not valid_token(program):
            raise NotFound(f"{program[:80]!r} is no program's name")
        return self.subjects.door(door, program)

    async def _request(
        self, subject: str, body: bytes, timeout: float, headers: Mapping[str, str] | None
    ) -> Message:
        try:
            reply = await self.client.request(subject, body, headers=headers, timeout=timeout)
        except TimeoutError:
            raise task_error(408, f"no answer on {subject} within {timeout:g} s", type="NoAnswer") from None
        if reply.status == 503:
            raise Nobody(f"nobody serves {subject}; `dspex ps` shows what runs", type=Unavailable.__name__)
        code = reply.headers.get(h.ERROR_CODE)
        if code is not None and code != ELSEWHERE:
            raise _error(int(code), reply)
        return reply

    async def _output(self, reply: Message) -> bytes:
        """The output in a reply, or in the object store when no message can hold it."""
        if reply.headers.get(h.ERROR_CODE) != ELSEWHERE:
            return reply.data
        return await fetched(NatsObjects(self.client, self.subjects), reply)

    async def _store(self, door: str, program: str, body: bytes, headers: Mapping[str, str]) -> int:
        subject = self._door(door, program)
        try:
            reply = await self.client.request(subject, body, headers=headers or None)
        except TimeoutError:
            raise Unavailable(
                f"the log did not confirm on {subject}; it may or may not have it: try again with a key"
            ) from None
        if reply.status == 503:
            told = await self._guards.told(program)
            if told and told.closed:
                raise Unavailable(told.closed, retry_after=CLOSED_FOR)
            if (await self.client.request(self.subjects.log("head"), b"")).status == 503:
                raise Unavailable(f"the log does not answer on {subject} now; try again")
            raise NotFound(f"there is no program {program}; `dspex ps` shows what runs")
        answer = msgspec.json.decode(reply.data)
        if "error" in answer:
            raise Unavailable(f"the log refused it: {answer['error'].get('description', 'no reason given')}")
        return int(answer["seq"])


def _error(code: int, reply: Message) -> TaskError:
    try:
        error = msgspec.json.decode(reply.data).get("error") or {}
    except (msgspec.DecodeError, AttributeError):
        error = {}
    message = error.get("message") or reply.headers.get(h.ERROR, "")
    return task_error(
        code, message, type=error.get("type", ""), task=error.get("task") or reply.headers.get(h.TASK),
        retry_after=h.retry_after_of(reply.headers),
    )  # fmt: skip


def _process(data: Mapping[str, Any]) -> dict[str, Any]:
    shown = {
        name: data.get(name) for name in ("agent", "program", "pid", "state", "restarts")
    } | {"tasks": data.get("tasks", 0), "supervisor": data.get("supervisor"), "why": data.get("why") or ""}
    if not data.get("program"):
        shown["role"] = data.get("role")
    return shown
