"""One agent's side of the limits: what it was lent, and its words with the limiter.

It speaks once a second, and at once when it needs something. What it has it may use without asking; when the limiter
is away it goes on with that, and then waits.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import msgspec
from msgspec.structs import replace

from dspex.agents import logtime
from dspex.agents.budgets import Budgets, Reservation
from dspex.agents.pacing import PLENTY, Gate
from dspex.bus.client import Client
from dspex.core import headers as h
from dspex.core.codec import NOT_JSON
from dspex.core.errors import BudgetExhausted, ConnectionFailed, LimitExceeded
from dspex.core.events import Usage
from dspex.core.lending import Answer, Ask, UsedUp
from dspex.core.limits import Limit, Scope, limit_of, parse_scope
from dspex.core.spending import Cost
from dspex.core.subjects import Subjects

__all__ = ["Limits"]

logger = logging.getLogger("dspex.agents")

ASK_TIMEOUT = 2.0
"""Seconds for one answer of the limiter."""
SOON = 0.25
"""Seconds until it is asked again: while it is away, and while others have what we want."""
LEAST = 0.005
"""Seconds between two words."""
MAX_GATES = 10_000
"""Tenants, studies and models whose rates one agent holds to at once."""


class Paid:
    """What is reserved for one effect, and the gates of its model."""

    def __init__(self, gates: list[Gate], reservation: Reservation | None) -> None:
        self._gates, self._reservation = gates, reservation

    def settle(self, usage: Usage) -> None:
        """The effect is over and has cost this; the rest is free again."""
        for gate in self._gates:
            gate.leave()
        if self._reservation:
            self._reservation.settle(usage)


class Limits:
    """What a program's agent holds to. `slots` is how many tasks it can hold; `held` how many it holds now."""

    def __init__(
        self, client: Client, subjects: Subjects, program: str, agent: str, slots: int, held: Callable[[], int]
    ) -> None:
        self._client, self._subject = client, subjects.limits(f"lease.{program}")
        self.holder, self._agent = f"{agent}-{secrets.token_hex(4)}", agent
        self._own = (Scope("program", program), Scope("agent", agent))
        self._slots, self._held = slots, held
        self._bell = asyncio.Event()
        self._seen, self._again = -1, 1.0
        self.known: dict[Scope, Limit] = {}
        self._gates: dict[Scope, Gate] = {}
        self.budgets = Budgets(self.holder, self._bell.set)
        self.used_up: list[UsedUp] = []
        self._keeper: asyncio.Task[None] | None = None
        self._yielding = 0.0
        self.paced = False
        """Whether the program's tasks, or this agent's, have a rate or a concurrency."""
        self.by_caller = False
        """Whether tenants or studies have a rate or a concurrency, so that each task has to be looked at."""
        self.on_change: list[Callable[[], None]] = []

    # -- life

    async def begin(self, patience: float = math.inf) -> None:
        """Find out which limits there are, however long that takes, and keep in touch from then on. With `patience`:
        without limits, when nobody answers for so many seconds."""
        until = time.monotonic() + patience
        while not await self._speak():
            if time.monotonic() > until:
                logger.warning("nobody tells %s of any limits; it goes on without", self._agent)
                return
            await asyncio.sleep(SOON)
        self._keeper = asyncio.create_task(self._keep(), name="dspex-limits")

    async def finish(self) -> None:
        """Give everything back."""
        if self._keeper is None:
            return
        self._keeper.cancel()
        await asyncio.wait([self._keeper])
        leases = self.budgets.last_words()
        if self._client.connected:
            await self._request(Ask(self.holder, self._agent, self._seen, leases=leases, gone=True))

    async def _keep(self) -> None:
        while True:
            waits = self.budgets.waits or any(gate.waiting for gate in self._gates.values())
            with suppress(TimeoutError):
                await asyncio.wait_for(self._bell.wait(), SOON if waits else self._again)
            await asyncio.sleep(LEAST)
            self._bell.clear()
            try:
                if not await self._speak():
                    await asyncio.sleep(SOON)
                    self._bell.set()
            except Exception:
                logger.exception("the limits of %s could not be kept up; trying again", self._agent)
                await asyncio.sleep(SOON)

    # -- tasks

    @property
    def room(self) -> int:
        """How many tasks may start here now; one less while a sleeping task waits for its turn to go on."""
        free = min((self._gates[scope].free for scope in self._own if scope in self._gates), default=PLENTY)
        return free - 1 if self._yielding > time.monotonic() and free < PLENTY else free

    def take(self) -> bool:
        """A task was delivered: use what it needs; False when there is nothing left for it."""
        if self.room < 1:
            return False
        for scope in self._own:
            if gate := self._gates.get(scope):
                gate.take()
        return True

    def let_pass(self, seconds: float) -> None:
        """For so long keep a place free: a sleeping task had to be put off."""
        self._yielding = time.monotonic() + seconds
        self._moved()

    def released(self) -> None:
        """A task is done with."""
        for scope in self._own:
            if gate := self._gates.get(scope):
                gate.released()

    @property
    def crowded(self) -> bool:
        """Whether more tasks are held here than may be."""
        held = self._held()
        return any(
            gate.limit.concurrency is not None and held > gate.cap
            for scope in self._own
            if (gate := self._gates.get(scope))
        )

    async def enter(self, scopes: Iterable[Scope], patience: float) -> list[Gate] | None:
        """Start something under the rates and concurrencies of these scopes: the gates to leave when it is over; None
        when that was not possible in time."""
        entered: list[Gate] = []
        for scope in scopes:
            gate = self._gate(scope)
            if gate is None:
                continue
            done = False
            try:
                done = await gate.enter(patience)
            finally:
                if not done:
                    for other in entered:
                        other.leave()
            if not done:
                return None
            entered.append(gate)
        return entered

    # -- effects

    async def reserve(self, scopes: Iterable[Scope], cost: Cost, read_only: bool) -> Paid:
        """Reserve what an effect may cost, when it is the turn of its model. Raises BudgetExhausted, Renewing."""
        if not self.known:
            return Paid([], None)
        model = Scope("model", cost.model) if cost.model else None
        gates = await self.enter([model], math.inf) if model else []
        try:
            every = [*self._own, *scopes, *([model] if model else [])]
            return Paid(gates or [], await self.budgets.reserve(every, cost, read_only))
        except BaseException:
            for gate in gates or ():
                gate.leave()
            raise

    def charge(self, scopes: Iterable[Scope], usage: Usage) -> None:
        """An effect has cost what nobody had said before."""
        if self.known:
            every = self.budgets.with_model([*self._own, *scopes], usage)
            self.budgets.charge(every, usage)

    # -- the door

    def refuse(self, headers: dict[str, str], pending: int) -> None:
        """Raise for an ask that would find a budget used up, or that cannot wait so long as the rate makes it: an ask
        says with `Dspex-Wait` or `Dspex-Deadline` how long it can."""
        now = logtime.now()
        for it in self.used_up:
            if it.renews and it.renews <= now:
                continue
            message = f"{it.used:.10g} of {it.of:.10g} {it.resource} of {it.scope} are used"
            if it.renews:
                message += "; try again when the budget renews"
                raise BudgetExhausted(message, it.renews, retry_after=it.renews - now)
            raise BudgetExhausted(f"{message}, and the budget does not renew")
        patience = _patience(headers)
        if patience is None or not self.paced:
            return
        for scope in self._own:
            gate = self._gates.get(scope)
            if gate is None or gate.limit.rate is None:
                continue
            wait = gate.wait + (pending / gate.limit.rate.per_second if not gate.free else 0.0)
            if wait > patience:
                raise LimitExceeded(
                    f"the rate of {scope} is {gate.limit.rate}, and it would be this task's turn in about {wait:.1f} s",
                    retry_after=wait,
                )

    # -- words

    def speak_for(self, client: Client) -> None:
        """Say over another connection what we have, because our loop stands still. We want nothing, for we would not
        hear the answer; and what we have we keep until we hear one."""
        if self._keeper is None:
            return
        said = {str(scope): gate.word() for scope, gate in list(self._gates.items())}
        paces = {scope: replace(pace, want=pace.use, tokens=0) for scope, pace in said.items()}
        ask = Ask(self.holder, self._agent, self._seen, paces, self.budgets.still())
        answer = client.call(self._subject, msgspec.json.encode(ask))
        answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())

    async def _speak(self) -> bool:
        """Say what we have and want, and take the answer; whether there was one."""
        paces = {str(scope): gate.word() for scope, gate in self._gates.items()}
        ask = Ask(self.holder, self._agent, self._seen, paces, self.budgets.words())
        asked = time.monotonic()
        answer = await self._request(ask)
        if answer is None:
            return False
        self._again, self.used_up = answer.again, answer.used_up
        if answer.limits is not None:
            self._change({parse_scope(text): limit_of(texts) for text, texts in answer.limits.items()})
        self._seen = answer.seen
        for text, paced in answer.paces.items():
            if gate := self._gates.get(parse_scope(text)):
                gate.hear(paced, asked, answer.again)
        if self.budgets.hear(ask.leases, answer.leases):
            self._bell.set()
        for scope in [scope for scope, gate in self._gates.items() if gate.quiet]:
            del self._gates[scope]
        return True

    async def _request(self, ask: Ask) -> Answer | None:
        try:
            reply = await self._client.request(self._subject, msgspec.json.encode(ask), timeout=ASK_TIMEOUT)
            if reply.status or h.ERROR_CODE in reply.headers:
                logger.debug("the limiter does not answer: %s", reply.headers.get(h.ERROR, reply.status))
                return None
            return msgspec.json.decode(reply.data, type=Answer)
        except (TimeoutError, ConnectionFailed, *NOT_JSON) as error:
            logger.debug("the limiter does not answer: %s", error)
            return None

    def _change(self, known: dict[Scope, Limit]) -> None:
        """Other limits are in force."""
        for scope in self.known.keys() - known.keys():
            self.budgets.forget(scope)
        self.known = self.budgets.limits = known
        for scope in list(self._gates):
            limit = known.get(scope, Limit())
            if limit.paced:
                self._gates[scope].change(limit)
            else:
                self._gates.pop(scope).change(limit)
        gates = [self._gate(scope) for scope in self._own]
        self.paced = any(gates)
        self.by_caller = any(scope.kind in ("tenant", "study") and limit.paced for scope, limit in known.items())
        self._bell.set()
        for tell in self.on_change:
            tell()

    def _gate(self, scope: Scope) -> Gate | None:
        """The gate of a scope that has a rate or a concurrency."""
        limit = self.known.get(scope)
        if limit is None or not limit.paced:
            return None
        gate = self._gates.get(scope)
        if gate is None:
            if len(self._gates) >= MAX_GATES:
                raise LimitExceeded(f"this process holds to {MAX_GATES:,} rates already")
            own = scope in self._own
            gate = Gate(scope, self._bell.set, self._held if own else None, self._slots)
            gate.on_change.append(self._moved)
            gate.change(limit)
            self._gates[scope] = gate
        return gate

    def _moved(self) -> None:
        for tell in self.on_change:
            tell()


def _patience(headers: dict[str, str]) -> float | None:
    """Seconds that an ask can wait for its turn; None when it does not say. Raises InvalidInput."""
    said = [h.wait_of(headers)] if h.WAIT in headers else []
    deadline = h.deadline_of(headers, logtime.now())
    if deadline is not None:
        said.append(deadline - logtime.now())
    return min(said, default=None)
