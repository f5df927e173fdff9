"""A fenced lease: one holder at a time, and a number that only grows."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest

from dspex.bus import lease as lease_module
from dspex.bus import streams
from dspex.bus.client import Client
from dspex.bus.lease import Lease
from dspex.bus.server import Server
from dspex.core.subjects import Subjects

_numbers = itertools.count()


@pytest.fixture
def subjects() -> Subjects:
    return Subjects(f"lease{next(_numbers)}")


@pytest.fixture
async def client(shared_server: Server, subjects: Subjects) -> AsyncIterator[Client]:
    async with await Client.connect(shared_server.url) as client:
        await streams.ensure_stream(client, streams.lease_stream(subjects))
        yield client


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "TTL", 1.0)
    monkeypatch.setattr(lease_module, "RENEW", 0.2)


async def test_the_first_who_asks_has_it(client: Client, subjects: Subjects) -> None:
    lease = Lease(client, subjects, "role", "a")
    await lease.acquire()
    assert lease.token > 0


async def test_of_many_who_ask_at_once_one_has_it(client: Client, subjects: Subjects) -> None:
    asking = [asyncio.create_task(Lease(client, subjects, "role", f"holder {n}").acquire()) for n in range(10)]
    done, pending = await asyncio.wait(asking, timeout=0.5)
    assert len(done) == 1
    for task in pending:
        task.cancel()


async def test_another_waits_while_it_is_kept(client: Client, subjects: Subjects) -> None:
    first, second = Lease(client, subjects, "role", "a"), Lease(client, subjects, "role", "b")
    await first.acquire()
    keeping = asyncio.create_task(first.keep())
    waiting = asyncio.create_task(second.acquire())
    await asyncio.sleep(2.5)
    assert not waiting.done() and not keeping.done()
    keeping.cancel()
    await asyncio.wait_for(waiting, 10)
    assert second.token > first.token


async def test_another_has_it_at_once_when_it_is_given_back(client: Client, subjects: Subjects) -> None:
    first, second = Lease(client, subjects, "role", "a"), Lease(client, subjects, "role", "b")
    await first.acquire()
    token = first.token
    await first.release()
    await asyncio.wait_for(second.acquire(), 0.9)
    assert second.token > token
    await first.release()  # of what it has not, nothing
    assert (await second._current())[1] == "b"


async def test_the_same_holder_has_it_at_once_and_the_one_before_loses_it(client: Client, subjects: Subjects) -> None:
    """A registrar that was frozen while its successor started must not go on."""
    before, after = Lease(client, subjects, "role", "a"), Lease(client, subjects, "role", "a")
    await before.acquire()
    keeping = asyncio.create_task(before.keep())
    await asyncio.wait_for(after.acquire(), 0.9)
    assert after.token > before.token
    await asyncio.wait_for(keeping, 10)


async def test_a_frozen_holder_finds_that_it_has_lost_it(client: Client, subjects: Subjects) -> None:
    first, second = Lease(client, subjects, "role", "a"), Lease(client, subjects, "role", "b")
    await first.acquire()
    await second.acquire()  # nobody renews it
    await asyncio.wait_for(first.keep(), 10)
    assert second.token > first.token


async def test_tokens_only_grow(client: Client, subjects: Subjects) -> None:
    tokens = []
    for holder in "aabba":
        lease = Lease(client, subjects, "role", holder)
        await lease.acquire()
        tokens.append(lease.token)
        await lease.release()
    assert tokens == sorted(set(tokens))


async def test_two_roles_are_two_leases(client: Client, subjects: Subjects) -> None:
    await Lease(client, subjects, "one", "a").acquire()
    await asyncio.wait_for(Lease(client, subjects, "two", "b").acquire(), 0.9)


async def test_who_cannot_renew_gives_up_before_another_may_take_it(server: Server, subjects: Subjects) -> None:
    async with await Client.connect(server.url) as client:
        await streams.ensure_stream(client, streams.lease_stream(subjects))
        lease = Lease(client, subjects, "role", "a")
        await lease.acquire()
        keeping = asyncio.create_task(lease.keep())
        server.kill()
        await asyncio.wait_for(keeping, 10)
