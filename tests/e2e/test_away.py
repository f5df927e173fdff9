"""A server that is not there yet, or not there any more: a plain sentence every few seconds, recovery by itself."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable

import pytest
from tests.e2e.running import Running, until

from dspex.bus.client import Client
from dspex.bus.server import Server, free_port
from dspex.compose.caller import Caller
from dspex.core.errors import ConnectionFailed

NOBODY = re.compile(r"^\d\d:\d\d:\d\d WARNING no NATS server answers at nats://127\.0\.0\.1:\d+[^\n]*$", re.MULTILINE)


async def test_a_system_waits_for_its_server_and_starts_when_it_comes(
    systems: Callable[..., Running], servers: Callable[..., Server]
) -> None:
    server = servers(port=free_port())
    system = systems(("Nap", 1), nats=f"nats://127.0.0.1:{server.port}").launch()
    until(lambda: len(NOBODY.findall(system.words)) >= 3, what="it does not say that it waits")
    assert "Traceback" not in system.words and not any(event["event"] == "ready" for event in system.events)
    server.start()
    system.event("ready")
    async with await system.plain() as plain:
        assert (await plain.ask("nap", {"n": 1})).json["n"] == 1


async def test_a_system_that_waits_for_its_server_stops_when_told_to(systems: Callable[..., Running]) -> None:
    system = systems(("Nap", 1), nats=f"nats://127.0.0.1:{free_port()}").launch()
    until(lambda: NOBODY.search(system.words))
    assert system.stop() == 0


async def test_agents_outlive_a_server_that_is_away_and_go_on(
    systems: Callable[..., Running], servers: Callable[..., Server]
) -> None:
    server = servers(port=free_port())
    server.start()
    with systems(("Nap", 2), nats=server.url) as system:
        async with await system.plain() as plain:
            before = await system.agents(plain, "nap")
            tasks = [await plain.submit("nap", {"n": n, "seconds": 0.5}) for n in range(50)]
            server.kill()
            until(lambda: NOBODY.search(system.words))
            server.start()
            story = await plain.until_ended("nap", tasks)
            story.check_once("nap", tasks)
            assert await system.agents(plain, "nap") == before
            assert (await plain.ask("nap", {"n": 7})).json["n"] == 7
    assert "Traceback" not in system.words


async def test_a_server_that_hangs_is_noticed(systems: Callable[..., Running], servers: Callable[..., Server]) -> None:
    """Stopped, not dead: the connections stay open and nothing comes."""
    server = servers(port=free_port())
    server.start()
    with systems(("Nap", 1), nats=server.url) as system:
        os.kill(server.pid, signal.SIGSTOP)
        try:
            until(lambda: NOBODY.search(system.words), timeout=60)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        async with await system.plain() as plain:
            reply = await plain.final("nap", await plain.submit("nap", {"n": 1}))
            assert reply.json["n"] == 1


async def test_a_server_without_jetstream_is_said(systems: Callable[..., Running], bare_server: str) -> None:
    system = systems(("Nap", 1), nats=bare_server).launch()
    until(lambda: "has no JetStream" in system.words)
    assert "Traceback" not in system.words


@pytest.fixture
def bare_server() -> object:
    """A nats-server without JetStream."""
    import subprocess

    from dspex.bus.server import server_binary

    port = free_port()
    process = subprocess.Popen([str(server_binary()), "-a", "127.0.0.1", "-p", str(port)], stderr=subprocess.DEVNULL)
    yield f"nats://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.mark.parametrize("connect", [Client.connect, Caller.connect])
async def test_a_single_command_gives_up_with_one_sentence(connect: Callable[..., object]) -> None:
    url = f"nats://me:secret@127.0.0.1:{free_port()}"
    with pytest.raises(ConnectionFailed) as failed:
        await connect(url, wait=0.3)  # type: ignore[misc]
    words = str(failed.value)
    assert "127.0.0.1" in words and "connection refused" in words and "dspex up" in words
    assert "secret" not in words and "\n" not in words


@pytest.mark.parametrize("url", ["nats://no-such-host.invalid:4222", "nats://127.0.0.1:99999", "not a url", "http://127.0.0.1"])
async def test_an_address_that_cannot_work_is_one_sentence_too(url: str) -> None:
    with pytest.raises(ConnectionFailed) as failed:
        await asyncio.wait_for(Client.connect(url, wait=0.3), 30)
    assert "\n" not in str(failed.value)


async def test_something_else_on_the_port_is_one_sentence_too() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        with pytest.raises(ConnectionFailed):
            await asyncio.wait_for(Client.connect(f"nats://127.0.0.1:{port}", wait=0.3), 30)
