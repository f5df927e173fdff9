"""A log process's queue: bounded, filled again after anything, each task in it once."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import pytest

from dspex.agents.queue import Queue
from dspex.bus import streams
from dspex.bus.client import Client
from dspex.bus.pull import ACK, Delivery, Puller, Queued
from dspex.bus.server import Server
from dspex.core.standing import Standing
from dspex.core.subjects import Subjects
from dspex.store import MemoryLog

_numbers = itertools.count(1)


@dataclass
class Bench:
    """A log, its queue, and an agent that holds at most four."""

    client: Client
    subjects: Subjects
    log: MemoryLog
    standing: Standing
    queue: Queue
    taken: list[Delivery] = field(default_factory=list)

    async def store(self, count: int, program: str = "qabot") -> None:
        for _ in range(count):
            position = await self.log.store(self.subjects.door("task", program), b"{}", {"Dspex-Key": "k", "x": "y"})
            entry = await self.log.entry(position)
            assert entry is not None
            self.standing.door(position, "task", program, b"{}")
            self.queue.add("task", program, entry)

    async def agent(self) -> Puller:
        await streams.ensure_stream(self.client, streams.timer_stream(self.subjects))
        await streams.ensure_consumers(self.client, self.subjects, "qabot", queued=True)

        def take(delivery: Delivery) -> None:
            self.taken.append(delivery)
            self.standing.awake.pop(delivery.position, None)  # it has ended
            self.queue.left(delivery.position)
            self.client.acknowledge(delivery.message, ACK)
            puller.release()

        stream, consumer = self.subjects.queue_stream, streams.consumer_name("qabot")
        puller = Puller(self.client, stream, consumer, 4, take, Queued)
        puller.start()
        return puller

    async def until(self, count: int) -> list[int]:
        async with asyncio.timeout(30):
            while len(self.taken) < count:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # nothing more comes
        return [delivery.position for delivery in self.taken]

    async def queued(self, program: str = "*") -> int:
        """How many of a program are in the queue."""
        asked = {"subjects_filter": self.subjects.queue("task", program, "*")}
        info = await streams.jetstream_api(self.client, f"STREAM.INFO.{self.subjects.queue_stream}", asked)
        return len(info["state"].get("subjects") or {})

    async def until_queued(self, count: int, program: str) -> None:
        async with asyncio.timeout(30):
            while await self.queued(program) < count:
                await asyncio.sleep(0.01)


@pytest.fixture
async def bench(shared_server: Server) -> AsyncIterator[Bench]:
    subjects = Subjects(f"q{next(_numbers)}")
    client = await Client.connect(shared_server.url, name="tests")
    log, standing = MemoryLog(subjects), Standing(subjects)
    await streams.ensure_queue(client, subjects, log.epoch)
    queue = Queue(client, log, subjects, standing)
    working = asyncio.create_task(queue.work())
    yield Bench(client, subjects, log, standing, queue)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
    await streams.jetstream_api(client, f"STREAM.DELETE.{subjects.queue_stream}")
    await client.close()


async def test_what_does_not_fit_waits_in_the_log(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_QUEUED", 10)
    await streams.jetstream_api(bench.client, f"STREAM.DELETE.{bench.subjects.queue_stream}")
    await streams.ensure_queue(bench.client, bench.subjects, bench.log.epoch)
    await bench.store(60)
    async with asyncio.timeout(10):
        while bench.queue.waiting < 40:
            await asyncio.sleep(0.01)
    assert await bench.queued() == 10
    puller = await bench.agent()
    found = await bench.until(60)
    assert sorted(found) == list(range(1, 61))
    assert await bench.queued() == 0 and bench.queue.waiting == 0
    puller.stop()


async def test_a_flood_of_one_program_leaves_room_for_another(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_QUEUED", 100)
    bench.queue = Queue(bench.client, bench.log, bench.subjects, bench.standing)
    working = asyncio.create_task(bench.queue.work())
    await bench.store(400)
    await bench.store(10, "summary")
    await bench.until_queued(10, "summary")
    assert await bench.queued("qabot") == 50 and bench.queue.waiting == 350
    puller = await bench.agent()
    assert await bench.until(400) == list(range(1, 401))
    assert await bench.queued("summary") == 10 and bench.queue.waiting == 0
    puller.stop()
    working.cancel()


async def test_programs_take_turns_when_a_log_is_put_in_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_QUEUED", 100)
    await bench.store(200)
    await bench.store(10, "summary")
    await streams.jetstream_api(bench.client, f"STREAM.DELETE.{bench.subjects.queue_stream}")
    await streams.ensure_queue(bench.client, bench.subjects, bench.log.epoch)
    bench.queue = Queue(bench.client, bench.log, bench.subjects, bench.standing)
    working = asyncio.create_task(bench.queue.work())
    bench.queue.fill()
    await bench.until_queued(10, "summary")
    await bench.until_queued(45, "qabot")
    assert await bench.queued("qabot") <= 50, "the rest waits, though it is older"
    working.cancel()


async def test_a_task_says_where_and_when_it_was_stored(bench: Bench) -> None:
    await bench.store(3)
    puller = await bench.agent()
    assert await bench.until(3) == [1, 2, 3]
    entry = await bench.log.entry(2)
    delivery = bench.taken[1]
    assert entry is not None and (delivery.stored_at, delivery.delivered) == (entry.time, 1)
    assert delivery.message.headers["Dspex-Key"] == "k" and "x" not in delivery.message.headers
    puller.stop()


async def test_filling_it_again_changes_nothing_about_what_is_there(bench: Bench) -> None:
    await bench.store(20)
    for _ in range(3):
        bench.queue.fill()
        async with asyncio.timeout(10):
            while bench.queue.waiting:
                await asyncio.sleep(0.01)
    assert await bench.queued() == 20
    puller = await bench.agent()
    assert sorted(await bench.until(20)) == list(range(1, 21))
    assert {delivery.delivered for delivery in bench.taken} == {1}
    puller.stop()


async def test_a_queue_that_is_gone_is_made_and_filled_again(bench: Bench) -> None:
    await bench.store(5)
    await streams.jetstream_api(bench.client, f"STREAM.DELETE.{bench.subjects.queue_stream}")
    await bench.store(5)  # nobody takes these: it finds out
    bench.queue.fill()
    async with asyncio.timeout(10):
        while bench.queue.waiting or await bench.queued() < 10:
            await asyncio.sleep(0.05)
    puller = await bench.agent()
    assert sorted(await bench.until(10)) == list(range(1, 11))
    assert {delivery.delivered for delivery in bench.taken if delivery.position <= 5} == {2}, "known before"
    puller.stop()


async def test_what_is_none_of_ours_is_thrown_away(bench: Bench) -> None:
    await bench.client.request(bench.subjects.queue("task", "qabot", 7), b"{}")
    puller = await bench.agent()
    await bench.store(1)
    assert await bench.until(1) == [1]
    assert await bench.queued() == 0
    puller.stop()
