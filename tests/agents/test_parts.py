"""The small parts an agent is made of: the line to its supervisor, its journal, keys, and what a result is named by."""

from __future__ import annotations

import asyncio
import json
import os

import pytest
from msgspec import Raw

from dspex.agents.journal import events_for, head_of, record
from dspex.agents.keys import bind, key_aggregate
from dspex.agents.link import link_pair
from dspex.agents.results import answer_of, task_id_of
from dspex.core.codec import decode_commit
from dspex.core.errors import InvalidInput
from dspex.core.events import AgentStopped, Head, TaskCompleted, TaskDeadLettered, TaskDuplicate, TaskFailed
from dspex.core.subjects import Subjects, parse_aggregate
from dspex.core.task import fold
from dspex.store import MemoryLog

# -- the line


def test_messages_arrive_in_order() -> None:
    one, other = link_pair()
    for n in range(100):
        assert one.send({"n": n, "text": "ü\n"})
    assert [message["n"] for message in other.receive()] == list(range(100))
    one.close()
    other.close()


def test_a_line_that_nobody_reads_never_blocks_and_says_when_it_is_full() -> None:
    one, other = link_pair()
    sent = 0
    while one.send({"text": "x" * 10_000}):
        sent += 1
        assert sent < 10_000
    got = 0
    while one.flush() and (messages := other.receive()):
        got += len(messages)
    assert got >= sent
    one.close()
    other.close()


def test_a_broken_line_is_seen_on_both_sides() -> None:
    one, other = link_pair()
    one.send({"last": "words"})
    one.close()
    assert other.receive() == [{"last": "words"}] and not other.open
    assert not other.send({"n": 1})
    other.close()


# -- the journal


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog(Subjects())


async def test_facts_written_at_once_by_many_are_all_there(log: MemoryLog) -> None:
    await asyncio.gather(
        *(record(log, "agent.nap.a", [AgentStopped(pid=n, reason="told to")], source="/x") for n in range(10))
    )
    found = [event for entry in await log.read("agent.nap.a") for event in decode_commit(entry.body, entry.position)]
    assert [event.version for event in found] == list(range(1, 11))
    assert {event.data.pid for event in found} == set(range(10))  # type: ignore[attr-defined]


async def test_the_head_is_where_the_last_commit_stands(log: MemoryLog) -> None:
    assert await head_of(log, "agent.nap.a") == Head()
    head = await record(log, "agent.nap.a", [AgentStopped(pid=1, reason="x"), AgentStopped(pid=2, reason="x")], source="/x")
    assert head.version == 2 and await head_of(log, "agent.nap.a") == head


def test_events_continue_where_the_aggregate_stands() -> None:
    first, second = events_for("a.b.c", Head(7, 100), [AgentStopped(pid=1, reason="x")] * 2, source="/x", causation="9")
    assert (first.version, second.version) == (8, 9) and first.causation == "9" and first.time == second.time


# -- keys


async def test_a_key_belongs_to_the_first_who_binds_it(log: MemoryLog) -> None:
    owners = await asyncio.gather(*(bind(log, "nap", "order 7", str(task), "/x") for task in range(1, 20)))
    assert len(set(owners)) == 1
    assert await bind(log, "nap", "order 7", "99", "/x") == owners[0]
    assert await bind(log, "nap", "order 7", owners[0], "/x") == owners[0]
    assert await bind(log, "other", "order 7", "99", "/x") == "99"


@pytest.mark.parametrize("key", ["a b", "*", ">", "a.b", "ü", "\x00", "k" * 256])
def test_a_key_of_any_text_has_a_place(key: str) -> None:
    assert parse_aggregate(key_aggregate("nap", key)).kind == "key"


# -- results


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"42", ("task", "42")), (b'"42"', ("task", "42")), (b" 42\n", ("task", "42")), (b'{"task": 42}', ("task", "42")),
        (b'{"task": "42"}', ("task", "42")), (b"order", ("key", "order")), (b'"order"', ("key", "order")),
        (b'{"key": "42"}', ("key", "42")), (b"order 7", ("key", "order 7")), ("ü".encode(), ("key", "ü")),
        (b"\xff", ("key", r"\xff")), (b"-1", ("key", "-1")), ("٤٢".encode(), ("key", "٤٢")), (b'{"task": "order"}', ("key", "order")),
        (b"[" * 200, ("key", "[" * 200)),
    ],
)  # fmt: skip
def test_what_a_result_request_names(body: bytes, named: tuple[str, str]) -> None:
    assert task_id_of(body) == named


@pytest.mark.parametrize(
    "body", [b"", b" ", b"null", b"true", b"1.5", b"[]", b"{}", b'{"key": ""}', b'{"key": 5}', b'{"task": 1, "key": "k"}', b"x" * 257,
             b'{"other": 1}', b"[" * 100_000]
)  # fmt: skip
def test_what_names_nothing_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput, match="name a task"):
        task_id_of(body)


def test_the_answer_of_each_ending() -> None:
    def answer(*payloads: object) -> tuple[bytes, dict[str, str]] | None:
        return answer_of(fold(events_for("task.nap.7", Head(), payloads, source="/x")), "7")  # type: ignore[arg-type]

    assert answer() is None
    assert answer(TaskDuplicate(of="5", key="k")) is None
    assert answer(TaskCompleted(output=Raw(b'{"n":1}'))) == (b'{"n":1}', {"Dspex-Task": "7"})
    for payload, code in (
        (TaskFailed(code=408, type="DeadlineExceeded", message="too late", detail="secret"), "408"),
        (TaskDeadLettered(attempts=3, reason="it died"), "500"),
    ):
        found = answer(payload)
        assert found is not None and found[1]["Nats-Service-Error-Code"] == code and b"secret" not in found[0]
        assert json.loads(found[0])["error"]["task"] == found[1]["Dspex-Task"] == "7"


def test_forks_do_not_share_a_line_by_accident() -> None:
    """A child that closes its siblings' lines leaves them open for their owners."""
    one, other = link_pair()
    pid = os.fork()
    if not pid:
        one.close()
        other.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert one.send({"n": 1}) and other.receive() == [{"n": 1}] and other.open
    one.close()
    other.close()
