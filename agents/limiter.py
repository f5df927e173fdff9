"""The limiter: lends parts of every limit to the processes that hold to it. It lives in the registrar, under its lease.

The truth about budgets is in the log: every loan is written before it is told. Rates and permits are only in memory;
a limiter that begins anew gives out none until all who live have said what they have.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dspex.agents import logtime
from dspex.agents.books import Books, leased, reached, settled
from dspex.agents.journal import events_for, record
from dspex.bus.service import Endpoint, Request, Service
from dspex.core import headers as h
from dspex.core.codec import NOT_JSON, decode_commit
from dspex.core.errors import InvalidInput, LimitExceeded, LogError, NotFound
from dspex.core.events import Head, LimitCleared, LimitSet, Payload
from dspex.core.leases import Bucket, Ledger, LimitsState, Shares
from dspex.core.leases import limits as limits_fold
from dspex.core.lending import Answer, Ask, Claim, Lent, Pace, Paced, UsedUp
from dspex.core.limits import (
    BUDGETS,
    Amount,
    Limit,
    Scope,
    limit_of,
    parse_pairs,
    parse_scope,
    total,
    window_of,
)
from dspex.core.ports import Log
from dspex.core.subjects import Subjects

__all__ = ["AGAIN", "TTL", "Limiter"]

logger = logging.getLogger("dspex.agents")

AGAIN = 1.0
"""Seconds between the words of a holder; up to twice as many when there are more than `CROWD`."""
TTL = 5.0
"""So many of these times without a word, and a holder is taken for dead."""
CROWD = 200
SETTLE = 2.5
"""Seconds in which a limiter that begins anew hears what holders have, before it gives out more; none is silent for so
long."""
PIECE = 0.25
"""Seconds' worth of a rate that are lent at once, to all holders together."""
MAX_LIMITS = 1000
"""Scopes with limits."""
MAX_HOLDERS = 10_000
MAX_WORDS = 500


@dataclass
class _Flow:
    """The rate and concurrency of one scope."""

    bucket: Bucket = field(default_factory=Bucket)
    shares: Shares = field(default_factory=Shares)
    seen: dict[str, float] = field(default_factory=dict)
    window: str = ""
    count: int = 0
    settled: float = 0.0
    """Until then nobody gets more permits than he has: those of before the limit was set are still to be told."""


class Limiter:
    """Lends limits, and takes back what is not used. `on_reached` hears of alerts, in words."""

    def __init__(self, log: Log, subjects: Subjects, source: str, on_reached: Callable[[str], None]) -> None:
        self._log, self._subjects, self._source = log, subjects, source
        self._books = Books(log, source, on_reached)
        self.limits: dict[Scope, Limit] = {}
        self._states: dict[Scope, LimitsState] = {}
        self._seen = 0
        self._flows: dict[Scope, _Flow] = {}
        self._holders: dict[str, float] = {}
        self._settled = math.inf
        self._changing = asyncio.Lock()

    # -- life

    async def recall(self, *, fresh: bool) -> None:
        """Read what the log has of limits and of the budgets that count now. `fresh`: nobody can have anything from a
        limiter before."""
        after = 0
        states: dict[str, LimitsState] = {}
        while entries := await self._log.scan(after, 1000, self._subjects.event("limits.*.*")):
            for entry in entries:
                events = decode_commit(entry.body, entry.position)
                name = events[0].aggregate
                states[name] = limits_fold(events, states.get(name))
                self._seen = entry.position
            after = entries[-1].position
        for state in states.values():
            scope = parse_scope(state.scope)
            self._states[scope] = state
            if state.limits:
                self.limits[scope] = limit_of(state.limits)
        for scope, limit in self.limits.items():
            for resource in BUDGETS:
                if (amount := limit.budget(resource)) is not None:
                    book = await self._books.open(scope, resource, window_of(amount.unit, logtime.now()).id)
                    for holder in book.ledger.state.holders.values():
                        self._holders[holder] = time.monotonic()
        self._settled = time.monotonic() + (0.0 if fresh else SETTLE)

    async def configure(self, wanted: Mapping[str, Mapping[str, str]], since: float, *, fresh: bool) -> None:
        """Set the limits of a configuration that is in force from a time on (seconds since the epoch), unless somebody
        has set others after that."""
        for text, texts in wanted.items():
            scope, limit = parse_scope(text), limit_of(texts)
            state = self._states.get(scope, LimitsState())
            if state.time and _seconds(state.time) > since:
                continue
            if self.limits.get(scope, Limit()) != limit:
                await self._set(scope, limit, who="dspex.toml", why="", settle=0.0 if fresh else SETTLE)

    def serve(self, service: Service) -> None:
        """Answer holders and people."""
        for verb, handler in (("ls", self._tell), ("set", self._change), ("clear", self._clear)):
            service.serve(Endpoint(f"limits-{verb}", self._subjects.limits(verb), handler))
        service.serve(Endpoint("limits-lease", self._subjects.limits("lease.*"), self._lend))

    async def work(self) -> None:
        """Take back what the dead have, all the time."""
        looked = time.monotonic()
        while True:
            await asyncio.sleep(AGAIN / 2)
            now = time.monotonic()
            pause, looked = now - looked, now
            if pause > 2 * AGAIN:  # we stood still, and have heard nobody meanwhile
                self._holders = {holder: seen + pause for holder, seen in self._holders.items()}
            try:
                await self._bury(now)
            except LogError as error:
                logger.warning("what dead holders had of budgets could not be settled; trying again: %s", error)

    async def _bury(self, now: float) -> None:
        dead = {holder for holder, seen in self._holders.items() if now - seen > TTL * self._again}
        for flow in self._flows.values():
            for holder in dead:
                flow.shares.drop(holder)
            flow.seen = {holder: seen for holder, seen in flow.seen.items() if now - seen <= TTL * self._again}
        if now >= self._settled:
            await self._books.bury(lambda holder: holder in dead or holder not in self._holders)
        for holder in dead:
            del self._holders[holder]

    @property
    def _again(self) -> float:
        return AGAIN * min(max(1.0, len(self._holders) / CROWD), 2.0)

    # -- lending

    async def _lend(self, request: Request) -> None:
        """A holder says what it has and wants."""
        try:
            ask = msgspec.json.decode(request.data, type=Ask)
        except NOT_JSON as error:
            raise InvalidInput(f"the word of a holder is not understood: {error}") from None
        program = request.message.subject.rpartition(".")[2]
        if not (ask.holder.startswith(f"{program}-") and ask.agent.startswith(f"{program}-")):
            raise InvalidInput(f"{ask.holder[:80]} is no agent of {program[:80]}")
        if ask.holder not in self._holders and len(self._holders) >= MAX_HOLDERS:
            raise LimitExceeded(f"{MAX_HOLDERS:,} processes hold to limits already", retry_after=TTL)
        self._holders[ask.holder] = time.monotonic()
        answer = Answer(seen=self._seen, again=self._again)
        mine = {scope: limit for scope, limit in self.limits.items() if _concerns(scope, program, ask.agent)}
        if ask.seen != self._seen:
            answer.limits = {str(scope): limit.texts() for scope, limit in mine.items()}
        for scope, limit in mine.items():
            if limit.paced and (pace := ask.paces.get(str(scope))) and not ask.gone:
                answer.paces[str(scope)] = await self._pace(scope, limit, ask.holder, pace)
        for lease, claim in ask.leases.items():
            answer.leases[lease] = await self._account(ask.holder, lease, claim)
        if ask.gone:
            for flow in self._flows.values():
                flow.shares.drop(ask.holder)
                flow.seen.pop(ask.holder, None)
            self._holders.pop(ask.holder, None)
        answer.used_up = [
            it for scope in (Scope("program", program), Scope("agent", ask.agent)) for it in self._used_up(scope)
        ]
        request.respond(msgspec.json.encode(answer))

    async def _pace(self, scope: Scope, limit: Limit, holder: str, pace: Pace) -> Paced:
        flow = self._flows.setdefault(scope, _Flow())
        now, ripe = logtime.now(), time.monotonic() >= max(self._settled, flow.settled)
        flow.seen[holder] = time.monotonic()
        paced = Paced()
        if limit.concurrency is not None:
            paced.cap = flow.shares.ask(
                holder, limit.concurrency, have=pace.have, want=pace.want, use=pace.use, now=now, more=ripe
            )
            await self._alert(scope, "concurrency", Amount(limit.concurrency, "hour"), flow.shares.use)
        if limit.rate is not None:
            rate, bucket = limit.rate, flow.bucket
            bucket.empty_at = max(bucket.empty_at, min(pace.empty_at, now + 86_400))
            if pace.tokens > 0 and time.monotonic() >= self._settled:
                piece = int(rate.per_second * PIECE / len(flow.seen))
                paced.tokens = min(pace.tokens, max(piece, 1))
                paced.after = bucket.take(rate, paced.tokens, now)
                await self._count(scope, flow, rate, paced, now)
            paced.empty_at = bucket.empty_at if bucket.empty_at > 0 else 0.0
        return paced

    async def _count(self, scope: Scope, flow: _Flow, rate: Amount, paced: Paced, now: float) -> None:
        """Count the tokens of one unit of time, to tell when the rate is nearly used up."""
        window = window_of(rate.unit, now + paced.after).id
        flow.count = paced.tokens + (flow.count if flow.window == window else 0)
        flow.window = window
        await self._alert(scope, "rate", Amount(rate.count, "hour"), flow.count)

    async def _alert(self, scope: Scope, limit: str, of: Amount, used: float) -> None:
        """Tell, once a window (`of.unit`), that a rate or concurrency is used up or nearly so."""
        if used < of.count * 0.8 - 1e-9:
            return
        try:
            book = await self._books.open(scope, limit, window_of(of.unit, logtime.now()).id)
            async with book.lock:
                await self._books.write(book, reached(book, used, of.count))
        except LogError as error:
            logger.warning("an alert could not be written: %s", error)

    async def _account(self, holder: str, lease: str, claim: Claim) -> Lent:
        """One lease of a budget: take note of what it has spent, and lend it more, or take back the rest."""
        scope = parse_scope(claim.scope)
        if claim.resource not in BUDGETS:
            raise InvalidInput(f"{claim.resource[:40]!r} is no budget")
        limit = self.limits.get(scope)
        amount = limit.budget(claim.resource) if limit else None
        now = logtime.now()
        current = window_of(amount.unit, now) if amount else None
        window = claim.window or (current.id if current else "")
        if not window:
            return Lent(over=True)
        book = await self._books.open(scope, claim.resource, window)
        async with book.lock:
            ledger = book.ledger
            if claim.window and lease not in ledger.state.open:
                return Lent(window=window, over=True)  # settled already: whoever was taken for dead begins anew
            ledger.report(lease, claim.used, claim.reserved)
            payloads: list[Payload] = []
            of = amount.count if amount else 0.0
            if claim.used > ledger.state.open.get(lease, 0.0) + 1e-9:
                more = total([claim.used, -ledger.state.open.get(lease, 0.0)])
                payloads.append(leased(book, lease, holder, more, of, overrun=True))
            if claim.close:
                if payloads or lease in ledger.state.open:
                    payloads.append(settled(book, lease, claim.used, False))
                await self._books.write(book, payloads, of=of)
                return Lent(window=window, over=True)
            if amount is None or current is None or current.id != window:
                await self._books.write(book, payloads)
                return Lent(window=window, granted=ledger.state.open.get(lease, 0.0), over=True)
            await self._books.write(book, payloads)
            decision = ledger.decide(lease, claim.want, amount.count, whole=claim.resource != "usd")
            payloads = []
            more = total([decision.granted, -ledger.state.open.get(lease, 0.0)])
            if more > 0:
                payloads.append(leased(book, lease, holder, more, amount.count))
            await self._books.write(book, payloads, of=amount.count, refused=decision.refused == "exhausted")
            book.waits = decision.refused == "wait" or (book.waits and not payloads)
            return Lent(
                window=window, granted=ledger.state.open.get(lease, 0.0), refused=decision.refused,
                left=None if math.isinf(current.end) else current.end - now, used=ledger.used, of=amount.count,
                renews=0.0 if math.isinf(current.end) else current.end, close=book.waits and not claim.reserved,
            )  # fmt: skip

    def _used_up(self, scope: Scope) -> list[UsedUp]:
        """The budgets of a scope of which nothing is left and for which tasks do not wait."""
        limit, found = self.limits.get(scope), list[UsedUp]()
        if limit is None or limit.when_exhausted == "wait":
            return found
        for resource in BUDGETS:
            if (amount := limit.budget(resource)) is None:
                continue
            window = window_of(amount.unit, logtime.now())
            book = self._books.at(scope, resource, window.id)
            if book and book.ledger.used >= amount.count - 1e-9:
                renews = 0.0 if math.isinf(window.end) else window.end
                found.append(UsedUp(str(scope), resource, book.ledger.used, amount.count, renews))
        return found

    # -- people

    async def _change(self, request: Request) -> None:
        """`{"scope", "limits", "why"}`: put what is given in the place of what is in force."""
        wanted = _decoded(request.data)
        scope = parse_scope(wanted.scope)
        async with self._changing:
            limit = parse_pairs(wanted.limits, self.limits.get(scope, Limit()))
            if limit == Limit() or not wanted.limits:
                raise InvalidInput(f"no limit was given for {scope}; e.g. rate=20/s, or `dspex limits clear {scope}`")
            if scope not in self.limits and len(self.limits) >= MAX_LIMITS:
                raise LimitExceeded(f"{MAX_LIMITS:,} scopes have limits already")
            await self._set(scope, limit, who=_who(request), why=wanted.why)
        request.respond(msgspec.json.encode(self._row(scope)))

    async def _clear(self, request: Request) -> None:
        """`{"scope"}`: it has no limits any more."""
        wanted = _decoded(request.data)
        scope = parse_scope(wanted.scope)
        async with self._changing:
            if scope not in self.limits:
                raise NotFound(f"{scope} has no limits")
            await self._record(scope, LimitCleared(scope=str(scope), who=_who(request), why=wanted.why))
            del self.limits[scope]
            self._flows.pop(scope, None)
        request.respond(msgspec.json.encode(self._row(scope)))

    async def _set(self, scope: Scope, limit: Limit, *, who: str, why: str, settle: float = SETTLE) -> None:
        before = self.limits.get(scope, Limit())
        await self._record(scope, LimitSet(scope=str(scope), limits=limit.texts(), who=who, why=why))
        self.limits[scope] = limit
        flow = self._flows.setdefault(scope, _Flow())
        if before.rate != limit.rate:
            flow.bucket = Bucket()
        if before.concurrency is None and limit.concurrency is not None:
            flow.settled = time.monotonic() + settle

    async def _record(self, scope: Scope, payload: LimitSet | LimitCleared) -> None:
        head = await record(self._log, scope.aggregate, [payload], source=self._source)
        self._seen = max(self._seen, head.position)
        state = self._states.get(scope, LimitsState())
        self._states[scope] = limits_fold(events_for(scope.aggregate, Head(), [payload], source=self._source), state)

    async def _tell(self, request: Request) -> None:
        """All limits and how much of each is used."""
        for scope, limit in list(self.limits.items()):  # a budget nobody has asked for since we began
            for resource in BUDGETS:
                if (amount := limit.budget(resource)) is not None:
                    await self._books.open(scope, resource, window_of(amount.unit, logtime.now()).id)
        rows = [self._row(scope) for scope in sorted(self.limits, key=str)]
        request.respond(msgspec.json.encode({"limits": rows}))

    def _row(self, scope: Scope) -> dict[str, Any]:
        limit, state, now = self.limits.get(scope, Limit()), self._states.get(scope, LimitsState()), logtime.now()
        used: dict[str, dict[str, Any]] = {}
        flow = self._flows.get(scope, _Flow())
        if limit.rate:
            window = window_of(limit.rate.unit, now)
            used["rate"] = {"used": flow.count if flow.window == window.id else 0, "of": limit.rate.count,
                            "renews": None}  # fmt: skip
        if limit.concurrency is not None:
            used["concurrency"] = {"used": flow.shares.use, "of": limit.concurrency, "renews": None}
        for resource in BUDGETS:
            if (amount := limit.budget(resource)) is not None:
                window = window_of(amount.unit, now)
                book = self._books.at(scope, resource, window.id)
                ledger = book.ledger if book else Ledger()
                used[resource] = {
                    "used": ledger.used, "of": amount.count, "lent": total([ledger.state.committed, -ledger.used]),
                    "assumed": ledger.state.assumed, "renews": None if math.isinf(window.end) else window.end,
                }  # fmt: skip
        return {
            "scope": str(scope), "limits": limit.texts(), "used": used, "who": state.who, "why": state.why,
            "since": state.time,
        }  # fmt: skip


class _Wanted(msgspec.Struct, forbid_unknown_fields=True):
    scope: str
    limits: dict[str, str] = {}
    why: str = ""


def _decoded(body: bytes) -> _Wanted:
    try:
        wanted = msgspec.json.decode(body, type=_Wanted)
    except NOT_JSON as error:
        raise InvalidInput(f"the request is not understood: {error}") from None
    return msgspec.structs.replace(wanted, why=wanted.why[:MAX_WORDS])


def _who(request: Request) -> str:
    return str(request.headers.get(h.ACTOR, ""))[:MAX_WORDS]


def _concerns(scope: Scope, program: str, agent: str) -> bool:
    """Whether an agent may have to hold to the limits of a scope."""
    return scope.kind in ("tenant", "study", "model") or scope in (Scope("program", program), Scope("agent", agent))


def _seconds(text: str) -> float:
    from datetime import datetime

    return datetime.fromisoformat(text).timestamp()
