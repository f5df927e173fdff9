"""Dead letters: tasks that ended without an output, submitted again or dropped on somebody's word.

That is written down in a log of its own (`dlq.<program>.<task>`) and not among the task's own events: those have ended,
and only whoever holds a claim writes there. The new task is named by a key made of the old one and of what is
changed, so that the same retry, however often it is asked for and whoever dies over it, runs once.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import msgspec

from dspex.agents.assignments import Assignments
from dspex.agents.journal import record
from dspex.agents.keys import key_aggregate
from dspex.agents.owners import asker_of, may_see
from dspex.agents.reader import kept_submission
from dspex.agents.results import Results, letter_state, task_id_of
from dspex.agents.vault import Vault
from dspex.bus.client import Client
from dspex.bus.service import Request
from dspex.core import headers as h
from dspex.core.access import Role, account_of
from dspex.core.aggregates import LetterState
from dspex.core.codec import NOT_JSON, decode_commit, sealed_in
from dspex.core.errors import (
    Conflict,
    ConnectionFailed,
    InvalidAssignment,
    InvalidInput,
    LogError,
    NotFound,
    Unavailable,
)
from dspex.core.events import KeyBound, TaskDropped, TaskResubmitted
from dspex.core.fork import separated, with_input
from dspex.core.ports import Entry, Log
from dspex.core.program import Program
from dspex.core.sealing import guard_of, text_of, unseal
from dspex.core.subjects import Subjects, aggregate
from dspex.core.task import TaskState, fold

__all__ = ["Letters"]

logger = logging.getLogger("dspex.agents")

MAX_WORDS = 1000
"""Characters of who and why."""
STAYS = ("Traceparent", "Tracestate", h.CORRELATION)
"""Headers of the old submission that the new one has, too."""
MAY_BE_RETRIED = frozenset({"dead", "failed", "cancelled"})


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    task: int | str
    clean: bool = False
    set: dict[str, Any] = {}
    actor: str = ""
    why: str = ""


class Letters:
    """What one agent does for the dead letters of its program."""

    def __init__(
        self, program: Program, client: Client, log: Log, subjects: Subjects, results: Results, vault: Vault,
        assignments: Assignments, source: str,
    ) -> None:  # fmt: skip
        self._program, self._name = program, program.name
        self._client, self._log, self._subjects, self._source = client, log, subjects, source
        self._results, self._vault, self._assignments = results, vault, assignments
        about = program.describe()
        self._guard = guard_of(about.input_schema, about.output_schema)

    async def retry(self, request: Request) -> None:
        """Submit a task that ended without an output again; the same retry is one task."""
        wanted, task, who = await self._named(request)
        try:
            state, letter = await self._look(task)
            digest = hashlib.sha256(msgspec.json.encode([wanted.clean, wanted.set], order="deterministic")).hexdigest()
            key = f"dlq/{task}/{digest[:16]}"
            successor, fresh = letter.successors.get(key, ""), False
            if not successor:
                successor, fresh = await self._again(request, wanted, task, who, key, state)
                event = TaskResubmitted(
                    successor=successor, key=key, actor=who, clean=wanted.clean, changed=sorted(wanted.set)
                )
                name = aggregate("dlq", self._name, task)
                await record(self._log, name, [event], source=self._source, causation=task)
        except (LogError, ConnectionFailed, TimeoutError) as error:
            raise Unavailable(f"task {task} was maybe not submitted again ({error}); the same retry is safe") from None
        body = {"program": self._name, "task": task, "retried": successor, "fresh": fresh}
        request.respond(msgspec.json.encode(body))

    async def drop(self, request: Request) -> None:
        """Note that nothing more is to be done about a task that ended without an output."""
        wanted, task, who = await self._named(request)
        if not wanted.why.strip():
            raise InvalidInput(f"say why task {task} is dropped")
        try:
            _, letter = await self._look(task)
            if not letter.dropped:
                event = TaskDropped(actor=who, why=wanted.why)
                name = aggregate("dlq", self._name, task)
                await record(self._log, name, [event], source=self._source, causation=task)
        except LogError as error:
            raise Unavailable(str(error)) from None
        body = {"program": self._name, "task": task, "dropped": True, "fresh": not letter.dropped}
        request.respond(msgspec.json.encode(body))

    async def _named(self, request: Request) -> tuple[_Wanted, str, str]:
        """What is wanted, the task, and who wants it. Raises InvalidInput, NotFound."""
        try:
            wanted = msgspec.json.decode(request.data, type=_Wanted)
        except NOT_JSON as error:
            raise InvalidInput(f'a dead letter is named so: {{"task": 42}}: {error}') from None
        if len(wanted.actor) > MAX_WORDS or len(wanted.why) > MAX_WORDS:
            raise InvalidInput(f"who and why have at most {MAX_WORDS:,} characters each")
        asker = asker_of(self._client, request.headers)
        if not may_see(asker, account_of(Role.CONSOLE)) and any(not name.startswith("input.") for name in wanted.set):
            raise InvalidInput("only the console sets variables for a retry; set fields of the input: input.<field>")
        kind, name = task_id_of(msgspec.json.encode(wanted.task))
        task = await self._results.find(kind, name, asker)
        return wanted, task, asker or wanted.actor or request.headers.get(h.ACTOR, "")[:MAX_WORDS]

    async def _look(self, task: str) -> tuple[TaskState, LetterState]:
        """Where the task stands. Raises Conflict for one that did not end, or ended well."""
        entries = await self._log.read(aggregate("task", self._name, task))
        state = fold(event for each in entries for event in decode_commit(each.body, each.position))
        if state.of:
            raise Conflict(f"task {task} is the same as task {state.of}, and is retried as that", task=task)
        if state.status not in MAY_BE_RETRIED:
            done = "has not ended" if not state.ended else "has its output"
            raise Conflict(f"task {task} is no dead letter: it {done}, it is {state.status}", task=task)
        return state, await letter_state(self._log, self._name, task)

    async def _again(
        self, request: Request, wanted: _Wanted, task: str, who: str, key: str, state: TaskState
    ) -> tuple[str, bool]:
        """Submit it, unless somebody died between that and writing it down."""
        entry = await self._log.entry(int(task)) or await kept_submission(self._log, self._subjects, task)
        if entry is None:
            raise NotFound(f"the submission of task {task} is not in the log any more", task=task)
        tenant = self._subjects.tenant_of(entry.subject)
        known = await self._log.last(key_aggregate(self._name, key, tenant))
        if known is not None:
            bound = decode_commit(known.body, known.position)[0].data
            assert isinstance(bound, KeyBound), "that is what such an aggregate holds"
            return bound.task, False
        inputs, variables = separated(wanted.set, self._program.Input.model_fields)
        body = with_input(await self._body(entry, task), inputs)
        self._program.decode(body)
        headers = {name: entry.headers[name] for name in STAYS if name in entry.headers}
        headers |= {h.KEY: key, h.PARENT: task, h.CAUSATION: task, h.RETRY: task, **({h.ACTOR: who} if who else {})}
        if not wanted.clean:
            headers[h.FORK] = f"{task}@{state.head.version}"
        if values := await self._values(entry, wanted, variables, state, who):
            headers[h.ASSIGNMENT] = values
        if self._guard.private:
            body, sealed = await self._vault.sealed_message(self._name, body, self._guard)
            headers |= sealed
        reply = await self._client.request(entry.subject, body, headers=headers)
        answer = msgspec.json.decode(reply.data) if reply.data and not reply.status else {}
        if "seq" not in answer:
            raise Unavailable(f"the log did not take a retry of task {task}; try again")
        return str(answer["seq"]), True

    async def _body(self, entry: Entry, task: str) -> bytes:
        """The input as it was sent. Raises Forgotten, NotFound."""
        if h.sealed(entry.headers) is None:
            return entry.body
        key = await self._vault.key_of(entry.headers, self._log.epoch, task)
        return unseal(key.key, text_of(sealed_in(entry.body)), f"{self._name}/input")

    async def _values(
        self, entry: Entry, wanted: _Wanted, variables: dict[str, Any], state: TaskState, who: str
    ) -> str:
        """The hash of the values that it is to run on: those of the dead one, unless it begins anew."""
        named = entry.headers.get(h.ASSIGNMENT, "")
        base = named if wanted.clean else state.assignment or named
        if not variables:
            return base
        try:
            why = f"for a retry of task {entry.position}"
            return (await self._assignments.propose(variables, base=base or None, who=who, why=why)).assignment.hash
        except InvalidAssignment as error:
            raise InvalidInput(str(error)) from None
