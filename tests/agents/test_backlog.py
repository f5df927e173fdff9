"""What one agent knows of its program's queue, and what it tells those for whom there is no room."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dspex.agents import backpressure as module
from dspex.agents.backpressure import MAX_STORING, MAX_STORING_BYTES, UNKNOWN, Backlog
from dspex.bus.pull import Delivery
from dspex.bus.wire import Message
from dspex.core.errors import LimitExceeded


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    yield clock


class Nobody:
    """A connection on which nobody is asked anything."""

    def call(self, subject: str, data: bytes) -> Any:
        raise AssertionError(f"{subject} was asked")


def delivery(sequence: int, pending: int) -> Delivery:
    reply = f"$JS.ACK.S.task-p.1.{sequence}.{sequence}.1795452312182236038.{pending}"
    return Delivery(Message(b"dspex.task.p", reply.encode(), b"{}", None))


async def backlog(most: int | None = 100, hungry: Callable[[], bool] = lambda: False) -> Backlog:
    return Backlog(Nobody(), ("S", "task-p"), "p", most, hungry)  # type: ignore[arg-type]


def refusal(found: Backlog, size: int = 10) -> LimitExceeded:
    with pytest.raises(LimitExceeded) as error:
        found.check(size)
    return error.value


async def test_a_delivery_says_how_many_wait(clock: Clock) -> None:
    found = await backlog()
    found.check(10)
    found.seen(delivery(1, 99))
    found.check(10)
    found.seen(delivery(2, 100))
    error = refusal(found)
    assert "100 tasks of p wait already, and 100 may" in error.message and error.retry_after == UNKNOWN
    found.seen(delivery(3, 0))
    found.check(10)


async def test_what_was_stored_since_counts_too(clock: Clock) -> None:
    found = await backlog(3)
    found.seen(delivery(1, 0))
    for stored in (True, True, False):
        found.begin(10)
        found.end(10, stored=stored)
    found.check(10)
    found.begin(10)
    assert found.waiting == 3 and refusal(found)
    found.end(10, stored=False)
    found.seen(delivery(2, 1))
    assert found.waiting == 1


async def test_the_wait_is_by_the_pace_of_all_agents(clock: Clock) -> None:
    found = await backlog(1000)
    found.seen(delivery(100, 1200))
    clock.now += 2
    found.seen(delivery(200, 1100))  # a hundred in two seconds, whoever got them
    error = refusal(found)
    assert error.retry_after == (1100 - 750) / 50
    assert "at 50.0 a second there is room in about 7 s" in error.message
    clock.now += 0.5
    assert refusal(found).retry_after == error.retry_after


async def test_when_nothing_moves_the_wait_grows_up_to_its_longest(clock: Clock) -> None:
    found = await backlog(1000)
    found.seen(delivery(100, 1200))
    clock.now += 1
    found.seen(delivery(200, 1100))
    found._looked = float("inf")  # nobody to ask
    waits = []
    for _ in range(5):
        clock.now += 30
        waits.append(refusal(found).retry_after or 0)
    assert waits == sorted(waits) and waits[-1] == 300.0


async def test_who_asks_for_tasks_and_gets_none_has_an_empty_queue(clock: Clock) -> None:
    found = await backlog(10, hungry=lambda: True)
    found.seen(delivery(1, 50))
    assert found.waiting == 50
    clock.now += 1.1
    assert found.waiting == 0


async def test_what_is_stored_at_once_is_bounded_by_count_and_by_bytes(clock: Clock) -> None:
    found = await backlog(None)
    for _ in range(MAX_STORING):
        found.begin(1)
    assert "are being stored here" in refusal(found).message
    found.end(1, stored=True)
    found.check(1)
    large = await backlog(None)
    large.check(2 * MAX_STORING_BYTES)  # alone it may be as large as the server lets it
    large.begin(MAX_STORING_BYTES)
    assert refusal(large, 1).retry_after == 0.5


async def test_without_a_bound_any_number_may_wait(clock: Clock) -> None:
    found = await backlog(None)
    found.seen(delivery(1, 10**6))
    found.check(10)
