"""Pulling: never more than there are slots, and on again after whatever happens to the consumer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from dspex.bus.client import Client, Message
from dspex.bus.pull import ACK, NAK, Delivery, Puller
from dspex.bus.server import Server
from dspex.core.errors import ConnectionFailed

CONSUMER = {"durable_name": "c", "ack_policy": "explicit", "ack_wait": 500_000_000, "max_deliver": -1}


async def until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


async def api(client: Client, verb: str, body: object = None) -> dict[str, Any]:
    reply = await client.request(f"$JS.API.{verb}", b"" if body is None else json.dumps(body).encode())
    answer: dict[str, Any] = json.loads(reply.data)
    assert "error" not in answer, answer
    return answer


async def make_consumer(client: Client) -> None:
    await api(client, "CONSUMER.DURABLE.CREATE.S.c", {"stream_name": "S", "config": CONSUMER})


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    async with await Client.connect(server.url) as client:
        await api(client, "STREAM.CREATE.S", {"name": "S", "subjects": ["s"], "storage": "file"})
        await make_consumer(client)
        yield client


class Work:
    """Deliveries as they come, and how many were held at once."""

    def __init__(self, client: Client, slots: int) -> None:
        self.client, self.held, self.most = client, 0, 0
        self.came: list[Delivery] = []
        self.done: set[int] = set()
        self.puller = Puller(client, "S", "c", slots, self.take)

    def take(self, delivery: Delivery) -> None:
        self.came.append(delivery)
        self.held += 1
        self.most = max(self.most, self.held)

    def finish(self, delivery: Delivery, word: bytes = ACK) -> None:
        self.client.acknowledge(delivery.message, word)
        self.done.add(delivery.position)
        self.held -= 1
        self.puller.release()

    def take_and_finish(self, delivery: Delivery) -> None:
        self.take(delivery)
        asyncio.get_running_loop().call_soon(self.finish, delivery)


@pytest.fixture
async def work(client: Client) -> AsyncIterator[Work]:
    work = Work(client, slots=5)
    yield work
    work.puller.stop()


async def fill(client: Client, count: int) -> None:
    for _ in range(count):
        assert (await client.request("s", b"x")).data


async def test_it_holds_no_more_than_its_slots(client: Client, work: Work) -> None:
    await fill(client, 50)
    work.puller.start()
    await until(lambda: len(work.came) == 5)
    await client.flush()
    assert len(work.came) == 5
    while len(work.done) < 50:
        await until(lambda: work.held)
        work.finish(next(d for d in work.came if d.position not in work.done))
    assert work.most == 5


async def test_a_delivery_says_what_it_is(client: Client, work: Work) -> None:
    await fill(client, 1)
    work.puller.start()
    await until(lambda: work.came)
    first = work.came[0]
    assert (first.position, first.delivered) == (1, 1) and abs(first.stored_at - 1.7e9) < 1e9
    work.finish(first, NAK)
    await until(lambda: len(work.came) == 2)
    assert (work.came[1].position, work.came[1].delivered) == (1, 2)


async def test_what_is_not_acknowledged_is_delivered_again(client: Client, work: Work) -> None:
    await fill(client, 1)
    work.puller.start()
    await until(lambda: len(work.came) >= 2)
    assert work.came[1].delivered == 2


async def test_what_comes_later_is_delivered_at_once(client: Client, work: Work) -> None:
    work.puller._handler = work.take_and_finish
    work.puller.start()
    for n in range(1, 50):
        await fill(client, 1)
        await until(lambda n=n: len(work.done) == n)


async def test_a_stopped_one_takes_nothing_more(client: Client, work: Work) -> None:
    work.puller.start()
    await client.flush()
    work.puller.stop()
    await fill(client, 3)
    await client.flush()
    assert not work.came
    work.puller.stop()


async def test_a_handler_that_raises_costs_no_slot(client: Client) -> None:
    came: list[int] = []

    def fail(delivery: Delivery) -> None:
        came.append(delivery.position)
        raise RuntimeError("boom")

    puller = Puller(client, "S", "c", 2, fail)
    await fill(client, 5)
    puller.start()
    await until(lambda: set(came) == {1, 2, 3, 4, 5})
    puller.stop()


async def test_it_goes_on_after_its_consumer_was_deleted_and_made_again(client: Client, work: Work) -> None:
    missing: list[int] = []
    work.puller._handler = work.take_and_finish
    work.puller.on_missing = lambda: missing.append(1)
    work.puller.start()
    await fill(client, 3)
    await until(lambda: len(work.done) == 3)
    await api(client, "CONSUMER.DELETE.S.c")
    await until(lambda: missing)
    await make_consumer(client)
    await fill(client, 3)
    await until(lambda: len(work.done) == 6)


async def test_it_goes_on_after_the_server_was_killed(server: Server, client: Client, work: Work) -> None:
    work.puller._handler = work.take_and_finish
    work.puller.start()
    for round in range(1, 4):
        await fill(client, 3)
        await until(lambda round=round: len(work.done) == 3 * round)
        server.kill()
        await until(lambda: not client.connected)
        await asyncio.to_thread(server.start)
        await until(lambda: client.connected)
    await until(lambda: work.held == 0)  # acks may be lost with the server; then there are second deliveries


async def test_it_starts_before_its_consumer_is_there(client: Client, work: Work) -> None:
    await api(client, "CONSUMER.DELETE.S.c")
    work.puller._handler = work.take_and_finish
    work.puller.start()
    await asyncio.sleep(0.3)
    await make_consumer(client)
    await fill(client, 2)
    await until(lambda: len(work.done) == 2)


async def test_two_share_the_work_and_nothing_is_delivered_twice(client: Client, server: Server) -> None:
    async with await Client.connect(server.url) as second:
        both = [Work(client, 20), Work(second, 20)]
        for work in both:
            work.puller._handler = work.take_and_finish
            work.puller.start()
        await fill(client, 300)
        await until(lambda: sum(len(work.done) for work in both) == 300)
        assert not both[0].done & both[1].done and all(work.done for work in both)
        for work in both:
            work.puller.stop()


class Full:
    """A connection that takes nothing while `full`."""

    def __init__(self) -> None:
        self.full = False
        self.pulls: list[bytes] = []
        self.on_reconnect: list[Callable[[], None]] = []

    def inbox(self) -> str:
        return "_INBOX.one"

    def publish(self, subject: str, data: bytes, *, reply: str = "") -> None:
        if self.full:
            raise ConnectionFailed("8 MiB wait to be sent")
        self.pulls.append(data)

    def subscribe(self, subject: str, handler: Callable[[Message], None]) -> Any:
        if self.full:
            raise ConnectionFailed("8 MiB wait to be sent")
        return SimpleNamespace(close=lambda: None)


def delivery(number: int) -> Message:
    return Message(b"s", b"$JS.ACK.S.c.1.%d.%d.1700000000000000000.0" % (number, number), b"", None)


async def test_a_connection_that_takes_nothing_costs_no_slot_and_no_keeper() -> None:
    full: Any = Full()
    puller = Puller(full, "S", "c", 2, lambda it: None)
    puller.start()
    for number in (1, 2):
        puller._take(delivery(number))
    assert puller.held == 2
    full.full = True
    puller.release()  # whoever gives a slot back, before it commits what it did, must not fail by the pull
    puller._take(delivery(3))
    assert puller.held == 2
    puller.release()
    puller.release()
    puller._begin()
    await asyncio.sleep(1.1)
    assert puller._keeper and not puller._keeper.done()
    full.full, before = False, len(full.pulls)
    await until(lambda: len(full.pulls) > before, 3.0)
    assert b'"batch":2' in full.pulls[-1]
    puller.stop()
