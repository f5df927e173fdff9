"""Whatever comes to a door, somebody says in a sentence what is wrong with it, and every process lives on in its bounds."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nats.errors import Error as NatsError
from tests.e2e.plain import Plain, Reply
from tests.e2e.running import PROGRAMS, Running

PRIVATE = Path(__file__).parent / "private.py"
PLANS = ((f"{PROGRAMS}:Work", 1), (f"{PRIVATE}:Vetting", 1))
LONG = 60.0
MOST = 512 << 20
"""Bytes that a process of ours may take after all of it."""

SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20)
NAMES = st.sampled_from([
    "text", "do", "seconds", "task", "name", "value", "score", "feedback", "key", "after", "limit", "program", "aggregate",
    "values", "base", "registration", "replace", "position", "state", "since", "until", "repair", "against_log", "reason", "ssn",
]) | st.text(max_size=8)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=5), max_leaves=12)

pytestmark = pytest.mark.timeout(300)


def _deep(depth: int, opening: str) -> bytes:
    return (opening * depth).encode()


BODIES = st.one_of(
    st.binary(max_size=200),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(NAMES, VALUES, max_size=6).map(lambda value: json.dumps(value).encode()),
    st.builds(_deep, st.integers(1, 200_000), st.sampled_from(['[', '{"text":', '{"value":[', '{"task":'])),
    st.builds(lambda depth: b'{"text":' + b"[" * depth + b"]" * depth + b"}", st.integers(1, 100_000)),
    st.builds(lambda size: b'{"text":"' + b"x" * size + b'"}', st.sampled_from([70_000, 1 << 20, 7 << 20])),
    st.builds(lambda digits: b'{"task":' + b"9" * digits + b"}", st.integers(1, 100_000)),
    st.sampled_from([
        b"", b"null", b"[]", b"{}", b'"', b"\xff\xfe", b'{"text":"\xed\xa0\x80"}', b'{"text":1e999}', b'{"text":NaN}', b"{}{}",
        b'{"text":"a","text":"b"}', b'{"task":-1}', b'{"task":0}', b'{"task":1e400}', b'{"task":"\\u0000"}', b'{"task":{"task":1}}',
    ]),
)  # fmt: skip
HARD = [
    b"[" * 200_000, b'{"text":' * 100_000, b'{"text":' + b"[" * 500 + b"]" * 500 + b"}", b'{"text":"' + b"x" * (7 << 20) + b'"}',
    b'{"task":' + b"9" * 100_000 + b"}", b"[" + b"[]," * 500_000 + b"[]]", b'{"task":' + b'{"task":' * 300 + b"1" + b"}" * 301,
    b"\xff" * 100_000, b'{"value":' + b"[" * 900 + b"]" * 900 + b',"task":1,"name":"go"}',
    b'{"task":1,"score":1,"feedback":"' + b"y" * 2_000_000 + b'"}', b'{"values":' + b'{"a":' * 400 + b"1" + b"}" * 401,
]  # fmt: skip
"""Sent to every door, whatever else is thought up."""
TEXTS = st.text(st.characters(codec="ascii", exclude_characters="\r\n\0"), max_size=60) | st.sampled_from(["", "-1", "1e999", "9" * 400, "%s"])
# Not `Dspex-Code`: a task that names code which nobody has waits for it, as it should.
HEADERS = st.dictionaries(
    st.sampled_from([
        "Dspex-Key", "Dspex-Deadline", "Dspex-Wait", "Dspex-Assignment", "Dspex-Fork", "Dspex-Sealed", "Dspex-Task",
        "Dspex-Subject", "Dspex-Reply", "Dspex-Correlation", "Dspex-Parent", "traceparent", "If-Version", "Nats-Request-Info",
    ]), TEXTS, max_size=3,
)  # fmt: skip
DOORS = (
    "dspex.ask.work", "dspex.submit.work", "dspex.ask.vetting", "dspex.result.work", "dspex.variables.work.get",
    "dspex.variables.work.propose", "dspex.registry.register", "dspex.registry.guard.work", "dspex.log.read", "dspex.log.head",
    "dspex.archive.verify", "dspex.archive.tasks", "dspex.archive.mentions", "dspex.archive.views", "dspex.privacy.forget",
    "dspex.limits.set", "dspex.limits.ls", "dspex.limits.lease.work", "dspex.dlq.work.retry", "dspex.dlq.work.drop", "dspex.breakers.work.reset",
)  # fmt: skip
SOME = settings(
    max_examples=int(os.environ.get('DSPEX_FUZZ', '4')), deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)  # fmt: skip


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with Running(tmp_path_factory.mktemp("fuzzed") / "data", *PLANS) as system:
        yield system


class Loop:
    """An event loop in a thread: a client must answer the server's pings while examples are being thought up."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run_until_complete(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def plain(system: Running, loop: Loop) -> Iterator[Plain]:
    client = loop.run_until_complete(system.plain())
    yield client
    loop.run_until_complete(client.close())


@pytest.fixture(scope="module")
def born(system: Running, plain: Plain, loop: Loop) -> list[int]:
    """The processes as they were at first."""
    loop.run_until_complete(plain.ask("work", {"text": "first"}))
    return sorted(system.descendants())


async def _asked(plain: Plain, door: str, body: bytes, headers: dict[str, str]) -> None:
    try:
        message = await plain.nc.request(door, body, timeout=LONG, headers={"Dspex-Wait": "0", **headers})
    except NatsError as error:
        raise AssertionError(f"{door} {body[:80]!r} {headers}: {error!r}") from None
    reply = Reply(message)
    if reply.code is None or reply.code == 202:
        return  # it made sense
    said = (message.headers or {}).get("Nats-Service-Error", "")
    assert 400 <= reply.code < 500 and said, f"{door} {body[:80]!r} {headers}: {reply.code} {said!r} {reply.body[:300]!r}"
    assert reply.error["message"], reply.body
    assert "Traceback" not in reply.body.decode() and len(reply.body) < 10_000


@pytest.mark.parametrize("door", DOORS)
def test_a_door_says_what_is_wrong(door: str, plain: Plain, born: list[int], loop: Loop) -> None:
    @SOME
    @given(st.lists(st.tuples(BODIES, HEADERS), min_size=6, max_size=12))
    def fuzzed(sent: list[tuple[bytes, dict[str, str]]]) -> None:
        async def all_at_once() -> None:
            await asyncio.gather(*(_asked(plain, door, body, headers) for body, headers in sent))

        loop.run_until_complete(all_at_once())

    fuzzed()

    async def hard() -> None:
        await asyncio.gather(*(_asked(plain, door, body, {}) for body in HARD))

    loop.run_until_complete(hard())


@pytest.mark.parametrize("program", ["work", "vetting"])
def test_what_is_stored_ends_in_words(program: str, plain: Plain, born: list[int], loop: Loop) -> None:
    async def each(body: bytes, headers: dict[str, str]) -> None:
        for door in ("outcome", "signal"):
            await plain.nc.request(f"dspex.{door}.{program}", body, timeout=LONG, headers=headers or None)
        wanted = {name: value for name, value in headers.items() if name != "Dspex-Deadline"}
        ack = json.loads((await plain.nc.request(f"dspex.task.{program}", body, timeout=LONG, headers=wanted or None)).data)
        end = await plain.final(program, ack["seq"])
        assert end.code is None or 400 <= end.code < 500 or end.error["type"] == "TaskFailed", end.body[:300]

    @SOME
    @given(st.lists(st.tuples(BODIES, HEADERS), min_size=3, max_size=8))
    def fuzzed(sent: list[tuple[bytes, dict[str, str]]]) -> None:
        async def all_at_once() -> None:
            await asyncio.gather(*(each(body, headers) for body, headers in sent))

        loop.run_until_complete(all_at_once())

    fuzzed()

    async def hard() -> None:
        await asyncio.gather(*(each(body, {}) for body in HARD))

    loop.run_until_complete(hard())


def test_a_hint_is_only_a_hint(plain: Plain, born: list[int], loop: Loop) -> None:
    """What nobody answers: cancellations, wakes, and what is published without waiting."""
    subjects = ("dspex.control.work.cancel", "dspex.wake.work", "dspex.chunk.work.1", "dspex.ask.work", "dspex.archive.mentions")

    @SOME
    @given(st.lists(st.tuples(BODIES, HEADERS), min_size=4, max_size=8))
    def fuzzed(sent: list[tuple[bytes, dict[str, str]]]) -> None:
        async def all_at_once() -> None:
            for body, headers in sent:
                for subject in subjects:
                    await plain.nc.publish(subject, body, headers=headers or None)
            assert (await plain.ask("work", {"text": "after"})).json["text"] == "after"

        loop.run_until_complete(all_at_once())

    fuzzed()


def test_every_process_lives_on_in_its_bounds(
    system: Running, plain: Plain, born: list[int], loop: Loop
) -> None:
    """Last: what the tests above have sent is behind them."""

    async def well() -> Any:
        assert (await plain.ask("work", {"text": "well"})).json["text"] == "well"
        return (await plain.nc.request("dspex.log.head", b"", timeout=LONG)).data

    loop.run_until_complete(well())
    assert sorted(system.descendants()) == born, f"somebody died: {system.words[-3000:]}"
    sizes = {pid: _resident(pid) for pid in born if pid != system.server()}  # Go gives back when it likes
    assert max(sizes.values()) < MOST, sizes
    assert "Traceback" not in system.words and "failed\n" not in system.words


def _resident(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) << 10
