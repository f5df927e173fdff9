"""Signals and wakes from strangers: whatever they hold, they are taken once, and cost no slot."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec import Raw
from tests.agents.delivering import Client as Granting
from tests.agents.delivering import nothing_private

from dspex.agents import worker as module
from dspex.agents.fates import Fates
from dspex.agents.journal import events_for
from dspex.agents.limits import Limits
from dspex.agents.link import link_pair
from dspex.agents.waiting import Waiting
from dspex.agents.worker import Worker
from dspex.agents.writer import Superseded
from dspex.bus.pull import ACK, Delivery
from dspex.bus.wire import Message
from dspex.core.errors import ConnectionFailed
from dspex.core.events import AgentCrashed, EffectRecorded, Head, TaskClaimed, TaskCompleted, TaskSleeping
from dspex.core.ports import Appended
from dspex.core.subjects import Subjects
from dspex.store.memory import MemoryLog


class Client:
    max_payload = 1 << 20

    def __init__(self) -> None:
        self.said: list[bytes] = []

    def respond(self, message: Message, data: bytes) -> None:
        self.said.append(data)


class Log:
    async def entry(self, position: int) -> Any:
        assert position < 1 << 63
        return SimpleNamespace(position=position, subject="dspex.task.p", headers={})

    async def last(self, aggregate: str) -> None:
        return None


def delivered(body: bytes, times: int = 1) -> Delivery:
    return Delivery(Message(b"s", b"$JS.ACK.S.c.%d.9.9.1700000000000000000.0" % times, body, None))


@pytest.mark.parametrize(
    "body",
    [
        b'{"task": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        json.dumps({"task": "1", "name": "go", "value": "x" * (1 << 20)}).encode(),
        json.dumps({"task": "9" * 5000, "name": "go"}).encode(),
    ],
    ids=["deep", "large", "long"],
)
async def test_a_signal_that_cannot_be_filed_is_not_delivered_for_ever(body: bytes) -> None:
    client: Any = Client()
    log: Any = Log()
    await Waiting(client, log, Subjects(), "p", "/agents/a", *nothing_private()).receive(delivered(body))
    assert client.said == [ACK]


async def test_a_wake_for_no_possible_task_is_none() -> None:
    client: Any = Client()
    log: Any = Log()
    waiting = Waiting(client, log, Subjects(), "p", "/agents/a", *nothing_private())
    assert await waiting.woken(delivered(json.dumps({"task": "9" * 5000}).encode()), "c") is None


async def test_a_wake_is_for_a_task_that_was_taken_with_it_however_often_it_says_it_came() -> None:
    """A consumer with a new leader and a server that was killed have forgotten how often they delivered it."""
    log = MemoryLog()
    task = str(await log.store("dspex.task.p", b"{}", {}))
    name, wake = f"task.p.{task}", json.dumps({"task": task}).encode()
    client: Any = Granting()
    waiting = Waiting(client, log, Subjects(), "p", "/agents/a", *nothing_private())
    step = EffectRecorded(key="k", name="step", digest="", result=Raw(b"1"))
    head, found = Head(), dict[str, list[bool]]()
    for what, payload in {
        "asleep": TaskSleeping(key="k", until=1.0),
        "taken with another": TaskClaimed(attempt=2, agent="b", assignment="x", wake=8),
        "taken with it": TaskClaimed(attempt=3, agent="b", assignment="x", wake=9),
        "and on its way": step,
        "asleep again": TaskSleeping(key="k2", until=1.0),
        "taken by an older version": TaskClaimed(attempt=4, agent="b", assignment="x"),
        "ended": TaskCompleted(output=Raw(b"1"), seconds=1.0),
    }.items():
        result = await log.append(name, events_for(name, head, [payload], source="/agents/b"), head)
        assert isinstance(result, Appended)
        head = result.head
        found[what] = [await waiting.woken(delivered(wake, times), "c") is not None for times in (1, 2)]
    assert found == {
        "asleep": [True, True], "taken with another": [False, False], "taken with it": [True, True],
        "and on its way": [True, True], "asleep again": [False, False], "taken by an older version": [False, True],
        "ended": [False, False],
    }  # fmt: skip
    # Who put it to sleep again may acknowledge this wake at any time: the task is taken with another.
    assert [subject for subject, _ in client.requests if "timer" not in subject] == ["dspex.wake.p"] * 2


async def test_a_wake_for_a_task_at_work_elsewhere_is_looked_at_again_and_takes_it_when_its_process_has_ended() -> None:
    """An acknowledgement that came late may have taken away the wake that the other one holds."""
    log = MemoryLog()
    task = str(await log.store("dspex.task.p", b"{}", {}))
    client: Any = Granting()
    waiting = Waiting(client, log, Subjects(), "p", "/agents/a", *nothing_private())
    claim = TaskClaimed(attempt=2, agent="p-1", assignment="x", wake=8)
    name, wake = f"task.p.{task}", json.dumps({"task": task}).encode()
    asleep = [TaskSleeping(key="k", until=1.0), claim]
    await log.append(name, events_for(name, Head(), asleep, source="/agents/b"), Head())
    assert await waiting.woken(delivered(wake), "c") is None
    assert [subject for subject, _ in client.requests] == [f"dspex.timer.p.{task}"]
    crashed = events_for("agent.p.p-1", Head(), [AgentCrashed(pid=1, reason="SIGKILL")], source="/s")
    await log.append("agent.p.p-1", crashed, Head())
    waiting.fates = Fates(log, "p")  # what was read of the log is kept for a moment
    woken = await waiting.woken(delivered(wake), "c")
    assert woken is not None and not woken.asleep and woken.wake == 9


class Puller:
    held = 1

    def release(self) -> None:
        self.held -= 1


def worker_of(woken: Any, running: dict[int, Any], acknowledge: Any) -> Any:
    made: Any = object.__new__(Worker)
    made.waiting, made.running, made.code = SimpleNamespace(woken=woken), running, "c"
    made.client = SimpleNamespace(acknowledge=acknowledge)
    made.limits = Limits(made.client, Subjects(), "p", "p-1", 1, lambda: 0)
    return made


async def test_a_wake_that_cannot_be_acknowledged_gives_its_slot_back() -> None:
    async def woken(wake: Delivery, code: str) -> None:
        return None

    def acknowledge(message: Message, word: bytes) -> None:
        raise ConnectionFailed("closed")

    puller: Any = Puller()
    with pytest.raises(ConnectionFailed):
        await worker_of(woken, {}, acknowledge)._wake(delivered(b"{}"), puller)
    assert puller.held == 0


async def test_a_wake_of_a_task_whose_retry_is_just_being_committed_is_not_lost() -> None:
    """The retry is in the log and its wake has come, but the attempt that wrote it has not yet let go of the task."""
    running: dict[int, Any] = {}
    let_go = asyncio.Event()

    async def holding() -> None:
        await let_go.wait()
        running.clear()

    held = SimpleNamespace(suspended=False, settling=True, task=asyncio.create_task(holding()), delivery=None)
    running[7] = held

    async def woken(wake: Delivery, code: str) -> Any:
        return SimpleNamespace(position=7, wake=wake.position)

    said: list[bytes] = []
    worker = worker_of(woken, running, lambda message, word: said.append(word))
    taken: list[Any] = []
    worker.take = lambda delivery, puller: taken.append(delivery)
    waking = asyncio.create_task(worker._wake(delivered(b"{}"), Puller()))
    await asyncio.sleep(0.01)
    let_go.set()
    await waking
    assert len(taken) == 1 and not said


async def test_a_run_over_its_time_is_counted_as_stuck_whatever_the_log_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STUBBORN", 0.01)

    settled: list[Any] = []

    async def settle(run: Any, payload: Any) -> None:
        settled.append(payload)
        raise Superseded("task 7 was taken over by another attempt")

    worker = worker_of(None, {}, None)
    worker.name, worker.stuck, worker._forget = "p", 0, lambda run: None
    worker.endings = SimpleNamespace(settle=settle)
    run = SimpleNamespace(id="7", started=0.0, thread=asyncio.get_running_loop().create_future(), task=None)
    await worker._settle_expired(run)
    assert worker.stuck == 1 and len(settled) == 1


def test_a_line_too_long_to_keep_ends_nobody() -> None:
    ours, theirs = link_pair()
    for part in (b'{"refused": "', *[b"x" * 100_000] * 12, b'tail"}\n{"beat": true}\n'):
        ours._socket.setblocking(True)
        ours._socket.sendall(part)
        got = theirs.receive()
    assert got == [{"beat": True}]
    ours.close()
    theirs.close()
