"""The log in JetStream, on one server."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import pytest

from dspex.bus.client import Client
from dspex.bus.server import Server
from dspex.bus.streams import ensure_log, set_doors
from dspex.core.errors import ConnectionFailed, LogError
from dspex.core.events import Head
from dspex.core.ports import Appended, Conflict, Connection, Entry, Log, Message, Subscription
from dspex.core.subjects import Subjects
from dspex.store import JetStreamLog
from dspex.store.contract import LogContract, commit, positions, put

TASK = "task.qabot.1"
_numbers = itertools.count(1)


class Stream:
    """A stream of its own for each test on a server that several share."""

    def __init__(self, url: str, replicas: int = 1) -> None:
        self.url, self.replicas = url, replicas
        self.subjects = Subjects(f"t{next(_numbers)}")
        self.made = [self.subjects]
        self.clients: list[Client] = []

    async def open(self, subjects: Subjects | None = None) -> Log:
        subjects = subjects or self.subjects
        client = await Client.connect(self.url, name="tests")
        self.clients.append(client)
        epoch = await ensure_log(client, subjects, ["qabot"], self.replicas)
        return JetStreamLog(client, subjects, epoch)

    async def another(self) -> Log:
        self.made.append(Subjects(f"t{next(_numbers)}"))
        return await self.open(self.made[-1])

    async def close(self) -> None:
        for subjects in self.made:
            await self.clients[0].request(f"$JS.API.STREAM.DELETE.{subjects.stream}", b"")
        for client in self.clients:
            await client.close()


class TestJetStream(LogContract):
    @pytest.fixture
    async def place(self, shared_server: Server) -> AsyncIterator[Stream]:
        place = Stream(shared_server.url)
        yield place
        await place.close()


class Wire:
    """A connection that spoils what a test tells it to; everything else goes through."""

    def __init__(self, inner: Connection) -> None:
        self.inner = inner
        self.spoil_call: Callable[[str, Callable[[], Awaitable[Message]]], Awaitable[Message] | None] | None = None
        self.spoil_handler: Callable[[Callable[[Message], None]], Callable[[Message], None]] | None = None

    @property
    def max_payload(self) -> int:
        return self.inner.max_payload

    def publish(self, subject: str, data: bytes, *, reply: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.inner.publish(subject, data, reply=reply, headers=headers)

    def call(self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None) -> Awaitable[Message]:
        def send() -> Awaitable[Message]:
            return self.inner.call(subject, data, headers=headers)

        spoiled = self.spoil_call(subject, send) if self.spoil_call is not None else None
        return spoiled if spoiled is not None else send()

    async def request(
        self, subject: str, data: bytes, *, headers: Mapping[str, str] | None = None, timeout: float = 5.0
    ) -> Message:
        return await self.inner.request(subject, data, headers=headers, timeout=timeout)

    def subscribe(self, subject: str, handler: Callable[[Message], None], *, queue: str = "") -> Subscription:
        if self.spoil_handler is not None:
            handler = self.spoil_handler(handler)
        return self.inner.subscribe(subject, handler, queue=queue)


@asynccontextmanager
async def opened(server: Server, patience: float = 30.0) -> AsyncIterator[tuple[JetStreamLog, Wire, Subjects]]:
    subjects = Subjects(f"t{next(_numbers)}")
    async with await Client.connect(server.url, name="tests") as client:
        wire = Wire(client)
        yield (
            JetStreamLog(wire, subjects, await ensure_log(client, subjects, ["qabot"]), patience=patience),
            wire,
            subjects,
        )


def once(how: Callable[[Callable[[], Awaitable[Message]]], Awaitable[Message]], to: str) -> object:
    """Spoil the first call to a subject."""
    left = [how]

    def spoil(subject: str, send: Callable[[], Awaitable[Message]]) -> Awaitable[Message] | None:
        return left.pop()(send) if left and subject == to else None

    return spoil


async def reply_lost(send: Callable[[], Awaitable[Message]]) -> Message:
    await send()
    raise ConnectionFailed("the connection was lost")


async def never_sent(send: Callable[[], Awaitable[Message]]) -> Message:
    raise ConnectionFailed("the connection was lost")


async def no_reply(send: Callable[[], Awaitable[Message]]) -> Message:
    await send()
    raise TimeoutError


# -- appends in trouble


@pytest.mark.parametrize("how", [reply_lost, never_sent, no_reply])
async def test_an_append_whose_reply_is_lost_is_stored_once(
    shared_server: Server, how: Callable[[Callable[[], Awaitable[Message]]], Awaitable[Message]]
) -> None:
    async with opened(shared_server) as (log, wire, subjects):
        head = await put(log, TASK)
        wire.spoil_call = once(how, subjects.event(TASK))  # type: ignore[assignment]
        result = await log.append(TASK, commit(TASK, after=1, mark="mine"), head)
        _, mine = await log.read(TASK)
        assert result == Appended(Head(2, mine.position))


async def test_an_append_whose_reply_is_lost_and_that_others_followed_is_a_conflict(
    shared_server: Server,
) -> None:
    async with opened(shared_server) as (log, wire, subjects):

        async def followed(send: Callable[[], Awaitable[Message]]) -> Message:
            await send()
            first = await log.last(TASK)
            assert first is not None
            await put(log, TASK, head=Head(1, first.position), each=2)
            raise TimeoutError

        wire.spoil_call = once(followed, subjects.event(TASK))  # type: ignore[assignment]
        result = await log.append(TASK, commit(TASK, mark="mine"), Head())
        kept = await log.read(TASK)
        assert result == Conflict(Head(3, kept[-1].position))
        assert len(kept) == 2


async def test_a_door_message_whose_reply_is_lost_is_not_sent_again(shared_server: Server) -> None:
    async with opened(shared_server) as (log, wire, subjects):
        door = subjects.door("task", "qabot")
        wire.spoil_call = once(reply_lost, door)  # type: ignore[assignment]
        with pytest.raises(LogError, match="unknown"):
            await log.store(door, b"{}", {})
        assert len(await log.scan(0)) == 1


async def test_a_door_that_nobody_registered_is_refused(shared_server: Server) -> None:
    async with opened(shared_server) as (log, _, subjects):
        with pytest.raises(LogError, match="no program of that name"):
            await log.store(subjects.door("task", "misspelt"), b"{}", {})
        assert await log.head() == 0


async def test_what_the_stream_refuses_is_said_at_once(shared_server: Server) -> None:
    async with opened(shared_server) as (log, wire, subjects):
        info = json.loads((await wire.request(f"$JS.API.STREAM.INFO.{subjects.stream}", b"")).data)
        config = info["config"] | {"max_msg_size": 500}
        await wire.request(f"$JS.API.STREAM.UPDATE.{subjects.stream}", json.dumps(config).encode())
        with pytest.raises(LogError, match=r"refused an append .* maximum"):
            await log.append(TASK, commit(TASK, mark="x" * 500), Head())
        with pytest.raises(LogError, match=r"refused the message .* maximum"):
            await log.store(subjects.door("task", "qabot"), b"x" * 600, {})


async def test_a_server_that_is_gone_is_a_log_error_in_the_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspex.bus.client.CALL_TIMEOUT", 0.3)
    async with opened(server, patience=0.3) as (log, wire, subjects):
        head = await put(log, TASK)
        server.kill()
        with pytest.raises(LogError, match=r"cannot be reached|did not confirm"):
            await log.append(TASK, commit(TASK, after=1), head)
        with pytest.raises(LogError, match="cannot be reached"):
            await log.last(TASK)
        with pytest.raises(LogError, match="unknown"):
            await log.store(subjects.door("task", "qabot"), b"{}", {})
        await asyncio.to_thread(server.start)
        while not wire.inner.connected:  # type: ignore[attr-defined]
            await asyncio.sleep(0.01)


async def test_a_closed_connection_is_a_log_error_at_once(shared_server: Server) -> None:
    async with opened(shared_server) as (log, wire, _):
        head = await put(log, TASK)
        await wire.inner.close()  # type: ignore[attr-defined]
        for work in (log.append(TASK, commit(TASK, after=1), head), log.last(TASK), log.scan(0)):
            with pytest.raises(LogError, match="closed"):
                await work


async def test_kill_9_during_pipelined_appends_loses_and_doubles_nothing(server: Server) -> None:
    async with opened(server) as (log, _, _):
        names = [f"task.qabot.{i}" for i in range(64)]
        acknowledged = 0
        heads: dict[str, Head] = {}

        async def write(name: str) -> None:
            nonlocal acknowledged
            head = Head()
            for _ in range(30):
                result = await log.append(name, commit(name, after=head.version, mark=name), head)
                assert isinstance(result, Appended), "no one else writes here"
                head = heads[name] = result.head
                acknowledged += 1
                if acknowledged in (200, 900):
                    await asyncio.to_thread(server.kill)
                    await asyncio.to_thread(server.start)

        await asyncio.gather(*map(write, names))
        everything = await log.scan(0, 5000)
        assert len(everything) == 64 * 30
        for name in names:
            kept = await log.read(name)
            assert len(kept) == 30 and kept[-1].position == heads[name].position


# -- reads in trouble


async def test_a_lagging_replica_is_made_up_for_by_the_leader(shared_server: Server) -> None:
    async with opened(shared_server) as (log, wire, _):
        head = await put(log, TASK, count=10)

        def lag(handler: Callable[[Message], None]) -> Callable[[Message], None]:
            seen: list[Message] = []

            def handle(message: Message) -> None:
                seen.append(message)
                handler(message if len(seen) <= 4 else seen[0])  # the same again: nothing new is there

            return handle

        wire.spoil_handler = lag
        entries = await log.read(TASK)
        assert len(entries) == 10 and entries[-1].position == head.position


async def test_a_stream_without_direct_gets_is_read_from_its_leader(shared_server: Server) -> None:
    async with opened(shared_server) as (log, wire, subjects):
        info = json.loads((await wire.request(f"$JS.API.STREAM.INFO.{subjects.stream}", b"")).data)
        config = info["config"] | {"allow_direct": False}
        await wire.request(f"$JS.API.STREAM.UPDATE.{subjects.stream}", json.dumps(config).encode())
        await put(log, TASK, count=5)
        assert len(await log.read(TASK)) == 5


@pytest.mark.parametrize("drop", [1, 5, 20])
async def test_a_lost_delivery_leaves_no_gap(shared_server: Server, drop: int) -> None:
    async with opened(shared_server) as (log, wire, _):
        await put(log, TASK, count=20)
        whole = await log.scan(0)
        deliveries = itertools.count(1)

        def lossy(handler: Callable[[Message], None]) -> Callable[[Message], None]:
            def handle(message: Message) -> None:
                if not message.reply.startswith("$JS.ACK.") or next(deliveries) != drop:
                    handler(message)

            return handle

        wire.spoil_handler = lossy
        assert await log.scan(0) == whole
        deliveries = itertools.count(1)
        tail = log.tail(0)
        assert [await anext(tail) for _ in range(20)] == whole
        await tail.aclose()  # type: ignore[attr-defined]


async def test_a_tail_outlives_its_server(server: Server) -> None:
    async with opened(server) as (log, _, _):
        head = await put(log, TASK, count=5)
        tail = log.tail(0)
        seen: list[Entry] = [await anext(tail) for _ in range(5)]
        coming = asyncio.ensure_future(anext(tail))
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        await put(log, TASK, count=5, head=head)
        seen.append(await coming)
        seen += [await anext(tail) for _ in range(4)]
        assert positions(seen) == positions(await log.scan(0)) and len(seen) == 10
        await tail.aclose()  # type: ignore[attr-defined]


async def test_forgotten_entries_are_passed_over(shared_server: Server) -> None:
    async with opened(shared_server) as (log, wire, subjects):
        await put(log, TASK, count=3)
        for i in (2, 3, 4):
            await put(log, f"task.qabot.{i}", count=2)
        for position in (2, 4, 5, 9):
            body = json.dumps({"seq": position}).encode()
            await wire.request(f"$JS.API.STREAM.MSG.DELETE.{subjects.stream}", body)
        assert positions(await log.scan(0)) == [1, 3, 6, 7, 8]
        assert positions(await log.read(TASK)) == [1, 3]
        assert await log.entry(2) is None
        tail = log.tail(0)
        assert positions([await anext(tail) for _ in range(5)]) == [1, 3, 6, 7, 8]
        await tail.aclose()  # type: ignore[attr-defined]


async def test_readers_leave_no_consumer_behind(shared_server: Server) -> None:
    async with opened(shared_server) as (log, wire, subjects):
        await put(log, TASK, count=5)
        for _ in range(10):
            await log.scan(0, limit=2)
        tail = log.tail(0)
        await anext(tail)
        await tail.aclose()  # type: ignore[attr-defined]
        while True:  # the server takes its time to delete them; pytest's timeout ends a wait in vain
            names = json.loads((await wire.request(f"$JS.API.CONSUMER.NAMES.{subjects.stream}", b"")).data)
            if names["total"] == 0:
                break
            await asyncio.sleep(0.01)


async def test_a_reader_that_is_sent_nothing_says_so(shared_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a permission is missing: the server tells the connection, not the one who waits."""
    monkeypatch.setattr("dspex.store.cursor._SILENCE", 0.1)
    async with opened(shared_server, patience=0.25) as (log, wire, _):
        await put(log, TASK)
        wire.spoil_handler = lambda handler: lambda message: None
        with pytest.raises(LogError, match="sent its reader nothing"):
            await anext(log.tail(0))
        with pytest.raises(LogError, match="sent its reader nothing"):
            await log.scan(0)


async def test_a_tail_may_wait_for_a_program_that_is_not_registered_yet(shared_server: Server) -> None:
    async with opened(shared_server) as (log, wire, subjects):
        door = subjects.door("task", "later")
        tail = log.tail(0, door)
        coming = asyncio.ensure_future(anext(tail))
        await put(log, TASK)
        await set_doors(wire, subjects, ["later", "qabot"])
        position = await log.store(door, b"{}", {})
        assert (await coming).position == position
        await tail.aclose()  # type: ignore[attr-defined]
