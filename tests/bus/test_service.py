"""A service: many requests at once, errors in plain words, and nothing that an error does not say on purpose."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from dspex.bus.client import Client, Message
from dspex.bus.server import Server
from dspex.bus.service import Endpoint, Request, Service, error_reply
from dspex.core.errors import (
    ConnectionFailed,
    InvalidInput,
    LogCorrupt,
    LogError,
    NotFound,
    ProgramFailed,
    TaskError,
)


@pytest.fixture
async def client(shared_server: Server) -> AsyncIterator[Client]:
    async with await Client.connect(shared_server.url) as client:
        yield client


@pytest.fixture
async def service(client: Client) -> AsyncIterator[Service]:
    service = Service(client, name="tester", id="one", version="1.2.3", description="For tests.", limit=10)
    yield service
    service.stop()


def code(message: Message) -> str | None:
    return message.headers.get("Nats-Service-Error-Code")


def error(message: Message) -> dict[str, str]:
    found: dict[str, str] = json.loads(message.data)["error"]
    return found


async def test_a_plain_handler_answers_at_once(client: Client, service: Service) -> None:
    service.serve(Endpoint("double", "svc.double", lambda request: request.respond(request.data * 2)))
    assert (await client.request("svc.double", b"ab")).data == b"abab"


async def test_slow_requests_are_worked_on_side_by_side(client: Client, service: Service) -> None:
    together = asyncio.Barrier(8)

    async def wait_for_all(request: Request) -> None:
        await together.wait()
        request.respond(b"")

    service.serve(Endpoint("slow", "svc.slow", wait_for_all))
    replies = await asyncio.gather(*(client.request("svc.slow", b"") for _ in range(8)))
    assert not any(code(reply) for reply in replies)


async def test_one_request_too_many_is_told_so(client: Client, service: Service) -> None:
    gate = asyncio.Event()

    async def wait(request: Request) -> None:
        await gate.wait()
        request.respond(b"")

    service.serve(Endpoint("wait", "svc.wait", wait))
    held = [client.call("svc.wait", b"") for _ in range(10)]
    refused = await client.request("svc.wait", b"")
    assert code(refused) == "429" and error(refused)["type"] == "LimitExceeded"
    gate.set()
    assert [code(await reply) for reply in held] == [None] * 10


ERRORS: list[tuple[Exception, str, str]] = [
    (InvalidInput("not like this", task="7"), "400", "not like this"),
    (NotFound("not here"), "404", "not here"),
    (ProgramFailed("no", type="Own"), "500", "no"),
    (TaskError("odd", code=418), "418", "odd"),
    (ValueError("the secret"), "500", "dspex itself failed"),
    (RecursionError("the secret"), "500", "dspex itself failed"),
    (LogError("the secret"), "503", "try again"),
    (ConnectionFailed("the secret"), "503", "try again"),
    (LogCorrupt("the secret"), "500", "dspex itself failed"),
]


@pytest.mark.parametrize("kind", ["plain", "async"])
@pytest.mark.parametrize(("raised", "wanted", "words"), ERRORS, ids=lambda value: type(value).__name__)
async def test_what_a_handler_raises_is_answered_in_plain_words(
    client: Client, service: Service, kind: str, raised: Exception, wanted: str, words: str
) -> None:
    def fail(request: Request) -> None:
        raise raised

    async def fail_later(request: Request) -> None:
        await asyncio.sleep(0)
        raise raised

    endpoint = Endpoint("fail", "svc.fail", fail if kind == "plain" else fail_later)
    service.serve(endpoint)
    reply = await client.request("svc.fail", b"")
    assert code(reply) == wanted and words in error(reply)["message"]
    assert "secret" not in reply.data.decode() + str(reply.headers)
    assert words in reply.headers["Nats-Service-Error"]
    assert (endpoint.requests, endpoint.errors) == (1, 1) and endpoint.last_error.startswith(f"{wanted}:")


def test_an_error_reply_has_a_header_of_one_short_line() -> None:
    body, headers = error_reply(InvalidInput("one\r\ntwo\tthree " + "x" * 1000), task="9")
    assert headers["Nats-Service-Error"].startswith("one two three x") and len(headers["Nats-Service-Error"]) == 500
    assert headers["Dspex-Task"] == "9"
    assert json.loads(body)["error"] == {"type": "InvalidInput", "message": "one\r\ntwo\tthree " + "x" * 1000, "task": "9"}


async def test_an_answer_too_large_for_a_message_is_an_error_and_not_the_end(client: Client, service: Service) -> None:
    async def large(request: Request) -> None:
        request.respond(b"x" * ((8 << 20) + 1))

    service.serve(Endpoint("large", "svc.large", large))
    assert code(await client.request("svc.large", b"")) == "500"
    assert client.connected


async def test_a_stopped_service_takes_nothing_and_finishes_what_it_has(client: Client, service: Service) -> None:
    gate = asyncio.Event()

    async def wait(request: Request) -> None:
        await gate.wait()
        request.respond(b"done")

    service.serve(Endpoint("wait", "svc.finish", wait))
    held = client.call("svc.finish", b"")
    await client.flush()
    service.stop()
    assert (await client.request("svc.finish", b"")).status == 503
    finishing = asyncio.create_task(service.finish(10))
    gate.set()
    await finishing
    assert (await held).data == b"done"


async def test_what_cannot_be_finished_is_answered_too(client: Client, service: Service) -> None:
    async def wait(request: Request) -> None:
        await asyncio.Event().wait()

    service.serve(Endpoint("wait", "svc.never", wait))
    held = client.call("svc.never", b"")
    await client.flush()
    service.stop()
    await service.finish(0.05)
    assert code(await held) == "503"


async def test_discovery_answers_on_all_nine_subjects(client: Client, service: Service) -> None:
    service.serve(Endpoint("double", "svc.double", lambda request: request.respond(b""), metadata={"schema": "{}"}))
    service.announce()
    for verb in ("PING", "INFO", "STATS"):
        for subject in (f"$SRV.{verb}", f"$SRV.{verb}.tester", f"$SRV.{verb}.tester.one"):
            answer = json.loads((await client.request(subject, b"")).data)
            assert (answer["name"], answer["id"], answer["version"]) == ("tester", "one", "1.2.3")
            assert answer["type"] == f"io.nats.micro.v1.{verb.lower()}_response"
    assert json.loads((await client.request("$SRV.INFO.tester", b"")).data)["endpoints"] == [
        {"name": "double", "subject": "svc.double", "queue_group": "q", "metadata": {"schema": "{}"}}
    ]
