"""One attempt of ours on a task: what it holds, what it may write, and the runtime of its effects."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET
from msgspec.structs import replace

from dspex.agents.breakers import Breakers
from dspex.agents.calls import Calls
from dspex.agents.journal import events_for
from dspex.agents.limits import Limits, Paid
from dspex.agents.recorder import Recorder
from dspex.agents.vault import Key, Vault, kept_input
from dspex.agents.waiting import Waiting
from dspex.bus.pull import Delivery, Slots
from dspex.core import headers as h
from dspex.core.effects import Scope
from dspex.core.errors import Forgotten, NotFound
from dspex.core.events import EffectRecorded, Event, Head, Payload, SignalReceived, TaskClaimed, Usage
from dspex.core.limits import Scope as Limited
from dspex.core.ports import Appended, Conflict, Log
from dspex.core.program import Program
from dspex.core.sealing import INLINE, Guard, value_of
from dspex.core.spending import Cost
from dspex.core.suspicion import Company

__all__ = ["Run", "Seat"]


@dataclass(frozen=True)
class Seat:
    """What all runs of one worker share: who they are, and where they write."""

    agent: str
    assignment: str
    code: str
    source: str
    log: Log
    waiting: Waiting
    calls: Calls
    limit: int
    loop: asyncio.AbstractEventLoop
    vault: Vault
    guard: Guard
    breakers: Breakers | None = None
    """The circuit breakers of the agent; None where no effect has one."""
    timeout: float = 300.0
    """Seconds that one attempt may take."""
    lenient: bool = False
    """What was recorded counts, although the code asks for it otherwise now."""
    limits: Limits | None = None


class Run:
    """One attempt. Times are of the monotonic clock.

    What most runs never change is set on the class: there is one of these for every task.
    """

    head = Head()
    attempt = 1
    retries = rested = 0
    deadline: float | None = None
    reply = ""
    claimed = False
    """The log has our claim."""
    begun = waiting = False
    """It has begun; it waits for its company, and no code of its program runs."""
    company = Company.ANY
    raised = False
    """The program raised, so its retry policy has a say."""
    settling = freed = False
    """The program is done and the end is being committed; its slot is free again."""
    abandoned = suspended = False
    """Somebody else ends this run, or it goes to sleep: its own task writes nothing more."""
    exposed = b""
    """A private input that came in the open, until the task's own events keep it sealed."""
    erase = False
    """Its message is erased when the task has ended."""
    private: frozenset[str] = frozenset()
    """Places and names of effects whose records are sealed although the program is not private."""
    sealing: Key | None = None
    history: Sequence[Event] = ()
    values = ""
    """The hash of the task's own values, when it has some."""
    instance: Program | None = None
    """The program on these, when they are not the ones in force."""
    begun_by = ""
    """The code version of the attempt before this one."""
    recorder: Recorder | None = None
    _scope: Scope | None = None
    thread: asyncio.Future[Any] | None = None
    task: asyncio.Task[None] | None = None

    def __init__(self, seat: Seat, delivery: Delivery, puller: Slots, program: str, started: float, expires: float):
        self.seat, self.delivery, self.puller, self.program = seat, delivery, puller, program
        self.started, self.expires = started, expires
        self.id = str(delivery.position)
        self.aggregate = f"task.{program}.{self.id}"

    def events(self, payloads: Sequence[Payload]) -> list[Event]:
        """Payloads as the next events of the task."""
        return events_for(
            self.aggregate, self.head, payloads, source=self.seat.source, correlation=self.id, causation=self.id
        )

    def claim(self) -> TaskClaimed:
        """The event that says that this attempt has the task."""
        seat = self.seat
        values = self.values or seat.assignment
        alone = self.company is Company.NONE or UNSET
        return TaskClaimed(
            attempt=self.attempt, agent=seat.agent, assignment=values, code=seat.code, alone=alone,
            wake=self.delivery.wake or UNSET,
        )  # fmt: skip

    @property
    def patience(self) -> float:
        """Seconds that an attempt of its program may take."""
        return self.seat.timeout

    def claimed_by(self, payloads: Sequence[Payload]) -> list[Payload]:
        """The payloads, behind the claim when the log does not have it yet."""
        return list(payloads) if self.claimed else [self.claim(), *payloads]

    # -- what of it is not kept in the open, or not in the log itself

    def is_private(self, payload: Payload) -> bool:
        """Whether a payload is sealed before it is kept."""
        if self.seat.guard.private:
            return True
        return isinstance(payload, EffectRecorded) and (payload.key in self.private or payload.name in self.private)

    def seal_effect(self, place: str) -> None:
        """Have the record of an effect sealed: by its place, or all of a name."""
        self.private |= {place}

    async def key(self) -> Key:
        """The key of the task. When it was forgotten, or is not here, one that nobody will ever have again."""
        if self.sealing is None:
            headers = self.delivery.message.headers if self.delivery.message.has_headers else {}
            try:
                self.sealing = await self.seat.vault.key_of(headers, self.seat.log.epoch, self.id)
            except (Forgotten, NotFound):
                self.sealing = Key("forgotten", secrets.token_bytes(32))
        return self.sealing

    async def put_away(self, payloads: Sequence[Payload]) -> Sequence[Payload]:
        """The payloads as the log keeps them; nearly always as they are. The same give the same again."""
        if not self._is_kept_elsewhere(payloads):
            return payloads
        kept = await self.seat.vault.put_away(payloads, self.program, self.seat.guard, self)
        if self.exposed and payloads:
            delivery = self.delivery
            headers = delivery.message.headers if delivery.message.has_headers else {}
            key = await self.key()
            sealed = kept_input(
                key, self.program, self.exposed, self.seat.guard, headers, delivery.stored_at, delivery.subject
            )
            kept.insert(isinstance(kept[0], TaskClaimed), sealed)
        return kept

    def _is_kept_elsewhere(self, payloads: Sequence[Payload]) -> bool:
        """Whether anything of these may be sealed, or is too large for an event."""
        return bool(self.private or self.seat.guard.private or any(map(_is_large, payloads)))

    def _as_kept(self, events: Sequence[Event], kept: Sequence[Payload]) -> list[Event]:
        """Events of what is kept, with the time of those that they stand for: an append that is tried again must be the
        same append."""
        if len(kept) == len(events):
            return [replace(event, data=payload) for event, payload in zip(events, kept, strict=True)]
        first = events[0]
        return [
            Event(first.aggregate, version, first.time, first.source, first.correlation, first.causation, payload)
            for version, payload in enumerate(kept, first.version)
        ]

    @property
    def scope(self) -> Scope:
        """The main branch of the run; made when the program first asks for something, which most never do."""
        if self._scope is None:
            self._scope = Scope(self.program, self.runtime)
        return self._scope

    # What the recorder of its effects needs of it.

    def runtime(self) -> Recorder:
        """What answers the program's requests for effects; made when the first one comes."""
        if self.recorder is None:
            self.recorder = Recorder(self, self.history, self.seat.loop)
            self.history = ()
            if self.settling or self.abandoned:  # a branch that was left behind asks for the first time
                self.recorder.close()
        return self.recorder

    @property
    def limit(self) -> int:
        """The largest result that can be recorded, in bytes."""
        return self.seat.limit

    @property
    def lenient(self) -> bool:
        """Whether a record counts although the code asks for it otherwise now."""
        return self.seat.lenient

    @property
    def breakers(self) -> Breakers:
        """What decides whether an effect with a circuit breaker is performed now."""
        assert self.seat.breakers, "an agent has breakers"
        return self.seat.breakers

    @property
    def branches(self) -> set[asyncio.Task[Any]]:
        """The branches of the run that have not ended, without the main one."""
        return self._scope.live if self._scope else set()

    @property
    def over(self) -> bool:
        """Whether it was stopped: its task is cancelled, or its time is up."""
        return self.abandoned

    @property
    def left(self) -> float:
        """Seconds that it may still take."""
        return self.expires - time.monotonic()

    # -- limits

    limited: tuple[Limited, ...] = ()
    """The tenant and the study whose limits hold for the task, beside its program's and the agent's."""

    async def reserve(self, cost: Cost, read_only: bool) -> Paid:
        """Reserve what an effect may cost of every budget that it counts to. Raises BudgetExhausted, Renewing."""
        assert self.seat.limits, "an agent has limits"
        return await self.seat.limits.reserve(self.limited, cost, read_only)

    def charge(self, usage: Usage) -> None:
        """An effect has cost what nobody had said before."""
        assert self.seat.limits, "an agent has limits"
        self.seat.limits.charge(self.limited, usage)

    async def call(self, program: str, body: bytes, key: str) -> bytes:
        """Run another program for this task, by the task's own deadline."""
        if (await self.seat.calls.guards.of(program)).private:
            self.seal_effect(f"call.{program}")
        study = next((scope.name for scope in self.limited if scope.kind == "study"), "")
        more = {h.STUDY: study} if study else {}
        return await self.seat.calls.call(program, body, key, self.id, more, deadline=self.deadline)

    async def commit(self, events: list[Event]) -> Appended | Conflict:
        """Append behind the head, and move it when that was taken."""
        if self._is_kept_elsewhere([event.data for event in events]):
            events = self._as_kept(events, await self.put_away([event.data for event in events]))
        result = await self.seat.log.append(self.aggregate, events, self.head)
        if isinstance(result, Appended):
            self.head = result.head
            self.claimed = True
            self.exposed = b""
        return result

    async def signals(self, name: str) -> list[SignalReceived]:
        """The signals of a name that have reached the task."""
        return await self.seat.waiting.received(self.id, name)

    def suspend(self) -> None:
        """End the program's run: it waits for something that may take long."""
        if not self.suspended:
            self.suspended = True
            if self.task:
                self.task.cancel()


def _is_large(payload: Payload) -> bool:
    if type(payload) is TaskClaimed:  # the one that every commit has; and this is on the path of every task
        return False
    value = value_of(payload)
    return value is not None and len(bytes(value)) > INLINE
