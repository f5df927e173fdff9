"""Bad input: refused at ask, TaskFailed at the stored door, in the same words, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from nats.errors import NoRespondersError
from nats.js.errors import NoStreamResponseError
from tests.e2e.plain import Plain
from tests.e2e.running import Running

PLANS = [("Strict", 2)]
GOOD = {"question": "why"}

BODIES: dict[str, tuple[bytes, str]] = {
    "not JSON": (b"question: why", "not JSON"),
    "half of JSON": (b'{"question": "why"', "not JSON"),
    "two documents": (b'{"question": "why"}{"question": "why"}', "not JSON"),
    "empty": (b"", "empty"),
    "blank": (b" \n", "empty"),
    "null": (b"null", "object"),
    "a list": (b'["why"]', "object"),
    "a string": (b'"why"', "object"),
    "wrong type": (b'{"question": 5}', "question"),
    "a number as text": (b'{"question": "why", "count": "3"}', "count"),
    "a float for an integer": (b'{"question": "why", "count": 1.5}', "count"),
    "an item of the wrong type": (b'{"question": "why", "tags": ["a", 1]}', "tags"),
    "missing field": (b'{"count": 1}', "question"),
    "extra field": (b'{"question": "why", "quesion": "why"}', "quesion"),
    "out of range": (b'{"question": "why", "chance": 1.5}', "chance"),
    "below range": (b'{"question": "why", "chance": -0.1}', "chance"),
    "NaN": (b'{"question": "why", "chance": NaN}', "NaN"),
    "NaN in any": (b'{"question": "why", "any": [NaN]}', "NaN"),
    "Infinity": (b'{"question": "why", "chance": Infinity}', "Infinity"),
    "overflow": (b'{"question": "why", "chance": 1e999}', "chance"),
    "a huge integer": (b'{"question": "why", "count": ' + b"9" * 5000 + b"}", "number"),
    "invalid UTF-8": (b'{"question": "\xff\xfe"}', "UTF-8"),
    "half a surrogate pair": (b'{"question": "\\ud800"}', "JSON"),
    "deep lists": (b'{"question": "why", "any": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests"),
    "deep and unclosed": (b"[" * 100_000, "nests"),
    "deep objects": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nests"),
    "1 MiB + 1": (b'{"question": "' + b"x" * ((1 << 20) + 1 - 16) + b'"}', "bytes"),
    "nearly 8 MiB": (b'{"question": "' + b"x" * ((8 << 20) - 64) + b'"}', "bytes"),
    "NUL": (b'{"question": "why"}\x00', "JSON"),
    "a byte order mark": (b'\xef\xbb\xbf{"question": "why"}', "JSON"),
}  # fmt: skip


@pytest.fixture(params=BODIES)
def bad(request: pytest.FixtureRequest) -> tuple[bytes, str]:
    return BODIES[request.param]


async def failure(plain: Plain, task: int) -> dict[str, Any]:
    """The one event that says how a task failed."""
    story = await plain.until_ended("strict", [task])
    *_, last = story.events(f"task.strict.{task}")
    assert story.types(f"task.strict.{task}") == ["TaskClaimed", "TaskFailed"]
    data: dict[str, Any] = last["data"]
    return data


async def test_a_bad_body_is_refused_at_ask_and_fails_at_the_stored_door_in_the_same_words(
    plain: Plain, bad: tuple[bytes, str]
) -> None:
    body, word = bad
    refused = await plain.ask("strict", body)
    assert refused.code == 400
    assert refused.error["type"] == "InvalidInput" and refused.error["task"] is None
    assert word in refused.error["message"] and len(refused.error["message"]) < 300
    task = await plain.submit("strict", body)
    failed = await plain.result("strict", task)
    assert (failed.code, failed.error["type"], failed.error["task"]) == (400, "InvalidInput", str(task))
    assert failed.error["message"] == refused.error["message"]
    assert (await plain.ask("strict", GOOD)).json["answer"] == "why"


async def test_a_bad_body_at_ask_leaves_nothing_in_the_log(plain: Plain) -> None:
    before = (await plain.story()).submitted("strict")
    assert (await plain.ask("strict", b"{}")).code == 400
    good = await plain.ask("strict", GOOD)
    after = (await plain.story()).submitted("strict")
    assert after == [*before, int(good.task)]


async def test_every_bad_body_has_ended_in_the_log_and_can_be_read_there(plain: Plain) -> None:
    tasks = [await plain.submit("strict", body) for body, _ in BODIES.values()]
    await plain.until_ended("strict", tasks)
    for task in tasks:
        events = [event async for event in pages(plain, task=task)]
        assert [event["type"] for event in events] == ["TaskSubmitted", "TaskClaimed", "TaskFailed"]


async def pages(plain: Plain, **query: Any) -> AsyncIterator[dict[str, Any]]:
    """All events that a query names, as a client is told to read them."""
    after = 0
    while True:
        page = await plain.read(after=after, **query)
        for event in page["events"]:
            yield event
        if page["next"] >= page["head"]:
            return
        assert page["next"] > after, "the same page again"
        after = page["next"]


async def test_the_whole_log_can_be_read_page_by_page(plain: Plain) -> None:
    """With the bodies above in it: the largest message is nearly what the server takes."""
    for body, _ in BODIES.values():
        await plain.submit("strict", body)
    story = await plain.until_ended("strict")
    positions = [event["position"] async for event in pages(plain, limit=1000)]
    assert positions == sorted(positions)
    assert set(positions) >= {entry.position for entry in story.entries}


HEADERS: dict[str, tuple[dict[str, str], int, str]] = {
    "bad deadline": ({"Dspex-Deadline": "soon"}, 400, "Dspex-Deadline"),
    "NaN as deadline": ({"Dspex-Deadline": "nan"}, 400, "Dspex-Deadline"),
    "negative deadline": ({"Dspex-Deadline": "-1"}, 400, "Dspex-Deadline"),
    "too long key": ({"Dspex-Key": "k" * 257}, 400, "Dspex-Key"),
    "deadline in the past": ({"Dspex-Deadline": "2020-01-01T00:00:00Z"}, 408, "deadline"),
    "unknown assignment": ({"Dspex-Assignment": "0" * 32}, 404, "assignment"),
}  # fmt: skip


@pytest.mark.parametrize("headers", HEADERS)
async def test_a_bad_header_fails_the_task(plain: Plain, headers: str) -> None:
    fields, code, word = HEADERS[headers]
    task = await plain.submit("strict", GOOD, fields)
    reply = await plain.result("strict", task)
    assert (reply.code, reply.error["task"]) == (code, str(task))
    assert word in reply.error["message"]
    assert (await failure(plain, task))["code"] == code


@pytest.mark.parametrize("headers", HEADERS)
async def test_a_bad_header_is_refused_at_ask_with_the_same_code(plain: Plain, headers: str) -> None:
    fields, code, word = HEADERS[headers]
    reply = await plain.ask("strict", GOOD, fields)
    assert reply.code == code and word in reply.error["message"]


@pytest.mark.parametrize("name", ["Dspex-Actor", "Dspex-Key", "Dspex-Reply", "Other"])
async def test_a_huge_header_of_a_submission_costs_nobody_anything(shared: Running, plain: Plain, name: str) -> None:
    """JetStream itself stores headers of up to 64 KiB."""
    agents = await shared.agents(plain, "strict")
    task = await plain.submit("strict", GOOD, {name: "_INBOX." + "x" * 60_000})
    assert (await plain.result("strict", task)).code == (400 if name == "Dspex-Key" else None)
    assert (await plain.read(task=task))["events"][0]["type"] == "TaskSubmitted"
    assert await shared.agents(plain, "strict") == agents


@pytest.mark.parametrize("size", [40_000, 70_000, (8 << 20) - 2048])
async def test_an_ask_with_huge_headers_is_refused(shared: Running, plain: Plain, size: int) -> None:
    agents = await shared.agents(plain, "strict")
    reply = await plain.ask("strict", GOOD, {"Dspex-Actor": "x" * size})
    assert reply.code == 400 and "headers" in reply.error["message"]
    assert await shared.agents(plain, "strict") == agents


async def test_headers_that_are_not_ours_are_left_out_of_an_ask(plain: Plain) -> None:
    reply = await plain.ask("strict", GOOD, {"Other": "x" * 100_000, "Nats-Rollup": "all", "Dspex-Actor": "me"})
    headers = (await plain.story()).entries[int(reply.task) - 1].headers
    assert set(headers) == {"Dspex-Actor", "Dspex-Reply"}


@pytest.mark.parametrize("wait", ["soon", "-1", "nan", ""])
async def test_a_bad_wait_is_refused(plain: Plain, wait: str) -> None:
    reply = await plain.result("strict", 1, wait=wait)
    assert reply.code == 400 and "Dspex-Wait" in reply.error["message"]


@pytest.mark.parametrize("body", [b"", b"{}", b"[1]", b'{"task": 1, "key": "k"}', b'{"task": null}', b"x" * 300])
async def test_a_result_of_what_is_no_name_is_refused(plain: Plain, body: bytes) -> None:
    reply = await plain.result("strict", body.decode())
    assert reply.code == 400 and reply.error["type"] == "InvalidInput"


@pytest.mark.parametrize("task", ["999999", "0", "-1", "9" * 30, "no-such-key", '{"key": "no-such-key"}', "1"])
async def test_an_unknown_task_is_not_found(plain: Plain, task: str) -> None:
    reply = await plain.result("strict", task)
    assert reply.code == 404 and reply.error["type"] == "NotFound"


async def test_an_unknown_program_has_no_doors(plain: Plain) -> None:
    for door in ("ask", "result", "variables"):
        with pytest.raises(NoRespondersError):
            await plain.nc.request(f"dspex.{door}.strickt", b"{}")
    for door in ("task", "outcome", "signal"):
        with pytest.raises(NoStreamResponseError):
            await plain.store(door, "strickt", GOOD)


@pytest.mark.parametrize("query", [b"[", b'{"after": -1}', b'{"limit": 0}', b'{"limit": 1001}', b'{"what": 1}',
                                   b'{"after": "x"}', b'{"aggregate": "x"}', b'{"program": "a b"}', b"\xff"])  # fmt: skip
async def test_a_bad_query_of_the_log_is_refused(plain: Plain, query: bytes) -> None:
    message = await plain.nc.request("dspex.log.read", query, timeout=10)
    assert message.headers and message.headers["Nats-Service-Error-Code"] == "400"


@pytest.mark.parametrize("subject", [b"dspex.ask.strict", b"dspex.task.strict", b"dspex.result.strict", b"dspex.log.read",
                                     b"$SRV.PING", b"dspex.registry.register"])  # fmt: skip
async def test_invalid_utf8_in_a_reply_subject_harms_nobody(shared: Running, plain: Plain, subject: bytes) -> None:
    agents = await shared.agents(plain, "strict")
    with Raw(shared.url) as raw:
        for reply in (b"\xff\xfe", b"_INBOX.\xff\xfe.1", b"_INBOX.caf\xc3"):
            raw.send(b"PUB %b %b %d\r\n%b\r\n" % (subject, reply, 19, json.dumps(GOOD).encode()))
        raw.flush()
    assert (await plain.ask("strict", GOOD)).json["answer"] == "why"
    await plain.until_ended("strict")
    assert await shared.agents(plain, "strict") == agents


async def test_the_reply_to_an_inbox_that_is_not_utf8_arrives_there(shared: Running, plain: Plain) -> None:
    with Raw(shared.url) as raw:
        raw.send(b"SUB _INBOX.\xff\xfe.* 1\r\n")
        raw.send(b"PUB dspex.ask.strict _INBOX.\xff\xfe.1 19\r\n%b\r\n" % json.dumps(GOOD).encode())
        answer = await asyncio.to_thread(raw.until, b"400", b"reply subject", b"}")
        assert b"_INBOX.\xff\xfe.1" in answer and b"reply subject" in answer


async def test_invalid_utf8_in_a_subject_harms_nobody(shared: Running, plain: Plain) -> None:
    with Raw(shared.url) as raw:
        for subject in (b"dspex.ask.\xff", b"dspex.event.task.strict.\xff", b"dspex.\xff.strict", b"$SRV.PING.\xff"):
            raw.send(b"PUB %b 2\r\n{}\r\n" % subject)
        raw.flush()
    assert (await plain.ask("strict", GOOD)).json["answer"] == "why"
    assert [event async for event in pages(plain, limit=1000)]


EVENT = {"type": "TaskFailed", "source": "/me", "time": "2026-11-23T10:00:00Z", "aggregate": "task.strict.rubbish",
         "version": 1, "correlationid": "1", "causationid": "1", "dataschema": "urn:dspex:TaskFailed:1",
         "data": {"code": 1, "type": "x", "message": "x"}}  # fmt: skip


@pytest.mark.parametrize(
    "body",
    [
        b"rubbish", b"", b"\xff", b"[" * 100_000, b"[{}]", json.dumps([EVENT | {"aggregate": 'task.strict."'}]).encode(),
        json.dumps([EVENT | {"time": '"'}]).encode(), json.dumps([EVENT | {"dataschema": "x"}]).encode(),
        json.dumps([EVENT | {"dataschema": "urn:dspex:TaskFailed:0"}]).encode(),
        json.dumps([EVENT | {"data": {}}]).encode(), json.dumps([EVENT | {"version": "1"}]).encode(),
    ],
)  # fmt: skip
async def test_rubbish_among_the_events_does_not_stop_the_reader(plain: Plain, body: bytes) -> None:
    ack = await plain.nc.jetstream().publish("dspex.event.task.strict.rubbish", body)
    page = await plain.read(after=ack.seq - 1)
    assert page["events"][0]["position"] == ack.seq
    assert page["events"][0]["type"] == "Unreadable"


async def test_a_stranger_can_make_an_agent_answer_only_to_an_inbox(plain: Plain) -> None:
    subscription = await plain.nc.subscribe("dspex.control.>")
    task = await plain.submit("strict", GOOD, {"Dspex-Reply": "dspex.control.x.stop"})
    await plain.result("strict", task)
    await plain.nc.flush()
    assert subscription.pending_msgs == 0


@pytest.mark.parametrize("reply", ["_INBOX.a b", "_INBOX.>", "_INBOX.*", "_INBOX.", "_INBOX.ü", "_INBOX.\t"])
async def test_a_return_address_that_is_no_subject_is_passed_over(
    shared: Running, plain: Plain, reply: str
) -> None:
    agents = await shared.agents(plain, "strict")
    task = await plain.submit("strict", GOOD, {"Dspex-Reply": reply})
    assert (await plain.result("strict", task)).json["answer"] == "why"
    assert await shared.agents(plain, "strict") == agents


class Raw:
    """A connection that says what it is told, byte by byte."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=10)
        self.until(b"INFO ", b"\r\n")
        self.send(b'CONNECT {"verbose":false,"headers":true,"no_responders":true}\r\n')
        self.flush()

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def flush(self) -> None:
        self.send(b"PING\r\n")
        self.until(b"PONG\r\n")

    def until(self, *marks: bytes) -> bytes:
        heard = b""
        while not all(mark in heard for mark in marks):
            data = self._socket.recv(65536)
            assert data, f"the server hung up: {heard[-200:]!r}"
            heard += data
        return heard

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()
