"""The limiter and those who hold to it, with a log in memory and whatever is lost or dies between them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from contextlib import suppress
from typing import Any

import msgspec
import pytest

from dspex.agents import limiter as module
from dspex.agents.budgets import Budgets
from dspex.agents.limiter import Limiter
from dspex.agents.limits import Limits
from dspex.bus.wire import Message
from dspex.core.audit import Audit
from dspex.core.codec import events_of
from dspex.core.errors import BudgetExhausted, LogError
from dspex.core.events import Event, Usage
from dspex.core.lending import Answer, Ask, Pace, Paced
from dspex.core.limits import Scope, limit_of, parse_scope
from dspex.core.spending import Cost
from dspex.core.subjects import Subjects
from dspex.store.memory import MemoryLog

P = Scope("program", "p")


class Asked:
    """A request, and its answer."""

    def __init__(self, subject: str, body: object) -> None:
        self.message = Message(subject.encode(), b"", b"", None)
        self.data, self.headers = msgspec.json.encode(body), {"Dspex-Actor": "me"}
        self.answer: Any = None

    def respond(self, data: bytes) -> None:
        self.answer = data


async def limiter_of(log: MemoryLog, fresh: bool = True, **limits: dict[str, str]) -> Limiter:
    made = Limiter(log, Subjects(), "/registrar/r", lambda words: None)
    await made.recall(fresh=fresh)
    await made.configure(limits, 4e9, fresh=fresh)
    return made


async def say(limiter: Limiter, ask: Ask, program: str = "p") -> Answer:
    asked: Any = Asked(f"dspex.limits.lease.{program}", ask)
    await limiter._lend(asked)
    return msgspec.json.decode(asked.answer, type=Answer)


async def told(log: MemoryLog) -> list[Event]:
    return [event for entry in await log.scan(0, 10_000) for event in events_of(entry, Subjects())]


class Holder:
    """An agent's budgets, which speak with a limiter whenever they have something to say, until it dies."""

    def __init__(self, name: str, bank: Bank) -> None:
        self.bank, self.name = bank, name
        self.bell = asyncio.Event()
        self.budgets = Budgets(name, self.bell.set)
        self.budgets.limits = bank.limits
        self.talk = asyncio.create_task(self._talk())
        self.work: list[asyncio.Task[None]] = []

    async def _talk(self) -> None:
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.bell.wait(), 0.02)
            self.bell.clear()
            said = self.budgets.words()
            try:
                answer = await say(self.bank.limiter, Ask(self.name, "p-1", leases=said))
            except LogError:
                continue
            if self.bank.random.random() < 0.9 and self.budgets.hear(said, answer.leases):  # or it is lost
                self.bell.set()

    async def perform(self, cost: Cost, usd: float) -> None:
        """One effect, from its reservation to its end."""
        try:
            reserved = await self.budgets.reserve([P], cost, False)
        except BudgetExhausted:
            return
        self.bank.paid.append(usd)
        await asyncio.sleep(self.bank.random.random() * 0.01)
        reserved.settle(Usage(usd, 0, 1))

    def die(self) -> None:
        for task in (self.talk, *self.work):
            task.cancel()


class Bank:
    def __init__(self, seed: int, limiter: Limiter) -> None:
        self.random, self.limiter = random.Random(seed), limiter
        self.limits, self.paid = limiter.limits, list[float]()


@pytest.mark.parametrize("seed", range(6))
async def test_a_budget_is_never_exceeded_nobody_waits_for_ever_and_all_adds_up(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TTL", 0.2)
    monkeypatch.setattr(module, "SETTLE", 0.1)
    monkeypatch.setattr(module, "AGAIN", 0.1)
    log = MemoryLog()
    bank = Bank(seed, await limiter_of(log, p={"usd": "1", "calls": "500"}))
    burying = asyncio.create_task(bank.limiter.work())
    holders = [Holder(f"p-{n}-a", bank) for n in range(3)]
    for number in range(120):
        holder = holders[number % 3]
        most = bank.random.choice([0.01, 0.02, 0.05])
        usd = round(most * bank.random.random(), 4)
        holder.work.append(asyncio.create_task(holder.perform(Cost(most), usd)))
        if number == 50:  # it dies with whatever is under way
            holders[0].die()
            holders[0] = Holder("p-0-b", bank)
        if number == 80:  # and so does the limiter
            burying.cancel()
            bank.limiter = await limiter_of(log, fresh=False)
            burying = asyncio.create_task(bank.limiter.work())
        await asyncio.sleep(0.001)
    async with asyncio.timeout(60):
        await asyncio.gather(*(task for holder in holders for task in holder.work), return_exceptions=True)
    for holder in holders:
        last = holder.budgets.last_words()
        await say(bank.limiter, Ask(holder.name, "p-1", leases=last, gone=True))
        holder.die()
    burying.cancel()
    assert sum(bank.paid) <= 1.0 + 1e-6
    assert len(bank.paid) > 20
    found = Audit()
    for event in await told(log):
        found.add(event)
    assert found.end() == []
    assert found.settled("p", "usd") >= sum(bank.paid) - 1e-6


async def test_what_was_spent_beyond_a_reservation_or_without_one_is_lent_afterwards() -> None:
    log = MemoryLog()
    bank = Bank(0, await limiter_of(log, p={"usd": "1"}))
    holder = Holder("p-1-a", bank)
    bank.random.random = lambda: 0.5  # type: ignore[method-assign]  # nothing is lost
    reserved = await holder.budgets.reserve([P], Cost(0.1), False)
    reserved.settle(Usage(0.7, 0, 1))
    holder.budgets.charge([P], Usage(0.4, 0, 1))
    with pytest.raises(BudgetExhausted, match=r"1\.1 of 1 usd of p are used"):
        async with asyncio.timeout(30):
            while True:
                await (await _later(holder)).budgets.reserve([P], Cost(0.1), False)
    holder.die()
    overrun = [event.data for event in await told(log) if event.type == "BudgetLeased" and event.data.overrun]  # type: ignore[attr-defined]
    assert overrun


async def _later(holder: Holder) -> Holder:
    await asyncio.sleep(0.05)
    return holder


async def test_a_second_answer_to_the_same_word_lends_nothing_more() -> None:
    log = MemoryLog()
    limiter = await limiter_of(log, p={"usd": "1"})
    budgets = Budgets("p-1-a", lambda: None)
    budgets.limits = limiter.limits
    waiting = asyncio.create_task(budgets.reserve([P], Cost(0.5), False))
    await asyncio.sleep(0)
    word = Ask("p-1-a", "p-1", leases=budgets.words())
    first, second = await say(limiter, word), await say(limiter, word)
    assert first.leases.keys() == second.leases.keys()
    assert [lent.granted for lent in (*first.leases.values(), *second.leases.values())] == [0.5, 0.5]
    budgets.hear(word.leases, second.leases)
    await waiting


async def test_a_limiter_that_begins_anew_gives_no_permits_before_all_have_spoken(monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog()
    old = await limiter_of(log, p={"concurrency": "3"})
    assert (await say(old, Ask("p-1-a", "p-1", paces={"p": Pace(want=3)}))).paces["p"].cap == 3
    monkeypatch.setattr(module, "SETTLE", 0.2)
    new = await limiter_of(log, fresh=False)
    assert (await say(new, Ask("p-2-a", "p-2", paces={"p": Pace(want=3)}))).paces["p"].cap == 0
    assert (await say(new, Ask("p-1-a", "p-1", paces={"p": Pace(have=3, use=3, want=3)}))).paces["p"].cap == 2
    await asyncio.sleep(0.25)
    assert (await say(new, Ask("p-2-a", "p-2", paces={"p": Pace(want=3)}))).paces["p"].cap == 0
    assert (await say(new, Ask("p-1-a", "p-1", paces={"p": Pace(have=2, use=1, want=3)}))).paces["p"].cap == 2
    assert (await say(new, Ask("p-2-a", "p-2", paces={"p": Pace(want=3)}))).paces["p"].cap == 1


async def test_a_configuration_counts_once_and_what_a_person_sets_after_it_stays() -> None:
    log = MemoryLog()
    limiter = await limiter_of(log)
    await limiter.configure({"p": {"usd": "5/day"}}, 0.0, fresh=True)
    asked: Any = Asked("dspex.limits.set", {"scope": "p", "limits": {"usd": "6/day", "rate": "3/s"}, "why": "more"})
    await limiter._change(asked)
    assert json.loads(asked.answer)["limits"] == {"rate": "3/s", "usd": "6/day"}
    again = await limiter_of(log, fresh=False)
    await again.configure({"p": {"usd": "5/day"}}, 0.0, fresh=False)  # the same configuration, the registrar anew
    assert again.limits[P] == limit_of({"usd": "6/day", "rate": "3/s"})
    await again.configure({"p": {"usd": "5/day"}}, 4e9, fresh=False)  # a later `up`
    assert again.limits[P] == limit_of({"usd": "5/day"})
    sets = [event for event in await told(log) if event.type == "LimitSet"]
    assert [(event.data.who, event.data.why) for event in sets] == [  # type: ignore[attr-defined]
        ("dspex.toml", ""), ("me", "more"), ("dspex.toml", ""),
    ]  # fmt: skip


async def test_an_agent_hears_only_of_limits_that_may_concern_it_and_speaks_for_no_other_program() -> None:
    texts = {"usd": "1/day"}
    limiter = await limiter_of(
        MemoryLog(), **{"p": texts, "q": texts, "agent:p-1": texts, "agent:p-2": texts, "model:m": texts}
    )
    answer = await say(limiter, Ask("p-1-a", "p-1"))
    assert answer.limits and {parse_scope(text) for text in answer.limits} == {
        P, Scope("agent", "p-1"), Scope("model", "m"),
    }  # fmt: skip
    assert (await say(limiter, Ask("p-1-a", "p-1", seen=answer.seen))).limits is None
    with pytest.raises(Exception, match="is no agent of q"):
        await say(limiter, Ask("p-1-a", "p-1"), program="q")


async def test_who_stands_still_says_what_it_has_now_and_not_what_it_had_when_it_last_spoke() -> None:
    """A permit that came with the last answer, and a task that took it, were in no word of ours yet."""
    held, sent = 0, list[Ask]()

    class Other:
        def call(self, subject: str, word: bytes) -> asyncio.Future[None]:
            sent.append(msgspec.json.decode(word, type=Ask))
            answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            answer.set_result(None)
            return answer

    client: Any = Other()
    limits = Limits(client, Subjects(), "p", "p-1", 4, lambda: held)
    limits._change({P: limit_of({"concurrency": "1"})})
    gate = limits._gates[P]
    assert gate.word().have == 0
    gate.hear(Paced(cap=1), time.monotonic(), 1.0)
    held = 1
    limits._keeper = asyncio.create_task(asyncio.sleep(0))
    limits.speak_for(client)
    [said] = sent
    assert said.paces["p"] == Pace(have=1, want=1, use=1)
    log = MemoryLog()
    limiter = await limiter_of(log, p={"concurrency": "1"})
    await say(limiter, Ask(limits.holder, "p-1", paces={"p": Pace(want=4)}))
    await say(limiter, said)
    assert (await say(limiter, Ask("p-2-a", "p-2", paces={"p": Pace(want=4)}))).paces["p"].cap == 0
