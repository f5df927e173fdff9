"""The breakers of several agents that share a log and a bus: what they agree on when they race, or the log is away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from pydantic import TypeAdapter

from dspex import Breaker, BreakerOpen
from dspex.agents.breakers import Breakers
from dspex.bus.client import Client
from dspex.bus.server import Server
from dspex.core.codec import decode_commit
from dspex.core.effects import Call
from dspex.core.errors import LogError
from dspex.core.events import Event, Head
from dspex.core.ports import Appended, Conflict, Entry
from dspex.core.subjects import Subjects
from dspex.store.memory import MemoryLog


class Log(MemoryLog):
    """One that may be away."""

    away = False

    async def append(self, aggregate: str, events: Sequence[Event], expected: Head) -> Appended | Conflict:
        await asyncio.sleep(0)
        if self.away:
            raise LogError("the log is away")
        return await super().append(aggregate, events, expected)

    async def last(self, aggregate: str) -> Entry | None:
        await asyncio.sleep(0)
        if self.away:
            raise LogError("the log is away")
        return await super().last(aggregate)

    async def changes(self) -> list[str]:
        entries = await self.read("breaker.p.pay")
        return [event.type for entry in entries for event in decode_commit(entry.body, entry.position)]


Make = Callable[[], Breakers]
prefixes = iter(f"b{number}" for number in range(1000))


@pytest.fixture
async def agents(shared_server: Server) -> AsyncIterator[tuple[Log, list[Breakers]]]:
    """Five agents of one program."""
    log, subjects = Log(), Subjects(next(prefixes))
    clients = [await Client.connect(shared_server.url) for _ in range(5)]
    yield log, [Breakers(client, log, subjects, "p", f"a{n}") for n, client in enumerate(clients)]
    for client in clients:
        await client.close()


def call(act: Callable[[], Any], plain: Callable[[], Any] | None = None, **options: Any) -> Call:
    breaker = Breaker(**{"min_calls": 10, "open_for": 0.2, "window": "10m", **options})

    async def acting() -> Any:
        return act()

    return Call("k", "pay", "d", acting, TypeAdapter(Any), breaker=breaker, plain=plain)


def fails() -> None:
    raise ConnectionError("down")


async def tried(breakers: Breakers, what: Call) -> str:
    """How a call went."""
    try:
        return str(await breakers.run(what))
    except BreakerOpen:
        return "refused"
    except Exception as error:
        return type(error).__name__


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def states(agents: list[Breakers]) -> list[str]:
    return [stats["state"] for breakers in agents for stats in breakers.stats()]


async def test_failures_that_are_spread_open_it_for_all_with_one_event(agents: tuple[Log, list[Breakers]]) -> None:
    log, five = agents
    failing = call(fails, open_for=3600)
    for _ in range(2):
        for breakers in five:
            assert await tried(breakers, failing) == "ConnectionError"
    await until(lambda: states(five) == ["open"] * 5)
    assert [await tried(breakers, failing) for breakers in five] == ["refused"] * 5
    assert all(breakers.refusal(failing) for breakers in five), "it is known without a look"
    await until(lambda: not any(breakers._beside for breakers in five))
    assert await log.changes() == ["BreakerOpened"], "one of them was first, and the others gave way"


async def test_agents_that_race_make_no_more_trial_calls_than_the_quota(agents: tuple[Log, list[Breakers]]) -> None:
    log, five = agents
    for _ in range(10):
        await tried(five[0], call(fails))
    await until(lambda: states(five) == ["open"])
    await asyncio.sleep(0.2)
    release, made = asyncio.Event(), 0

    async def slow() -> str:
        nonlocal made
        made += 1
        await release.wait()
        return "paid"

    trial = Call("k", "pay", "d", slow, TypeAdapter(Any), breaker=call(fails, half_open=3).breaker)
    racing = [asyncio.create_task(tried(breakers, trial)) for breakers in five for _ in range(4)]
    await until(lambda: sum(task.done() for task in racing) == 17)
    assert made == 3
    release.set()
    ends = await asyncio.gather(*racing)
    assert (ends.count("paid"), ends.count("refused")) == (3, 17)
    await until(lambda: set(states(five)) == {"closed"})
    assert (await log.changes())[-1] == "BreakerClosed"
    assert [await tried(breakers, call(lambda: "paid")) for breakers in five] == ["paid"] * 5


async def test_while_the_log_is_away_calls_go_on_and_the_one_that_saw_too_much_stops(
    agents: tuple[Log, list[Breakers]],
) -> None:
    log, [first, second, *_] = agents
    log.away = True
    for _ in range(9):
        assert await tried(first, call(fails, open_for=3600)) == "ConnectionError"
    log.away = False
    assert await tried(second, call(lambda: "paid")) == "paid"
    for _ in range(10):  # what was counted while nobody could say where it stood counts still
        await tried(first, call(fails, open_for=3600))
        if await log.changes():
            break
    await until(lambda: "open" in states([first]) and "open" in states([second]))


async def test_an_event_that_could_not_be_written_is_written_later(agents: tuple[Log, list[Breakers]]) -> None:
    log, [first, *_] = agents
    failing = call(fails, open_for=3600)
    for _ in range(9):
        await tried(first, failing)
    log.away = True
    await tried(first, failing)
    assert first.refusal(failing), "whoever saw it stops at once"
    await asyncio.sleep(0.05)
    log.away = False
    async with asyncio.timeout(30):
        while not await log.changes():
            await tried(first, failing)
            await asyncio.sleep(0.01)
    assert await log.changes() == ["BreakerOpened"]


async def test_a_cancelled_call_counts_as_nothing_and_gives_its_permit_back(agents: tuple[Log, list[Breakers]]) -> None:
    _, [first, *_] = agents
    for _ in range(10):
        await tried(first, call(fails, half_open=1))
    await until(lambda: states([first]) == ["open"])
    await asyncio.sleep(0.2)

    async def never() -> None:
        await asyncio.Event().wait()

    held = Call("k", "pay", "d", never, TypeAdapter(Any), breaker=call(fails, half_open=1).breaker)
    trying = asyncio.create_task(first.run(held))
    await until(lambda: states([first]) == ["half_open"])
    assert await tried(first, call(lambda: "paid", half_open=1)) == "refused"
    trying.cancel()
    async with asyncio.timeout(30):
        while await tried(first, call(lambda: "paid", half_open=1)) != "paid":
            await asyncio.sleep(0.01)
    await until(lambda: states([first]) == ["closed"])


async def test_a_thread_that_is_left_behind_is_counted_until_it_ends(agents: tuple[Log, list[Breakers]]) -> None:
    _, [first, *_] = agents
    release = threading.Event()
    slow = call(fails, plain=lambda: release.wait(60), timeout=0.05)
    ends = await asyncio.gather(*(tried(first, slow) for _ in range(3)))
    assert ends == ["TimeoutError"] * 3 and first.abandoned == 3
    release.set()
    await until(lambda: first.abandoned == 0)
    assert await tried(first, call(fails, plain=lambda: "in time", timeout=30)) == "in time"
    assert await tried(first, call(fails, plain=fails, timeout=30)) == "ConnectionError"


async def test_an_async_effect_that_does_not_heed_its_end_is_left_behind(agents: tuple[Log, list[Breakers]]) -> None:
    _, [first, *_] = agents
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    kept = Call("k", "pay", "d", stubborn, TypeAdapter(Any), breaker=Breaker(timeout=0.05))
    assert await tried(first, kept) == "TimeoutError"
    assert first.abandoned == 1
    release.set()
    await until(lambda: first.abandoned == 0)


async def test_slow_calls_open_it_too(agents: tuple[Log, list[Breakers]]) -> None:
    log, [first, *_] = agents
    slow = call(lambda: time.sleep(0.02), slow_after=0.01, slow_rate=0.8, open_for=3600)
    for _ in range(10):
        await tried(first, slow)
    assert await tried(first, slow) == "refused"
    await until(lambda: not first._beside)
    [entry] = await log.read("breaker.p.pay")
    [event] = decode_commit(entry.body, entry.position)
    assert event.data.reason == "slow" and event.data.slow == 10  # type: ignore[union-attr]
