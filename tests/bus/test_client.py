"""The hardened client: what comes over the wire cannot end it, and what breaks the connection is healed or said."""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
import uvloop

from dspex.bus import client as client_module
from dspex.bus import wire as wire_module
from dspex.bus.client import Client, Message
from dspex.bus.server import Server, free_port
from dspex.core.errors import ConnectionFailed

_numbers = itertools.count()


@pytest.fixture
async def client(shared_server: Server) -> AsyncIterator[Client]:
    async with await Client.connect(shared_server.url) as client:
        yield client


@pytest.fixture
def subject() -> str:
    """A subject of one's own on the shared server."""
    return f"test.s{next(_numbers)}"


async def until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    async with asyncio.timeout(timeout):
        while not condition():
            await asyncio.sleep(0.01)


def echo(client: Client, subject: str) -> None:
    client.subscribe(subject, lambda message: client.respond(message, message.data))


# -- requests


async def test_many_requests_under_way_get_their_own_replies(client: Client, subject: str) -> None:
    echo(client, subject)
    futures = [client.call(subject, b"%d" % n) for n in range(2000)]
    assert [(await future).data for future in futures] == [b"%d" % n for n in range(2000)]


async def test_nobody_there_is_a_reply_with_status_503(client: Client, subject: str) -> None:
    assert (await client.request(subject, b"")).status == 503


async def test_no_reply_is_a_timeout(client: Client, subject: str) -> None:
    client.subscribe(subject, lambda message: None)
    with pytest.raises(TimeoutError):
        await client.request(subject, b"", timeout=0.2)


async def test_a_call_without_reply_times_out(
    client: Client, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.subscribe(subject, lambda message: None)
    future = client.call(subject, b"", timeout=0.1)
    with pytest.raises(TimeoutError):
        await future
    assert not client._waiting


async def test_a_reply_that_comes_too_late_is_nobodys(client: Client, subject: str) -> None:
    kept: list[Message] = []
    client.subscribe(subject, kept.append)
    with pytest.raises(TimeoutError):
        await client.request(subject, b"", timeout=0.1)
    client.respond(kept[0], b"late")
    echo(client, f"{subject}.echo")
    assert (await client.request(f"{subject}.echo", b"x")).data == b"x"


async def test_headers_travel_and_reply_subjects_too(client: Client, subject: str) -> None:
    client.subscribe(
        subject, lambda message: client.respond(message, message.reply.encode(), headers={"A": message.headers["B"]})
    )
    reply = await client.request(subject, b"", headers={"B": "ü €"})
    assert reply.headers == {"A": "ü €"} and reply.data.startswith(b"_INBOX.")


async def test_an_empty_body_and_a_large_one(client: Client, subject: str) -> None:
    echo(client, subject)
    for body in (b"", b"x" * (8 << 20)):
        assert (await client.request(subject, body)).data == body


# -- what cannot be sent


@pytest.mark.parametrize("bad", ["", "a b", "a\tb", "a\r\nPUB x 0\r\n", "a\nb", "\u00a0"])
async def test_a_subject_that_is_none_is_refused(client: Client, bad: str) -> None:
    with pytest.raises(ValueError, match="subject"):
        client.publish(bad, b"")
    with pytest.raises(ValueError, match="subject"):
        await client.request(bad, b"")


@pytest.mark.parametrize("name", ["", "a b", "a:b", "a\r\nb", "ü", "\x00"])
async def test_a_header_name_that_is_none_is_refused(client: Client, subject: str, name: str) -> None:
    with pytest.raises(ValueError, match="header"):
        client.publish(subject, b"", headers={name: "x"})


async def test_a_line_break_in_a_header_value_makes_no_second_header(client: Client, subject: str) -> None:
    came: list[Message] = []
    client.subscribe(subject, came.append)
    client.publish(subject, b"x", headers={"A": "1\r\nNats-Rollup: all\r\n\r\nbody"})
    await client.flush()
    await until(lambda: came)
    assert list(came[0].headers) == ["A"] and came[0].data == b"x"


async def test_what_is_too_large_is_refused_and_costs_nothing(client: Client, subject: str) -> None:
    came: list[Message] = []
    client.subscribe(subject, came.append)
    with pytest.raises(ValueError, match="8,388,609"):
        client.publish(subject, b"x" * ((8 << 20) + 1))
    with pytest.raises(ValueError, match="limit"):
        client.publish(subject, b"x" * (8 << 20), headers={"A": "1"})
    with pytest.raises(ValueError, match="limit"):
        client.publish(subject, b"", headers={"A": "x" * (8 << 20)})
    client.publish(subject, b"x" * (8 << 20))
    await client.flush()
    await until(lambda: came)
    assert client.connected


async def test_a_subject_longer_than_a_control_line_is_refused(client: Client) -> None:
    with pytest.raises(ValueError, match="more than a server takes"):
        client.publish("x" * 5000, b"")
    client.publish("x" * 3900, b"")
    await client.flush()
    assert client.connected


# -- what comes


async def test_bytes_that_are_not_utf8_in_subject_and_reply_arrive_as_they_are(
    client: Client, shared_server: Server, subject: str
) -> None:
    came: list[Message] = []
    client.subscribe(f"{subject}.*", came.append)
    await client.flush()
    async with raw(shared_server) as (reader, writer):
        writer.write(b"SUB %b.reply.* 1\r\n" % subject.encode())
        writer.write(b"PUB %b.\xff\xfe %b.reply.\xff 2\r\nhi\r\n" % (subject.encode(), subject.encode()))
        await until(lambda: came)
        message = came[0]
        assert message.raw_subject.endswith(b".\xff\xfe") and message.subject.endswith(r".\xff\xfe")
        assert message.reply.endswith(r".\xff")
        client.respond(message, b"back")
        line = await asyncio.wait_for(reader.readuntil(b"back"), 10)
        assert b".reply.\xff 1 4\r\n" in line
    echo(client, f"{subject}.x.echo")
    assert (await client.request(f"{subject}.x.echo", b"alive")).data == b"alive"


async def test_headers_that_are_rubbish_do_no_harm(client: Client, shared_server: Server, subject: str) -> None:
    came: list[Message] = []
    client.subscribe(subject, came.append)
    await client.flush()
    blocks = [
        b"NATS/1.0\r\n\r\n", b"NATS/1.0\r\nA\r\n\r\n", b"NATS/1.0\r\n: x\r\n\r\n", b"NATS/1.0\r\nA: \xff\r\n\r\n",
        b"NATS/1.0\r\n\xff: x\r\n\r\n", b"rubbish\r\n\r\n", b"NATS/1.0\r\nA:1\r\nA:2\r\n\r\n", b"NATS/1.0 abc\r\n\r\n",
    ]  # fmt: skip
    async with raw(shared_server) as (_, writer):
        for block in blocks:
            writer.write(b"HPUB %b %d %d\r\n%b\r\n" % (subject.encode(), len(block), len(block), block))
        await until(lambda: len(came) == len(blocks))
    assert [message.status for message in came] == [0] * len(blocks)
    assert came[3].headers == {"A": r"\xff"}


async def test_the_names_of_our_headers_are_read_whatever_their_case(client: Client, subject: str) -> None:
    came: list[Message] = []
    client.subscribe(subject, came.append)
    client.publish(subject, b"", headers={"dspex-key": "1", "DSPEX-WAIT": "2", "other-name": "3"})
    await client.flush()
    await until(lambda: came)
    assert came[0].headers == {"Dspex-Key": "1", "Dspex-Wait": "2", "other-name": "3"}


async def test_a_handler_that_raises_costs_only_its_message(
    client: Client, subject: str, caplog: pytest.LogCaptureFixture
) -> None:
    came: list[bytes] = []

    def handle(message: Message) -> None:
        if message.data == b"bad":
            raise RuntimeError("boom")
        came.append(message.data)

    client.subscribe(subject, handle)
    for body in (b"one", b"bad", b"two"):
        client.publish(subject, body)
    await until(lambda: len(came) == 2)
    assert came == [b"one", b"two"]
    assert "a handler failed" in caplog.text


async def test_messages_come_in_order_and_none_is_missing(client: Client, subject: str) -> None:
    came: list[bytes] = []
    client.subscribe(subject, lambda message: came.append(message.data))
    sent = [b"%d" % n * (n % 700) for n in range(20_000)]
    for start in range(0, len(sent), 500):
        for body in sent[start : start + 500]:
            client.publish(subject, body)
        await client.flush()
    await until(lambda: len(came) == len(sent))
    assert came == sent


async def test_a_closed_subscription_hears_nothing_more(client: Client, subject: str) -> None:
    came: list[Message] = []
    tap = client.subscribe(subject, came.append)
    tap.close()
    tap.close()
    client.publish(subject, b"x")
    await client.flush()
    assert not came


async def test_a_queue_group_shares_the_messages(client: Client, shared_server: Server, subject: str) -> None:
    async with await Client.connect(shared_server.url) as other:
        counts = [0, 0]

        def counting(index: int) -> Callable[[Message], None]:
            def handle(message: Message) -> None:
                counts[index] += 1

            return handle

        client.subscribe(subject, counting(0), queue="q")
        other.subscribe(subject, counting(1), queue="q")
        await client.flush()
        await other.flush()
        for _ in range(200):
            client.publish(subject, b"")
        await until(lambda: sum(counts) == 200)
        assert min(counts) > 0


# -- the connection breaks


async def test_what_is_under_way_fails_at_once_when_the_connection_breaks(server: Server) -> None:
    async with await Client.connect(server.url) as client:
        client.subscribe("silent", lambda message: None)
        futures = [client.call("silent", b"", timeout=60) for _ in range(10)]
        await client.flush()
        server.kill()
        for future in futures:
            with pytest.raises(ConnectionFailed, match="unknown"):
                await asyncio.wait_for(future, 10)


async def test_it_connects_again_and_every_subscription_is_there(server: Server) -> None:
    async with await Client.connect(server.url) as client:
        back: list[int] = []
        client.on_reconnect.append(lambda: back.append(1))
        for n in range(100):
            echo(client, f"echo.{n}")
        for round in range(1, 4):
            server.kill()
            await until(lambda: not client.connected)
            server.start()
            await until(lambda round=round: len(back) == round)
            for n in range(100):
                assert (await client.request(f"echo.{n}", b"%d" % n)).data == b"%d" % n


async def test_what_is_published_while_the_server_is_away_arrives_later(server: Server) -> None:
    async with await Client.connect(server.url) as client:
        came: list[bytes] = []
        client.subscribe("later", lambda message: came.append(message.data))
        await client.flush()
        server.kill()
        await until(lambda: not client.connected)
        for n in range(100):
            client.publish("later", b"%d" % n)
        server.start()
        await until(lambda: len(came) == 100)
        assert came == [b"%d" % n for n in range(100)]


def test_a_transport_that_has_just_closed_is_a_lost_connection(shared_server: Server) -> None:
    """uvloop raises RuntimeError there, and an agent's loop is one."""

    async def run() -> None:
        subject, heard = f"test.s{next(_numbers)}", []
        async with await Client.connect(shared_server.url) as client, await Client.connect(shared_server.url) as other:
            other.subscribe(subject, lambda message: heard.append(message.data))
            await other.flush()
            client._wire._transport._io_writer.transport.abort()  # the library has not noticed yet
            client.publish(subject, b"meanwhile")
            with pytest.raises(ConnectionFailed):
                await client.flush()
            await until(lambda: heard == [b"meanwhile"])

    uvloop.run(run())


async def test_what_is_published_while_the_server_is_away_is_bounded(server: Server) -> None:
    async with await Client.connect(server.url) as client:
        server.kill()
        await until(lambda: not client.connected)
        with pytest.raises(ConnectionFailed, match="8 MiB"):
            for _ in range(100):
                client.publish("x", b"x" * (1 << 20))
                await asyncio.sleep(0)


async def test_a_subscription_made_while_the_server_is_away_is_there_afterwards(server: Server) -> None:
    async with await Client.connect(server.url) as client:
        gone = client.subscribe("gone", lambda message: None)
        await client.flush()
        server.kill()
        await until(lambda: not client.connected)
        echo(client, "new")
        gone.close()
        server.start()
        await until(lambda: client.connected)
        assert (await client.request("new", b"x")).data == b"x"
        assert (await client.request("gone", b"x")).status == 503


async def test_it_says_that_it_tries_every_few_seconds(
    server: Server, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "COMPLAIN_EVERY", 0.3)
    async with await Client.connect(server.url) as client:
        server.kill()
        said = re.compile(r"no NATS server answers at nats://127\.0\.0\.1:\d+ for \d+ s; trying on")
        await until(lambda: len(said.findall(caplog.text)) >= 3)
        assert not client.connected


async def test_a_server_that_talks_rubbish_is_left_and_tried_again() -> None:
    async with fake() as (url, server), await Client.connect(url) as client:
        for rubbish in (b"MSG a\r\n", b"MSG a 1 x\r\n", b"\x00\x01\x02\r\n", b"WHAT\r\n"):
            count = server.connections
            server.send(rubbish)
            await until(lambda count=count: server.connections > count and client.connected)


async def test_an_error_of_the_server_is_a_reason_to_connect_again() -> None:
    """nats-py closes for good on most of them; the bytes behind the error belong to the old connection."""
    async with fake() as (url, server):
        async with await Client.connect(url) as client:
            came: list[bytes] = []
            client.subscribe("a", lambda message: came.append(message.data))
            await client.flush()
            for text in (b"Maximum Payload Violation", b"Stale Connection", b"Unknown Protocol Operation", b"Slow Consumer"):
                count = server.connections
                server.send(b"-ERR '%b'\r\nMSG a 2 100\r\nhalf of" % text)
                await until(lambda count=count: server.connections > count and client.connected)
                server.send(b"MSG a 2 4\r\ngood\r\n")
                await until(lambda: came)
                assert came.pop() == b"good"


async def test_a_permission_that_is_missing_is_said_and_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    async with fake() as (url, server), await Client.connect(url) as client:
        server.send(b"-ERR 'Permissions Violation for Publish to \"x\"'\r\n")
        await until(lambda: "permissions violation" in caplog.text)
        await client.flush()
        assert client.connected and server.connections == 1


async def test_a_fault_in_the_reading_loop_is_a_reason_to_connect_again(
    client: Client, subject: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo(client, subject)
    await client.flush()
    back = asyncio.Event()
    client.on_reconnect.append(back.set)
    parse = client._wire._ps.parse

    async def fail(data: bytes = b"") -> None:
        monkeypatch.setattr(client._wire._ps, "parse", parse)
        raise RuntimeError("not foreseen")

    monkeypatch.setattr(client._wire._ps, "parse", fail)
    for _ in range(2):  # the loop holds the true method while it waits for the first
        client.publish(subject, b"")
        await asyncio.sleep(0.05)
    await asyncio.wait_for(back.wait(), 20)
    assert (await client.request(subject, b"x")).data == b"x"


async def test_a_message_in_pieces_is_one_message() -> None:
    async with fake() as (url, server), await Client.connect(url) as client:
        came: list[bytes] = []
        client.subscribe("a", lambda message: came.append(message.data))
        await client.flush()
        for byte in b"MSG a 2 12\r\nhello\r\nworld\r\nHMSG a 2 12 14\r\nNATS/1.0\r\n\r\nhi\r\nPING\r\n":
            server.send(bytes([byte]))
            await asyncio.sleep(0)
        await until(lambda: len(came) == 2)
        assert came == [b"hello\r\nworld", b"hi"]


async def test_a_broken_connection_can_be_cut_by_hand(client: Client, subject: str) -> None:
    echo(client, subject)
    await client.flush()
    back = asyncio.Event()
    client.on_reconnect.append(back.set)
    await asyncio.to_thread(client.cut)
    await asyncio.wait_for(back.wait(), 20)
    assert (await client.request(subject, b"x")).data == b"x"


# -- closing


async def test_closing_sends_what_waits(shared_server: Server, client: Client, subject: str) -> None:
    came: list[Message] = []
    client.subscribe(subject, came.append)
    await client.flush()
    other = await Client.connect(shared_server.url)
    for _ in range(1000):
        other.publish(subject, b"x")
    await other.close()
    await until(lambda: len(came) == 1000)


async def test_a_closed_client_says_so(shared_server: Server) -> None:
    client = await Client.connect(shared_server.url)
    client.subscribe("silent", lambda message: None)
    future = client.call("silent", b"")
    await client.close()
    await client.close()
    with pytest.raises(ConnectionFailed):
        await future
    for use in (lambda: client.publish("x", b""), lambda: client.call("x", b""), lambda: client.subscribe("x", print)):
        with pytest.raises(ConnectionFailed, match="closed"):
            use()


async def test_closing_while_the_server_is_away_is_quick(server: Server) -> None:
    client = await Client.connect(server.url)
    server.kill()
    await until(lambda: not client.connected)
    client.publish("x", b"x")
    await asyncio.wait_for(client.close(), 10)


async def test_waiting_for_a_server_can_be_stopped() -> None:
    stopping = asyncio.Event()
    connecting = asyncio.create_task(Client.connect_unless(stopping, f"nats://127.0.0.1:{free_port()}"))
    await asyncio.sleep(0.1)
    assert not connecting.done()
    stopping.set()
    assert await asyncio.wait_for(connecting, 10) is None


async def test_connecting_waits_for_a_server_that_comes(servers: Callable[..., Server]) -> None:
    server = servers(port=free_port())
    connecting = asyncio.create_task(Client.connect(f"nats://127.0.0.1:{server.port}", wait=30))
    await asyncio.sleep(0.2)
    await asyncio.to_thread(server.start)
    async with await connecting as client:
        assert client.connected


# -- servers that are none


@asynccontextmanager
async def raw(server: Server) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a real server, byte by byte."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    await reader.readline()
    writer.write(b'CONNECT {"verbose":false,"headers":true}\r\nPING\r\n')
    assert await reader.readline() == b"PONG\r\n"
    yield reader, writer
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()


class Fake:
    """A server that greets, answers pings, and says whatever the test tells it to."""

    def __init__(self) -> None:
        self.connections = 0
        self._writers: list[asyncio.StreamWriter] = []

    def send(self, data: bytes) -> None:
        self._writers[-1].write(data)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"fake","version":"2.15.1","headers":true,"max_payload":1048576,"proto":1}\r\n')
        try:
            while line := await reader.readline():
                if line.startswith(b"PING"):
                    writer.write(b"PONG\r\n")
                    if writer not in self._writers:
                        self._writers.append(writer)
                        self.connections += 1
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def fake() -> AsyncIterator[tuple[str, Fake]]:
    served = Fake()
    serving: Callable[..., Awaitable[None]] = served.serve
    async with await asyncio.start_server(serving, "127.0.0.1", 0) as server:
        yield f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}", served
        for writer in served._writers:
            writer.close()


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("nats").setLevel(logging.CRITICAL)
    logging.getLogger("dspex").propagate = True


async def test_a_subscription_is_closed_while_nothing_can_be_sent(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await Client.connect(server.url) as client:
        tap = client.subscribe("a", lambda message: None)
        server.stop()
        await until(lambda: not client.connected)
        client.publish("s", b"waits")
        await asyncio.sleep(0)
        monkeypatch.setattr(wire_module, "MAX_BUFFERED", 0)
        wire = client._wire
        before = len(wire.taps), len(wire._subs)
        tap.close()
        with pytest.raises(ConnectionFailed):
            client.subscribe("b", lambda message: None)
        assert (len(wire.taps), len(wire._subs)) == (before[0] - 1, before[1] - 1)


async def test_who_fails_after_a_reconnect_does_not_keep_it_from_the_others(server: Server) -> None:
    async with await Client.connect(server.url) as client:
        heard: list[int] = []

        def fail() -> None:
            raise ConnectionFailed("8 MiB wait to be sent")

        client.on_reconnect += [fail, lambda: heard.append(1)]
        client.cut()
        await until(lambda: heard)


def test_what_is_sent_into_a_socket_that_has_just_broken_is_sent_after_the_reconnect(server: Server) -> None:
    """In uvloop, as agents run: its transports refuse what asyncio's throw away."""
    wrong: list[object] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: wrong.append(context))
        async with await Client.connect(server.url) as client, await Client.connect(server.url) as other:
            heard: list[bytes] = []
            other.subscribe("test.broken", lambda message: heard.append(message.data))
            await other.flush()
            client._wire._transport._io_writer.transport.abort()
            client.publish("test.broken", b"one")
            with suppress(ConnectionFailed):  # and nothing else
                await client.flush()
            await until(lambda: heard == [b"one"])

    uvloop.run(run())
    assert not wrong


async def test_a_connection_left_behind_by_a_reconnect_is_read_no_more(
    shared_server: Server, client: Client, subject: str
) -> None:
    """The library begins again, without closing what it has, when the first flush of a reconnect gets no answer."""
    came: list[bytes] = []
    client.subscribe(subject, lambda message: came.append(message.data))
    await client.flush()
    wire = client._wire
    behind = wire._reading_task
    wire._status = wire.RECONNECTING
    await wire._connect_to_server(wire._current_server)
    await wire._process_connect_init()
    for sid, sub in wire._subs.items():
        wire.send(f"SUB {sub.subject} {sid}\r\n".encode())
    await client.flush()
    async with await Client.connect(shared_server.url) as other:
        other.publish(subject, b"once")
        await until(lambda: behind is not None and behind.done())
    await client.flush()
    assert came == [b"once"] and client.connected
