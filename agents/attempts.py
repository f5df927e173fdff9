"""One attempt on one task: what is known of it, whether it is ours to do, and the way from its message to its end."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from typing import Any

from msgspec import Raw
from msgspec.structs import replace

from dspex.agents import keys, logtime
from dspex.agents.assignments import Assignments, Instances
from dspex.agents.endings import ENVELOPE, Endings
from dspex.agents.failures import failed, retried
from dspex.agents.fates import PATIENCE
from dspex.agents.forking import begin_fork
from dspex.agents.guards import can_erase
from dspex.agents.isolation import ELSEWHERE, Isolation
from dspex.agents.limits import Limits
from dspex.agents.owners import limited_by
from dspex.agents.pacing import Gate
from dspex.agents.recorder import Suspended
from dspex.agents.registered import Registered
from dspex.agents.run import Run
from dspex.agents.runner import Runner
from dspex.agents.vault import Vault
from dspex.agents.versions import Versions
from dspex.agents.waiting import Given, Woken
from dspex.bus.client import Client
from dspex.bus.pull import ACK
from dspex.core import headers as h
from dspex.core.codec import decode_commit, sealed_in
from dspex.core.errors import DeadlineExceeded, InvalidInput, LogCorrupt, NotFound, TaskError
from dspex.core.events import (
    AttemptDied,
    InputSealed,
    Payload,
    TaskCompleted,
    TaskDeadLettered,
    TaskDuplicate,
    TaskFailed,
    TaskRetried,
)
from dspex.core.ports import Appended, Log
from dspex.core.program import Program
from dspex.core.sealing import Guard, text_of, unseal
from dspex.core.subjects import Subjects
from dspex.core.suspicion import Company, company, is_proven, is_used_up, pause, why_dead
from dspex.core.task import TaskState, fold

__all__ = ["Attempts"]

logger = logging.getLogger("dspex.agents")

TURN = 0.1
"""Seconds that a task holds a slot while it waits for the turn of its tenant or study."""
AGAIN = 1.0
"""Seconds until it is delivered again when that did not come."""


class Attempts:
    """Makes attempts on the tasks of one program. `cancelled` are tasks that are said to be cancelled; `done` hears of
    a run whose program is done, before its commit."""

    def __init__(
        self, program: Program, *, code: str, source: str, place: Registered, client: Client, log: Log,
        subjects: Subjects, guard: Guard, vault: Vault, endings: Endings, runner: Runner, assignments: Assignments,
        versions: Versions, cancelled: Container[int], done: Callable[[Run], None], isolation: Isolation,
        limits: Limits,
    ) -> None:  # fmt: skip
        self.program, self.name, self.code, self.source = program, program.name, code, source
        self.place, self.client, self.log, self.subjects = place, client, log, subjects
        self.guard, self.vault, self.endings, self._runner = guard, vault, endings, runner
        self.assignment = program.assignment.hash
        self.assignments, self._instances = assignments, Instances(program, assignments)
        self._versions, self._cancelled, self._done, self._limits = versions, cancelled, done, limits
        self._isolation, self._fates = isolation, endings.waiting.fates

    async def attempt(self, run: Run) -> None:
        """Work on a task until it has ended, sleeps, or is somebody else's. Raises LogError, ConnectionFailed and
        Superseded: it is delivered again then."""
        gates = await self._admitted(run)
        if gates is None:
            await self._versions.put_off(run, AGAIN)
            return
        try:
            if self._isolation.closed:
                self._heed_deadline(run, run.delivery.message.headers if run.delivery.message.has_headers else None)
                await self._isolation.enter(run)
            await self._attempt(run)
        finally:
            for gate in gates:
                gate.leave()
            if run.company is not Company.ANY:
                self._isolation.leave(run)

    async def _admitted(self, run: Run) -> Sequence[Gate] | None:
        """Find out whose limits hold for the task, and wait a moment for its turn under them; None: not now."""
        message = run.delivery.message
        headers = message.headers if message.has_headers else None
        if headers is None and not self.subjects.tenants:
            return ()
        run.limited = limited_by(self.subjects, message.subject, headers)
        if not (run.limited and self._limits.by_caller):
            return ()
        try:
            deadline = h.deadline_of(headers, run.delivery.stored_at) if headers else None
        except InvalidInput:
            return ()  # which ends it
        if deadline is not None and deadline <= logtime.now():
            return ()  # and so does this
        return await self._limits.enter(run.limited, TURN)

    async def _attempt(self, run: Run) -> None:
        message = run.delivery.message
        headers = message.headers if message.has_headers else None
        if headers:
            run.reply, run.values = h.reply_of(headers), headers.get(h.ASSIGNMENT, "")
        if self.guard.private and not (headers and h.SEALED in headers):
            run.exposed, run.erase = message.data, can_erase(self.log)
        if headers and (other := self._versions.other(headers)):
            await self._versions.hand_back(run, other, headers)
            return
        if self._may_be_known(run) and not await self._take_over(run, headers):
            return
        started = time.perf_counter()
        payload: Payload
        try:
            if headers:
                self._check_headers(run, headers)
            if run.values and run.values != self.assignment:
                run.instance = await self._instances.get(run.values)
            body = message.data
            if headers and h.SEALED in headers:
                body = await self._unsealed(run, body)
            input = await self._decoded(run, body) if self.guard.guarded else self._plain(run, body)
            key = h.key_of(headers) if headers else None
            if key is not None:
                tenant = self.subjects.tenant_of(run.delivery.subject)
                owner = await keys.bind(self.log, self.name, key, run.id, self.source, tenant)
                if owner != run.id:
                    await self.endings.settle(run, TaskDuplicate(of=owner, key=key))
                    return
            if headers and (fork := h.fork_of(headers)):
                await begin_fork(run, *fork, self.log, self.subjects, retry=h.RETRY in headers)
            if run.history:
                run.history = await self.vault.bring_back(run.history)
            output = await self._runner.execute(run, input)
        except Suspended:
            if run.suspended and not run.abandoned:
                await self.endings.put_to_sleep(run)
            return
        except TaskError as error:
            payload = self._retry(run, error) or failed(error, time.perf_counter() - started)
            if isinstance(payload, TaskFailed) and run.erase and not run.exposed:
                payload = replace(payload, tenant=self.subjects.tenant_of(run.delivery.subject))
        else:
            payload = TaskCompleted(output=Raw(output), seconds=round(time.perf_counter() - started, 6))
        if not run.abandoned:
            self._done(run)
            await self.endings.settle(run, payload)

    async def _unsealed(self, run: Run, body: bytes) -> bytes:
        """The input of a submission that was stored sealed. Raises Forgotten, NotFound, InvalidInput."""
        key = await self.vault.key_of(run.delivery.message.headers, self.log.epoch, run.id)
        run.sealing = key
        try:
            return unseal(key.key, text_of(sealed_in(body)), f"{self.name}/input")
        except LogCorrupt as error:
            raise InvalidInput(f"{h.SEALED} says that the body is sealed, and it is not: {error}") from None

    async def _decoded(self, run: Run, body: bytes) -> Any:
        """The Input. One that is refused, or that came in the open and does not fit into an event sealed, is kept
        nowhere when it may hold a secret, or cannot be kept."""
        try:
            if run.exposed and 2 * len(body) > self.client.max_payload - ENVELOPE:
                run.exposed = b""
                raise InvalidInput(f"the input has {len(body):,} bytes, too many to be sealed in a message")
            return self._plain(run, body)
        except InvalidInput:
            if self.guard.secret and run.sealing:
                await self.vault.keys.forget(run.sealing.name)
            elif self.guard.secret:
                run.exposed, run.erase = b"", can_erase(self.log)
            raise

    def _plain(self, run: Run, body: bytes) -> Any:
        return (run.instance or self.program).decode(body)

    def _check_headers(self, run: Run, headers: dict[str, str]) -> None:
        deadline = h.deadline_of(headers, run.delivery.stored_at)
        if deadline is not None:
            left = deadline - logtime.now()
            if left <= 0:
                raise DeadlineExceeded(f"the deadline had passed when {self.name} came to it")
            run.expires = min(run.expires, time.monotonic() + left)
            run.deadline = deadline

    def _may_be_known(self, run: Run) -> bool:
        """Whether the log may have something of the task already."""
        delivery = run.delivery
        return (
            delivery.delivered > 1 or delivery.position <= self.place.restored or delivery.position in self._cancelled
            or delivery.stored_at <= run.puller.since
        )  # fmt: skip

    async def _take_over(self, run: Run, headers: dict[str, str] | None) -> bool:
        """A task that may have been delivered before: look it up, and claim it if it is still to be done."""
        entries = await self.log.read(run.aggregate)
        if not entries and run.delivery.delivered == 1 and run.delivery.position not in self._cancelled:
            return True  # the first attempt after all
        run.history = [event for entry in entries for event in decode_commit(entry.body, entry.position)]
        state = fold(run.history)
        run.head, run.retries, run.rested = state.head, state.retries, state.rested
        if any(isinstance(event.data, InputSealed) for event in run.history):
            run.exposed = b""
        if state.ended:
            if self.guard.secret and state.error == InvalidInput.__name__:
                run.erase = can_erase(self.log)
            self.endings.acknowledge(run)
            return False
        if other := self._versions.other(headers, state):
            await self._versions.hand_back(run, other, headers)
            return False
        if state.status == "sleeping" and not isinstance(run.delivery, Given):
            self._heed_deadline(run, headers)
            await self.endings.waiting.sleep_on(run.id, run.history, run.deadline)
            self.client.acknowledge(run.delivery.message, ACK)
            return False
        last = run.history[-1].data if run.history else None
        if isinstance(last, TaskRetried) and last.until > logtime.now() and not isinstance(run.delivery, Woken):
            await self.endings.rest(run, last.until)
            return False
        run.begun_by = state.code_version if state.code_version != self.code else ""
        run.values = run.values or await self._begun_on(run, state)
        self._heed_deadline(run, headers)
        if (found := await self._with_death(run, state)) is None:
            return False
        state = found
        if is_proven(state, self.program.attempts) or is_used_up(state, self.program.attempts):
            run.claimed = True  # no other attempt begins
            await self.endings.settle(run, TaskDeadLettered(attempts=state.attempts, reason=why_dead(state)))
            return False
        run.attempt = state.attempts + 1 if state.attempts else 2
        if not await self._isolation.join(run, company(state), pause(state)):
            self.endings.hand_back(run, ELSEWHERE)
            return False
        events = run.events([run.claim()])
        result = await self.log.append(run.aggregate, events, run.head)
        run.head, run.claimed = result.head, True
        return isinstance(result, Appended)

    async def _with_death(self, run: Run, state: TaskState) -> TaskState | None:
        """The state with the death of the last attempt written down, if it died; None when somebody else is first.
        Who dies before that is followed by one who reads the same in the same places."""
        if state.status != "running" or any(death.attempt == state.attempts for death in state.deaths):
            return state
        patience = PATIENCE if state.deaths or state.alone else 0.0
        reason = await self._fates.of(state.agent, state.claimed_at, patience=patience)
        if reason is None:
            return state
        died = AttemptDied(attempt=state.attempts, agent=state.agent, reason=reason, alone=state.alone)
        events = run.events([died])
        result = await self.log.append(run.aggregate, events, run.head)
        run.head = result.head
        run.history = [*run.history, *events]
        if not isinstance(result, Appended):
            return None
        self.endings.on_death()
        return fold(events, state)

    async def _begun_on(self, run: Run, state: TaskState) -> str:
        """The values that the attempts before us had, which the task keeps; ours when nobody knows them any more."""
        if state.assignment in ("", self.assignment):
            return ""
        try:
            return (await self.assignments.find(state.assignment)).hash
        except (NotFound, InvalidInput) as error:
            logger.warning("task %s goes on with the values in force: %s", run.id, error)
            return ""

    def _heed_deadline(self, run: Run, headers: dict[str, str] | None) -> None:
        """Know the deadline before there is anything to wait for; what is wrong with it is said later."""
        with suppress(InvalidInput):
            run.deadline = h.deadline_of(headers, run.delivery.stored_at) if headers else None

    def _retry(self, run: Run, error: TaskError) -> Payload | None:
        if not run.raised:
            return None
        return retried(self.program.retry, error, retries=run.retries, task=run.id, deadline=run.deadline)
