"""Tasks that hold no process: put to sleep, woken by time or by a signal.

The timer is set before the commit that says the task sleeps, and a signal is in the task's inbox before anybody looks
whether the task waits for it. So whoever dies between two lines, the task is delivered again or woken once too often,
never forgotten.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from dspex.agents import keys, logtime
from dspex.agents.cancelling import CANCEL, Cancelling
from dspex.agents.fates import Fates
from dspex.agents.guards import can_erase, erase_entry
from dspex.agents.journal import events_for, head_of
from dspex.agents.owners import same_tenant
from dspex.agents.vault import Key, Vault, kept_input
from dspex.bus.client import Client
from dspex.bus.pull import ACK, Delivery
from dspex.bus.wire import Message
from dspex.core import headers as h
from dspex.core.codec import NOT_JSON, decode_commit, rfc3339, sealed_in
from dspex.core.errors import ConnectionFailed, InvalidInput, LogCorrupt, LogError, TaskError
from dspex.core.events import Event, InputSealed, Payload, SignalReceived, TaskClaimed, TaskRetried
from dspex.core.history import remembered
from dspex.core.ports import Appended, Entry, Log
from dspex.core.sealing import Guard, text_of, unseal
from dspex.core.subjects import Subjects, aggregate
from dspex.core.task import TaskState, fold

__all__ = ["Given", "Waiting", "Woken", "times_of"]

logger = logging.getLogger("dspex.agents")

TRIES = 20
LOOK_AGAIN = 10.0
"""Seconds until a task is looked at again that was woken while it was at work elsewhere."""
TIMER_SLACK = 0.1
"""Seconds by which the server's clock may be ahead of ours when it fires a timer."""
ENVELOPE = 4096
"""Bytes that a signal's commit takes beside its value, at most."""


class Given(Delivery):
    """A task as its entry in the log has it, as if its consumer had delivered it. Words about it go to `reply`."""

    def __init__(self, entry: Entry, reply: bytes, delivered: int) -> None:
        fields = "".join(f"{name}: {value}\r\n" for name, value in entry.headers.items())
        raw = f"NATS/1.0\r\n{fields}\r\n".encode() if fields else None
        self.message = Message(entry.subject.encode(), reply, entry.body, raw)
        self.position, self.delivered, self._stored_at = entry.position, delivered, entry.time

    @property
    def stored_at(self) -> float:
        return self._stored_at


class Woken(Given):
    """A task that was asleep, as if it were delivered again: its submission, with the wake's acknowledgement. `asleep`:
    it still is, and nobody has claimed it with this wake."""

    def __init__(self, entry: Entry, wake: Delivery, asleep: bool = True) -> None:
        super().__init__(entry, wake.message.raw_reply, wake.delivered + 1)
        self.wake, self.asleep = wake.position, asleep


class Waiting:
    """What one agent does for the sleeping tasks of its program."""

    def __init__(
        self, client: Client, log: Log, subjects: Subjects, program: str, source: str, vault: Vault, guard: Guard
    ) -> None:
        self._client, self._log, self._subjects = client, log, subjects
        self._vault, self._guard = vault, guard
        self._program, self._source = program, source
        self.fates = Fates(log, program)
        self._cancelling = Cancelling(client, log, subjects, program, source)
        self._inboxes: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    # -- timers

    async def arm(self, task: str, until: float) -> None:
        """Have the task woken at `until`; a later call replaces an earlier one. Raises LogError."""
        when = rfc3339(math.ceil(until))
        headers = {
            "Nats-Schedule": f"@at {when.partition('.')[0]}Z",
            "Nats-Schedule-Target": self._subjects.wake(self._program),
        }
        await self._send(self._subjects.timer(self._program, task), task, headers)

    async def wake(self, task: str) -> None:
        """Have the task woken now. Raises LogError."""
        await self._send(self._subjects.wake(self._program), task, None)

    async def _send(self, subject: str, task: str, headers: dict[str, str] | None) -> None:
        body = msgspec.json.encode({"task": task})
        for _ in range(TRIES):
            try:
                reply = await self._client.request(subject, body, headers=headers)
            except (ConnectionFailed, TimeoutError):
                await asyncio.sleep(0.25)
                continue
            answer = msgspec.json.decode(reply.data) if reply.data else {"error": {"description": "no stream"}}
            if "error" not in answer:
                return
            logger.debug("a timer was refused: %s", answer["error"])
            await asyncio.sleep(0.25)
        raise LogError(f"the timers' stream did not take {subject}")

    async def woken(self, wake: Delivery, code: str) -> Woken | None:
        """The task that a wake is for; None when it is not to be run: unknown, ended, or at work elsewhere. `code` is
        ours: who has a task for other code may have no delivery of it, so its wakes must not be lost."""
        task = _named(wake.message.data).get("task")
        if not (isinstance(task, str) and task.isdecimal() and len(task) < 19):
            return None
        entry = await self._log.entry(int(task))
        if entry is None or self._subjects.door_of(entry.subject) != ("task", self._program):
            return None
        state = await self.state(str(entry.position))
        if state.ended:
            if self._guard.private and not h.sealed(entry.headers) and can_erase(self._log):
                # Whoever ended it died before it was erased.
                await erase_entry(self._log, self._client, self._subjects, entry.position)
            return None
        foreign = entry.headers.get(h.CODE, code) != code
        if state.status != "sleeping" and not foreign and not await self._may_take_over(task, wake):
            return None
        if state.status == "sleeping":
            events = await self._events(task)
            if _claimed_with(events) == wake.position:  # its taker has put the task to sleep again
                with suppress(InvalidInput):
                    headers = {name.title(): value for name, value in entry.headers.items()}
                    await self.sleep_on(task, events, h.deadline_of(headers, entry.time))
                    return None
        return Woken(entry, wake, asleep=state.status == "sleeping")

    async def sleep_on(self, task: str, events: Sequence[Event], deadline: float | None) -> None:
        """A sleeping task was delivered again: whoever put it to sleep died before the acknowledgement, or that was
        lost or late. It is not claimed by this delivery, for its acknowledgement may still be on its way, and then
        nobody would bring the task back if we died. So its timer is set anew, and it is woken if it is due. Raises
        LogError."""
        times = [*times_of(events), *([] if deadline is None else [deadline])]
        if times:
            await self.arm(task, min(times))
        if min(times, default=math.inf) < logtime.now() + TIMER_SLACK or await self.due(task, events) is not None:
            await self.wake(task)

    async def _may_take_over(self, task: str, wake: Delivery) -> bool:
        """Whether a task that does not sleep is to be taken with this wake: it was claimed with this very one, which
        comes again because its taker died or lost its connection; or the log says that its taker has ended. How often
        it was delivered says nothing: a server that was killed and a consumer with a new leader have forgotten that.

        Otherwise it is at work elsewhere, and this wake is one too many, as far as one can know. An acknowledgement
        that is late may have taken away the one that its taker holds, so it is looked at again after a while."""
        claims = [event for event in await self._events(task) if isinstance(event.data, TaskClaimed)]
        if not claims:
            return wake.delivered > 1
        claim, at = claims[-1].data, claims[-1].position
        assert isinstance(claim, TaskClaimed)
        if claim.wake == wake.position or (not claim.wake and wake.delivered > 1):
            return True  # without a wake: claimed with its submission, or by a version that wrote down no wake
        if await self.fates.is_over(claim.agent, at):
            return True
        await self.arm(task, logtime.now() + LOOK_AGAIN)
        return False

    async def _events(self, task: str) -> list[Event]:
        entries = await self._log.read(aggregate("task", self._program, task))
        return [event for entry in entries for event in decode_commit(entry.body, entry.position)]

    async def state(self, task: str) -> TaskState:
        """Where a task stands by its last commit."""
        entry = await self._log.last(aggregate("task", self._program, task))
        return fold(decode_commit(entry.body, entry.position)) if entry else TaskState()

    async def due(self, task: str, events: Iterable[Event]) -> float | None:
        """Since when a sleeping task, whose events these are, could go on: since its time or its signal came. In
        seconds since the epoch; None when it sleeps on."""
        known = list(events)
        waits = fold(known).waits
        found = [when for when in times_of(known) if when <= logtime.now()]
        records = remembered(known).records.values()
        heard = [record for record in records if record.name.startswith("signal.") and not record.error]
        taken = {record.arguments[0] for record in heard}
        names = {wait.signal for wait in waits if wait.signal}
        for entry in await self._log.read(aggregate("inbox", self._program, task)) if names else ():
            for event in decode_commit(entry.body, entry.position):
                signal = event.data
                if isinstance(signal, SignalReceived) and signal.name in names and signal.position not in taken:
                    found.append(entry.time)
        return min(found, default=None)

    # -- signals

    async def received(self, task: str, name: str) -> list[SignalReceived]:
        """The signals of a name in a task's inbox, in the order in which they were sent."""
        entries = await self._log.read(aggregate("inbox", self._program, task))
        events = [event for entry in entries for event in decode_commit(entry.body, entry.position)]
        named = [event for event in events if isinstance(event.data, SignalReceived) and event.data.name == name]
        found = [event.data for event in await self._vault.bring_back(named)]
        return sorted((data for data in found if isinstance(data, SignalReceived)), key=lambda signal: signal.position)

    async def receive(self, delivery: Delivery) -> None:
        """A signal came through its door: into the inbox of its task, and wake the task if it waits for it."""
        body = _named(await self._opened(delivery.message))
        entry, name = await self._meant(str(body.get("task", ""))), body.get("name")
        task = str(entry.position) if entry else ""
        # One at a time for a task, so that they are filed in the order in which they came.
        async with self._inboxes.setdefault(task, asyncio.Lock()):
            await self._receive(delivery, entry, name, body)

    async def _meant(self, task: str) -> Entry | None:
        """The submission of the task that a signal names; of the one that has its key, when that is another. Who sent a
        submission twice cannot know which of the two runs, and a signal to the other would be lost."""
        entry = await self._log.entry(int(task)) if task.isdecimal() and len(task) < 19 else None
        if entry is None or self._subjects.door_of(entry.subject) != ("task", self._program):
            return None
        state = await self.state(task)
        owner = state.of if state.status == "duplicate" else task
        if state.status in ("submitted", "running") and (key := _key_of(entry)) is not None:
            # Bound here if it is not yet: the one that was named first is then the one that runs.
            tenant = self._subjects.tenant_of(entry.subject)
            owner = await keys.bind(self._log, self._program, key, task, self._source, tenant)
        return entry if owner == task else await self._log.entry(int(owner))

    async def _receive(self, delivery: Delivery, entry: Entry | None, name: object, body: dict[str, Any]) -> None:
        task, known = str(entry.position) if entry else "", entry is not None
        if entry and known and not self._may_tell(delivery.subject, entry.subject):
            logger.warning("a signal to task %s is not from whoever submitted it: position %d", task, delivery.position)
            known = False
        if len(delivery.message.data) > self._client.max_payload - ENVELOPE:
            logger.warning("a signal to %s is too large for an inbox: position %d", self._program, delivery.position)
        elif entry and known and name == CANCEL:
            by = delivery.message.headers.get(h.ACTOR, "")[:200]
            kept = await self._kept_input(entry, task)
            await self._cancelling.cancel(entry, body.get("value"), by=by, cause=delivery.position, kept=kept)
            if kept and can_erase(self._log):  # a task that sleeps is not delivered again, so nobody else will
                await erase_entry(self._log, self._client, self._subjects, entry.position)
        elif entry is not None and known and isinstance(name, str):
            state = await self.state(task)
            if not state.ended:
                value = msgspec.Raw(msgspec.json.encode(body.get("value")))
                received = SignalReceived(name=name, position=delivery.position, value=value)
                sealer = _Signals(self._guard, self._vault, entry.headers, self._log.epoch, task)
                [filed] = await self._vault.put_away([received], self._program, self._guard, sealer)
                assert isinstance(filed, SignalReceived)
                await self._file(task, filed)
                state = await self.state(task)
                if any(wait.signal == name for wait in state.waits):
                    await self.wake(task)
        else:
            logger.info("a signal to %s names no task of it: position %d", self._program, delivery.position)
        sent = delivery.message.headers if delivery.message.has_headers else {}
        if self._guard.private and not h.sealed(sent) and can_erase(self._log):  # the inbox has it sealed
            await erase_entry(self._log, self._client, self._subjects, delivery.position)
        self._client.respond(delivery.message, ACK)

    def _may_tell(self, signal: str, submission: str) -> bool:
        """Whether whoever sent a signal may say something to the task: its own account, the console, and ours."""
        if not self._subjects.tenants or self._subjects.tenant_of(signal) == self._client.identity.account:
            return True
        return same_tenant(self._subjects, signal, submission)

    async def _opened(self, message: Message) -> bytes:
        """The body of a signal; a log process seals one to a private program before it writes it. One that cannot be
        opened any more says nothing."""
        name = h.sealed(message.headers) if message.has_headers else None
        if name is None:
            return message.data
        try:
            key = await self._vault.find(name)
            return unseal(key, text_of(sealed_in(message.data)), f"{self._program}/signal")
        except (TaskError, LogCorrupt) as error:
            logger.info("a signal to %s cannot be opened: %s", self._program, error)
            return b""

    async def _kept_input(self, entry: Entry, task: str) -> InputSealed | None:
        """A private input that came in the open, sealed; None when it came sealed or is not private."""
        if not self._guard.private or h.sealed(entry.headers):
            return None
        sealer = _Signals(self._guard, self._vault, entry.headers, self._log.epoch, task)
        key = await sealer.key()
        return kept_input(key, self._program, entry.body, self._guard, entry.headers, entry.time, entry.subject)

    async def _file(self, task: str, signal: SignalReceived) -> None:
        """Append to the inbox, once however often the signal is delivered."""
        inbox = aggregate("inbox", self._program, task)
        for _ in range(TRIES):
            head = await head_of(self._log, inbox)
            entries = await self._log.read(inbox)
            filed = [event.data for entry in entries for event in decode_commit(entry.body, entry.position)]
            if any(isinstance(data, SignalReceived) and data.position == signal.position for data in filed):
                return
            cause = str(signal.position)
            events = events_for(inbox, head, [signal], source=self._source, correlation=task, causation=cause)
            if isinstance(await self._log.append(inbox, events, head), Appended):
                return
        raise LogError(f"the inbox of task {task} changed {TRIES} times while a signal was put into it")


class _Signals:
    """Seals the signals of one task, with its key."""

    def __init__(self, guard: Guard, vault: Vault, headers: Mapping[str, str], epoch: str, task: str) -> None:
        self._guard, self._vault, self._place = guard, vault, (headers, epoch, task)

    def is_private(self, payload: Payload) -> bool:
        return self._guard.private

    async def key(self) -> Key:
        try:
            return await self._vault.key_of(*self._place)
        except TaskError:  # nobody has its key any more, so nobody is to read it
            return Key("forgotten", secrets.token_bytes(32))


def _key_of(submission: Entry) -> str | None:
    try:
        return h.key_of(submission.headers)
    except InvalidInput:
        return None  # its task fails with that


def times_of(events: Sequence[Event]) -> list[float]:
    """The times at which a sleeping task, whose events these are, is to be woken; the deadline is not among them."""
    times = [wait.until for wait in fold(events).waits if wait.until is not None]
    if events and isinstance(events[-1].data, TaskRetried):
        times.append(events[-1].data.until)
    return times


def _claimed_with(events: Sequence[Event]) -> int:
    """The wake that a task was claimed with last; 0 when it was none, or an older version wrote none down."""
    claims = [event.data for event in events if isinstance(event.data, TaskClaimed)]
    return (claims[-1].wake or 0) if claims else 0


def _named(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except NOT_JSON:
        return {}
    return value if isinstance(value, dict) else {}
