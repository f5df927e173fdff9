"""A client that shares no code with dspex: nats-py as it comes, JSON, and what the design page says."""

from __future__ import annotations

import asyncio
import base64
import json
import sqlite3
import time
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.errors import Error as JetStreamError

TERMINAL = {"TaskCompleted", "TaskFailed", "TaskDuplicate", "TaskDeadLettered", "TaskCancelled"}
WRONG = (NatsError, JetStreamError, OSError, TimeoutError)


@dataclass
class Stored:
    """One message of the stream."""

    position: int
    subject: str
    body: bytes
    headers: dict[str, str]
    time: float = 0.0

    @property
    def events(self) -> list[dict[str, Any]]:
        """The CloudEvents of a commit; none for a door message."""
        return json.loads(self.body) if ".event." in self.subject else []


@dataclass
class Story:
    """What the log says, counted by somebody who knows only the format."""

    entries: list[Stored] = field(default_factory=list)

    @property
    def head(self) -> int:
        return self.entries[-1].position if self.entries else 0

    def events(self, aggregate: str) -> list[dict[str, Any]]:
        subject = f"dspex.event.{aggregate}"
        return [event for entry in self.entries if entry.subject == subject for event in entry.events]

    def types(self, aggregate: str) -> list[str]:
        return [event["type"] for event in self.events(aggregate)]

    def submitted(self, program: str) -> list[int]:
        return [entry.position for entry in self.entries if entry.subject == f"dspex.task.{program}"]

    def endings(self, program: str) -> dict[int, list[str]]:
        """Task id to the terminal events it has: one, if all is well."""
        found: dict[int, list[str]] = defaultdict(list)
        start = f"dspex.event.task.{program}."
        for entry in self.entries:
            if entry.subject.startswith(start):
                position = int(entry.subject[len(start) :])
                found[position] += [event["type"] for event in entry.events if event["type"] in TERMINAL]
        return {position: types for position, types in found.items() if types}

    def outputs(self, program: str) -> dict[int, Any]:
        start = f"dspex.event.task.{program}."
        return {
            int(entry.subject[len(start) :]): event["data"]["output"]
            for entry in self.entries
            if entry.subject.startswith(start)
            for event in entry.events
            if event["type"] == "TaskCompleted"
        }

    def all_of(self, kind: str) -> list[dict[str, Any]]:
        return [event for entry in self.entries for event in entry.events if event["type"] == kind]

    def check_versions(self) -> None:
        """In every aggregate the versions are 1, 2, 3 …, in the order of the log."""
        versions: dict[str, list[int]] = defaultdict(list)
        for entry in self.entries:
            for event in entry.events:
                assert entry.subject == f"dspex.event.{event['aggregate']}"
                versions[event["aggregate"]].append(event["version"])
        wrong = {name: found for name, found in versions.items() if found != list(range(1, len(found) + 1))}
        assert not wrong

    def check_once(self, program: str, acknowledged: list[int]) -> None:
        """Every task of the log has one terminal event, and every acknowledged one is in the log."""
        endings = self.endings(program)
        submitted = set(self.submitted(program))
        assert not set(acknowledged) - submitted, "acknowledged, and not in the log"
        assert not submitted - set(endings), "in the log, and not ended"
        counted = Counter(len(types) for types in endings.values())
        assert set(counted) == {1}, f"terminal events per task: {counted}"
        self.check_versions()


class Plain:
    """One connection and the doors."""

    def __init__(self, connection: Nats, file: Path | None = None) -> None:
        self.nc, self._file = connection, file

    @classmethod
    async def connect(cls, url: str, file: Path | None = None, **options: Any) -> Plain:
        """`file` is the log when it is a SQLite file; `options` are nats-py's own."""
        async def quiet(error: Exception) -> None:
            pass

        return cls(
            await nats.connect(
                url, max_reconnect_attempts=-1, reconnect_time_wait=0.05, ping_interval=5, error_cb=quiet, connect_timeout=5,
                **options,
            ),
            file,
        )

    async def close(self) -> None:
        await self.nc.close()

    async def __aenter__(self) -> Plain:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    # -- doors

    async def ask(
        self, program: str, body: object, headers: dict[str, str] | None = None, timeout: float = 60.0
    ) -> Reply:
        return Reply(await self.nc.request(f"dspex.ask.{program}", _bytes(body), timeout=timeout, headers=headers))

    async def submit(
        self, program: str, body: object, headers: dict[str, str] | None = None, timeout: float = 60.0
    ) -> int:
        """The task id that the acknowledgement gives."""
        return await self.store("task", program, body, headers, timeout)

    async def store(
        self, door: str, program: str, body: object, headers: dict[str, str] | None = None, timeout: float = 60.0
    ) -> int:
        ack = await self.nc.jetstream().publish(
            f"dspex.{door}.{program}", _bytes(body), timeout=timeout, headers=dict(headers) if headers else None
        )
        assert ack.stream == "DSPEX"
        return ack.seq

    async def result(self, program: str, task: object, wait: str = "25", timeout: float = 60.0) -> Reply:
        headers = {"Dspex-Wait": wait}
        return Reply(
            await self.nc.request(f"dspex.result.{program}", str(task).encode(), timeout=timeout, headers=headers)
        )

    async def final(self, program: str, task: object, patience: float = 60.0) -> Reply:
        """The result, asked for again when the agent that was to answer has died or is not done."""
        deadline = time.monotonic() + patience
        while True:
            try:
                reply = await self.result(program, task, wait="2", timeout=4)
                if reply.code not in (202, 503):
                    return reply
            except WRONG:
                await asyncio.sleep(0.05)
            assert time.monotonic() < deadline, f"no result of task {task}"

    async def read(self, verb: str = "read", **query: object) -> dict[str, Any]:
        """One page of the portable reader."""
        until = time.monotonic() + 30
        while True:
            try:
                reply = Reply(await self.nc.request(f"dspex.log.{verb}", _bytes(query), timeout=30))
                break
            except nats.errors.NoRespondersError:  # the registrar reads the log for all, and was killed a moment ago
                if time.monotonic() > until:
                    raise
                await asyncio.sleep(0.05)
        assert reply.code is None, reply.error
        return reply.json

    async def control(
        self, agent: str, verb: str, patience: float = 300.0, **body: object
    ) -> dict[str, Any]:
        """What a supervisor or an agent is told, asked again until it is done; the answer, or the error in it."""
        deadline = time.monotonic() + patience
        while True:
            headers = {"Dspex-Wait": "5", "Dspex-Actor": "tester"}
            try:
                found = await self.nc.request(f"dspex.control.{agent}.{verb}", _bytes(body), timeout=15, headers=headers)
                reply = Reply(found)
                if reply.code not in (202, 503):
                    return reply.json
            except WRONG:
                await asyncio.sleep(0.05)
            assert time.monotonic() < deadline, f"{verb} was not done"

    async def fleet(self, program: str) -> dict[str, Any]:
        """How a program's agents stand, as the voice of the first supervisor that answers says."""
        deadline = time.monotonic() + 60
        while True:
            for answer in await self.discover("STATS.dspex-registrar"):
                if program in answer["data"].get("fleet", {}):
                    return answer["data"]["fleet"][program] | {"supervisor": answer["data"]["supervisor"]}
            assert time.monotonic() < deadline, f"nobody has a fleet with {program}"

    async def until_fleet(self, program: str, patience: float = 90.0, **wanted: object) -> dict[str, Any]:
        """Wait until a program's agents stand like this."""
        deadline = time.monotonic() + patience
        while not wanted.items() <= (found := await self.fleet(program)).items():
            assert time.monotonic() < deadline, f"{found} is not {wanted}"
        return found

    async def discover(self, verb: str, settle: float = 0.5, enough: int = 1000) -> list[dict[str, Any]]:
        """Every answer to a discovery request, until there are `enough` or none has come for `settle` seconds."""
        inbox = self.nc.new_inbox()
        subscription = await self.nc.subscribe(inbox)
        await self.nc.publish(f"$SRV.{verb}", b"", reply=inbox)
        answers = []
        try:
            while len(answers) < enough:
                message = await subscription.next_msg(timeout=settle)
                if message.headers and message.headers.get("Status") == "503":
                    break
                answers.append(json.loads(message.data))
            return answers
        except NatsError:
            return answers
        finally:
            await subscription.unsubscribe()

    # -- the log, read from the stream itself

    async def story(self, story: Story | None = None) -> Story:
        """The whole stream up to its end now, by a consumer of our own; `story` is read on from where it stopped."""
        story = story or Story()
        if self._file is not None:
            return _of_file(self._file, story)
        js = self.nc.jetstream()
        last = (await js.stream_info("DSPEX")).state.last_seq
        if last <= story.head:
            return story
        config = {"ack_policy": "none", "deliver_policy": "by_start_sequence", "opt_start_seq": story.head + 1}
        made = await self._api("CONSUMER.CREATE.DSPEX", {"stream_name": "DSPEX", "config": config | {"inactive_threshold": 60 * 10**9}})
        consumer = made["name"]
        inbox = self.nc.new_inbox()
        subscription = await self.nc.subscribe(inbox, pending_msgs_limit=-1, pending_bytes_limit=-1)
        try:
            while story.head < last:
                batch = {"batch": 500, "expires": 5 * 10**9}
                await self.nc.publish(f"$JS.API.CONSUMER.MSG.NEXT.DSPEX.{consumer}", _bytes(batch), reply=inbox)
                for _ in range(min(500, last - story.head)):
                    message = await subscription.next_msg(timeout=10)
                    if not message.reply:
                        break
                    tokens = message.reply.split(".")
                    position, time_ns = int(tokens[5]), int(tokens[7])
                    assert position == story.head + 1, "the log has a gap"
                    story.entries.append(
                        Stored(position, message.subject, message.data, message.headers or {}, time_ns / 1e9)
                    )
        finally:
            await subscription.unsubscribe()
            await self._api(f"CONSUMER.DELETE.DSPEX.{consumer}", {})
        return story

    async def entry(self, position: int) -> dict[str, Any]:
        """One message, from the stream's leader."""
        message: dict[str, Any] = (await self._api("STREAM.MSG.GET.DSPEX", {"seq": position}))["message"]
        message["body"] = base64.b64decode(message.get("data", ""))
        return message

    async def until_ended(self, program: str, tasks: list[int] | None = None, patience: float = 60.0) -> Story:
        """Read the log until every submitted task of the program has ended."""
        deadline = time.monotonic() + patience
        story = Story()
        while True:
            try:
                story = await self.story(story)
                wanted = set(tasks if tasks is not None else story.submitted(program))
                open_ones = wanted - set(story.endings(program))
                if not open_ones and wanted:
                    return story
            except WRONG as error:
                open_ones = {repr(error)}  # type: ignore[arg-type]
            assert time.monotonic() < deadline, f"{len(open_ones)} tasks have not ended: {sorted(open_ones)[:5]}"
            await asyncio.sleep(0.1)

    async def until(self, condition: Any, patience: float = 30.0) -> Story:
        """Read the log until `condition(story)` holds."""
        deadline = time.monotonic() + patience
        story = Story()
        while True:
            try:
                story = await self.story(story)
                if condition(story):
                    return story
            except WRONG:
                pass
            assert time.monotonic() < deadline, "the log does not say it"
            await asyncio.sleep(0.05)

    async def _api(self, verb: str, body: object) -> dict[str, Any]:
        reply = await self.nc.request(f"$JS.API.{verb}", _bytes(body), timeout=5)
        answer: dict[str, Any] = json.loads(reply.data)
        assert "error" not in answer, answer["error"]
        return answer


class Reply:
    """A reply, with what the design page says about errors."""

    def __init__(self, message: Msg) -> None:
        self.body, self.headers = message.data, message.headers or {}

    @property
    def code(self) -> int | None:
        text = self.headers.get("Nats-Service-Error-Code")
        return int(text) if text else None

    @property
    def task(self) -> str:
        return self.headers.get("Dspex-Task", "")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in the body, which the headers must agree with."""
        error: dict[str, Any] = self.json["error"]
        assert set(error) == {"type", "message", "task"}
        assert self.headers["Nats-Service-Error"][:100] == " ".join(error["message"].split())[:100]
        return error


def _of_file(file: Path, story: Story) -> Story:
    """The rows of a log in SQLite, read on from where the story stopped."""
    with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as connection:
        rows = connection.execute("SELECT position, subject, body, headers, time FROM log WHERE position > ? ORDER BY position", (story.head,))
        for position, subject, body, headers, time_us in rows:
            assert position == story.head + 1, "the log has a gap"
            story.entries.append(Stored(position, subject, body, json.loads(headers) if headers else {}, time_us / 1e6))
    return story


def _bytes(body: object) -> bytes:
    return body if isinstance(body, bytes) else json.dumps(body).encode()
