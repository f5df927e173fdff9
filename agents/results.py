"""What became of a task: read from the log, waited for with a hint."""

from __future__ import annotations

import asyncio

import msgspec
from msgspec.structs import replace

from dspex.agents.keys import key_aggregate
from dspex.agents.owners import may_see
from dspex.agents.vault import Vault, held_of, submission_of
from dspex.bus.client import Client
from dspex.bus.service import error_reply
from dspex.bus.wire import Handler
from dspex.core import headers as h
from dspex.core.aggregates import FOLDS, LetterState
from dspex.core.codec import NOT_JSON, decode_commit
from dspex.core.errors import Forgotten, InvalidInput, NotFound, TaskError, task_error
from dspex.core.events import Event, Held, KeyBound, Payload, TaskFailed, TaskForgotten
from dspex.core.ports import Log
from dspex.core.subjects import Subjects, aggregate
from dspex.core.task import TaskState, fold

ENVELOPE = 4096
"""Bytes kept free beside an output for what else its reply holds."""
ELSEWHERE = "303"
"""The code of a reply whose output does not fit into a message: its body says where it is."""

__all__ = ["Results", "answer_of", "forgotten", "letter_state", "task_id_of"]

SOON, POLL = 0.005, 2.0
"""Seconds after which a waiter reads again: soon after a hint, which comes before the log has what it announces; and
although no hint came, for hints are core messages and may be missed."""


def task_id_of(body: bytes) -> tuple[str, str]:
    """What a result request names: `("task", id)` or `("key", key)`.

    The body is an id (`42`, `"42"`), a key, or `{"task": 42}` / `{"key": "k"}`. Raises InvalidInput.
    """
    try:
        value = msgspec.json.decode(body)
    except NOT_JSON:
        value = body.decode("utf-8", "backslashreplace").strip()
    if isinstance(value, dict) and len(value) == 1:
        ((kind, value),) = value.items()
        if kind == "key" and isinstance(value, str) and value:
            return "key", value
        if kind != "task":
            value = None
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not 1 <= len(value) <= h.MAX_KEY:
        raise InvalidInput('name a task: its id (42), its key, {"task": 42} or {"key": "…"}')
    return ("task" if value.isdecimal() and value.isascii() else "key"), value


def elsewhere(task: str, bucket: str, held: Held) -> tuple[bytes, dict[str, str]]:
    """The reply for an output that no message can hold: where it is."""
    where = {"bucket": bucket, "name": held.blob, "size": held.size}
    said = f"the output of task {task} has {held.size:,} bytes; fetch it: nats object get {bucket} {held.blob}"
    body = msgspec.json.encode({"task": task, "object": where})
    return body, {h.ERROR_CODE: ELSEWHERE, h.ERROR: said, h.TASK: task}


def answer_of(state: TaskState, task: str) -> tuple[bytes, dict[str, str]] | None:
    """The reply that an ended task gives, body and headers; None while it has not ended or is another's duplicate."""
    if state.output is not None:
        return bytes(state.output), {h.TASK: task}
    if state.status in ("failed", "dead", "cancelled"):
        return error_reply(task_error(state.code, state.message, type=state.error, task=task))
    return None


async def letter_state(log: Log, program: str, task: str) -> LetterState:
    """What was done about a task that ended without an output. Raises LogError."""
    entries = await log.read(aggregate("dlq", program, task))
    state: LetterState = FOLDS["dlq"](event for each in entries for event in decode_commit(each.body, each.position))
    return state


class Results:
    """Finds and waits for the results of one program's tasks."""

    def __init__(self, client: Client, log: Log, subjects: Subjects, program: str, vault: Vault) -> None:
        self._client, self.log, self._subjects, self._program = client, log, subjects, program
        self._vault = vault

    async def find(self, kind: str, name: str, asker: str = "") -> str:
        """The task id for an id or a key, as the account `asker` may see it. Raises NotFound."""
        if kind == "task":
            position = int(name) if len(name) < 19 else 0
            entry = await self.log.entry(position) if position > 0 else None
            if entry is not None:
                ours = self._subjects.door_of(entry.subject) == ("task", self._program)
                owner = self._subjects.tenant_of(entry.subject) if ours else None
            else:  # its message may be gone because its input was private
                owner = await self._owner(str(position)) if position > 0 else None
                if owner is None and 0 < position <= await self.log.head():
                    raise forgotten(self._program, name)
            if owner is None or not may_see(asker, owner):
                raise NotFound(f"{self._program} has no task {name[:40]}", task=name if entry is None else None)
            return str(position)
        entry = await self.log.last(key_aggregate(self._program, name, asker))
        if entry is None:
            raise NotFound(f"{self._program} has no task with the key {name[:80]!r}")
        bound = decode_commit(entry.body, entry.position)[0].data
        assert isinstance(bound, KeyBound)
        return bound.task

    async def _owner(self, task: str) -> str | None:
        """The account that submitted a task ("" on a system open to all), as its own events keep it; None when they
        don't."""
        entries = await self.log.read(aggregate("task", self._program, task))
        events = [event for entry in entries for event in decode_commit(entry.body, entry.position)]
        submission = submission_of(task, events, self._subjects)
        if submission is not None:
            return self._subjects.tenant_of(submission.subject)
        kept = [event.data.tenant for event in events if isinstance(event.data, TaskFailed)]
        return next((tenant for tenant in kept if isinstance(tenant, str)), None)

    async def state(self, task: str) -> TaskState:
        """Where a task stands now, from its last commit: enough to tell whether and how it ended."""
        return fold(await self._last(task))

    async def _last(self, task: str) -> list[Event]:
        entry = await self.log.last(aggregate("task", self._program, task))
        return decode_commit(entry.body, entry.position) if entry else []

    def answer(self, state: TaskState, end: Payload, task: str) -> tuple[bytes, dict[str, str]] | None:
        """The reply of an ended task, of whose last event `end` is what the log keeps."""
        held = held_of(end)
        if held and held.blob and not held.key and held.size > self._client.max_payload - ENVELOPE:
            return elsewhere(task, self._subjects.bucket_of(self._program), held)
        return answer_of(state, task)

    async def ended(self, task: str, events: list[Event], state: TaskState) -> tuple[bytes, dict[str, str]] | None:
        """The same from the log, whatever it takes to bring back what the task gave."""
        if not state.ended or not held_of(events[-1].data):
            return answer_of(state, task)
        large = self.answer(TaskState(), events[-1].data, task)
        if large:
            return large
        try:
            return answer_of(fold(await self._vault.bring_back(events[-1:])), task)
        except TaskError as missing:
            error: TaskError = missing
            forgetting = await self.log.last(aggregate("privacy", self._program, task))
            if forgetting:
                error = said_forgotten(task, decode_commit(forgetting.body, forgetting.position)[-1])
            return error_reply(error, task)

    async def _successor(self, task: str, state: TaskState) -> str:
        """The task that was submitted in the place of one that ended without an output: its answer counts."""
        if state.status not in ("failed", "dead", "cancelled"):
            return ""
        return (await letter_state(self.log, self._program, task)).successor

    async def wait(self, task: str, seconds: float) -> tuple[bytes, dict[str, str]]:
        """The answer of a task, waited for at most `seconds`; then code 202 with the state."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        pause = POLL
        looked = False
        while True:
            changed = asyncio.Event()
            subject = self._subjects.event(aggregate("task", self._program, task))
            hint = self._client.subscribe(subject, _ringing(changed))
            try:
                # Interest first, then the read: what is committed in between rings the bell.
                await self._client.flush()
                while True:
                    events = await self._last(task)
                    state = fold(events)
                    answer = await self.ended(task, events, state)
                    if answer and (again := await self._successor(task, state)):
                        state = replace(state, of=again)
                        break
                    if answer:
                        return answer
                    if state.of:
                        break
                    if not looked and state.status == "submitted" and await self.log.entry(int(task)) is None:
                        raise forgotten(self._program, task)  # a key outlives its task
                    looked = True
                    left = until - loop.time()
                    if left <= 0:
                        return _not_yet(task, state)
                    try:
                        await asyncio.wait_for(changed.wait(), min(left, pause))
                        pause = SOON
                    except TimeoutError:
                        pause = min(2 * pause, POLL)
                    changed.clear()
            finally:
                hint.close()
            task = state.of


def _ringing(bell: asyncio.Event) -> Handler:
    return lambda _: bell.set()


def forgotten(program: str, task: str) -> NotFound:
    """What is said of a task whose position the log no longer has."""
    return NotFound(
        f"the log has no entry {task} any more; if it was a task of {program} it is in the archive (archive.db in the "
        "data folder)", task=task,
    )  # fmt: skip


def said_forgotten(task: str, event: Event) -> Forgotten:
    """What is said of a task whose values were forgotten."""
    data = event.data
    assert isinstance(data, TaskForgotten)
    why = f": {data.reason}" if data.reason else ""
    return Forgotten(f"what task {task} held was forgotten by {data.actor} on {event.time[:19]}Z{why}", task=task)


def _not_yet(task: str, state: TaskState) -> tuple[bytes, dict[str, str]]:
    body = msgspec.json.encode({"task": task, "state": state.status})
    return body, {h.ERROR_CODE: "202", h.ERROR: f"task {task} is {state.status}; ask again", h.TASK: task}
