"""Tasks that need other code: handed back while that makes sense, and failed with words when it does not any more."""

from __future__ import annotations

import json
import time
from typing import Any, cast

import pytest
from msgspec import Raw
from tests.agents.delivering import nothing_private

from dspex import Program, Schema
from dspex.agents.run import Run
from dspex.agents.versions import Versions
from dspex.agents.waiting import Given, Waiting, Woken
from dspex.bus.pull import ACK, Delivery
from dspex.bus.wire import Message
from dspex.core import headers as h
from dspex.core.codec import rfc3339
from dspex.core.events import (
    EffectRecorded,
    Event,
    Head,
    Payload,
    SignalReceived,
    TaskClaimed,
    TaskCompleted,
    TaskFailed,
    TaskRetried,
    TaskSleeping,
)
from dspex.core.subjects import Subjects
from dspex.core.task import TaskState
from dspex.store.memory import MemoryLog

OURS, THEIRS = "0123456789ab", "ba9876543210"
SUBJECTS = Subjects()


class Drains(Program):
    """Waits a minute for its code."""

    on_change = "drain"
    drain_time = 60.0

    class Input(Schema):
        n: int = 0

    class Output(Schema):
        n: int

    def predict(self, input: Input) -> Output:
        return self.Output(n=input.n)


class Words:
    """What was said of deliveries."""

    max_payload = 1 << 20

    def __init__(self) -> None:
        self.said: list[bytes] = []
        self.armed: list[str] = []

    async def request(self, subject: str, data: bytes, *, headers: dict[str, str] | None = None) -> Message:
        self.armed.append(f"{subject} {(headers or {}).get('Nats-Schedule', '')}")
        return Message(b"_INBOX.y", b"", b'{"stream": "DSPEX_TIMER", "seq": 1}', None)

    def acknowledge(self, message: object, word: bytes) -> None:
        self.said.append(word)


class Desk:
    """One agent's hand with tasks of other code, on a log in memory."""

    def __init__(self) -> None:
        self.log, self.words, self.ended = MemoryLog(SUBJECTS), Words(), list[Payload]()
        waiting = Waiting(cast(Any, self.words), self.log, SUBJECTS, "drains", "/agents/a", *nothing_private())
        self.versions = Versions(Drains(), OURS, cast(Any, self.words), self.log, waiting, self)
        self.task = 0

    async def settle(self, run: Run, payload: Payload) -> None:
        assert run.claimed, "no attempt of ours begins"
        self.ended.append(payload)

    def acknowledge(self, run: Run) -> None:
        self.words.acknowledge(run.delivery.message, ACK)

    async def hand_back(
        self, *payloads: Payload, ago: float = 0.0, headers: dict[str, str] | None = None, wake: Delivery | None = None
    ) -> None:
        """Have a task delivered whose last event was so many seconds ago."""
        self.task = await self.log.store(SUBJECTS.door("task", "drains"), b"{}", headers or {})
        if payloads:
            await self.append(f"task.drains.{self.task}", *payloads, ago=ago)
        entry = await self.log.entry(self.task)
        assert entry
        entry = type(entry)(**{name: getattr(entry, name) for name in entry.__struct_fields__} | {"time": time.time() - ago})
        delivery = Woken(entry, wake) if wake else Given(entry, b"_INBOX.x", 2)
        run = cast(Run, type("Attempt", (), {
            "delivery": delivery, "id": str(self.task), "aggregate": f"task.drains.{self.task}", "claimed": False,
        })())  # fmt: skip
        await self.versions.hand_back(run, THEIRS, headers)

    async def append(self, aggregate: str, *payloads: Payload, ago: float = 0.0) -> None:
        when = rfc3339(time.time() - ago)
        events = [Event(aggregate, n, when, "", "", "", payload) for n, payload in enumerate(payloads, 1)]
        await self.log.append(aggregate, events, Head())

    @property
    def delay(self) -> float:
        [word] = self.words.said
        name, _, rest = word.partition(b" ")
        assert name == b"-NAK"
        return float(json.loads(rest)["delay"]) / 1e9


@pytest.fixture
async def desk() -> Desk:
    return Desk()


CLAIM = TaskClaimed(attempt=1, agent="b", assignment="x", code=THEIRS)


def test_a_task_needs_the_code_that_it_names_or_that_began_it() -> None:
    versions = cast(Versions, object.__new__(Versions))
    versions._program, versions._code = Drains(), OURS
    begun = TaskState(status="running", attempts=1, code_version=THEIRS)
    assert versions.other(None) == versions.other({}) == versions.other({h.CODE: OURS}) == ""
    assert versions.other({h.CODE: THEIRS}) == THEIRS
    assert versions.other(None, begun) == THEIRS
    assert versions.other({h.CODE: OURS}, begun) == "", "the header has the last word"
    versions._program = type("Fails", (Drains,), {"on_change": "fail"})()
    assert versions.other(None, begun) == ""


async def test_it_comes_again_later_and_later(desk: Desk) -> None:
    for ago, delay in ((0.0, 0.25), (8.0, 2.0), (50.0, 10.0)):
        desk.words.said.clear()
        await desk.hand_back(CLAIM, ago=ago)
        assert desk.delay == pytest.approx(delay, abs=0.2)
    assert desk.ended == []


def wake_of(task: int, delivered: int = 1) -> Delivery:
    body = json.dumps({"task": str(task)}).encode()
    return Delivery(Message(b"s", b"$JS.ACK.S.c.%d.9.9.1700000000000000000.0" % delivered, body, None))


async def test_a_wake_is_handed_back_as_another_wake(desk: Desk) -> None:
    await desk.hand_back(CLAIM, TaskSleeping(key="z", until=time.time() - 8), ago=8.0, wake=wake_of(1))
    assert desk.words.said == [ACK], "one that is delivered again would say that its taker had died"
    [armed] = desk.words.armed
    assert armed.startswith(f"dspex.timer.drains.{desk.task} @at 20")


async def test_a_wake_for_a_task_that_runs_is_lost_only_when_its_holder_has_a_delivery(desk: Desk) -> None:
    waiting = Waiting(cast(Any, desk.words), desk.log, SUBJECTS, "drains", "/agents/a", *nothing_private())
    await desk.hand_back(CLAIM)
    assert await waiting.woken(wake_of(desk.task), OURS) is None
    assert await waiting.woken(wake_of(desk.task, 2), OURS) is not None, "its taker has died"
    await desk.hand_back(CLAIM, headers={h.CODE: THEIRS})
    assert await waiting.woken(wake_of(desk.task), OURS) is not None, "who has it may have no delivery of it"
    assert await waiting.woken(wake_of(desk.task), THEIRS) is None


async def test_one_that_has_ended_is_only_acknowledged(desk: Desk) -> None:
    await desk.hand_back(CLAIM, TaskCompleted(output=Raw(b"{}")))
    assert desk.words.said == [ACK]


async def test_after_its_time_it_fails_and_both_versions_are_named(desk: Desk) -> None:
    await desk.hand_back(CLAIM, ago=61.0)
    [failed] = desk.ended
    assert isinstance(failed, TaskFailed) and failed.type == "CodeUnavailable"
    assert THEIRS in failed.message and OURS in failed.message and "within 60 s" in failed.message
    assert desk.words.said == []


async def test_one_that_runs_elsewhere_may_be_silent_for_as_long_as_a_try_takes(desk: Desk) -> None:
    await desk.hand_back(CLAIM, ago=200.0, headers={h.CODE: THEIRS})
    assert desk.delay == 10.0 and desk.ended == []
    await desk.hand_back(CLAIM, ago=301.0, headers={h.CODE: THEIRS})
    assert [type(payload) for payload in desk.ended] == [TaskFailed]


@pytest.mark.parametrize(("deadline", "code"), [("1", 408), ("nonsense", 400)])
async def test_its_deadline_counts(desk: Desk, deadline: str, code: int) -> None:
    await desk.hand_back(ago=2.0, headers={h.CODE: THEIRS, h.DEADLINE: deadline})
    [failed] = desk.ended
    assert isinstance(failed, TaskFailed) and failed.code == code


@pytest.mark.parametrize(
    "last",
    [
        TaskSleeping(key="z", until=time.time() + 1000),
        TaskSleeping(key="z", signal="go"),
        TaskRetried(retry=1, type="E", message="m", until=time.time() + 1000),
    ],
    ids=["time", "signal", "retry"],
)
async def test_one_that_sleeps_on_is_left_to_its_wake(desk: Desk, last: Payload) -> None:
    await desk.hand_back(CLAIM, last, ago=500.0)
    assert desk.words.said == [ACK] and desk.ended == []
    timed = [f"dspex.timer.drains.{desk.task} @at 20"] if getattr(last, "until", None) else []
    assert [said[: len(timed[0])] for said in desk.words.armed] == timed, "its timer is set again, in case it was lost"


@pytest.mark.parametrize("kind", ["time", "retry"])
async def test_one_that_could_go_on_waits_from_then(desk: Desk, kind: str) -> None:
    then = time.time() - 1
    last = TaskRetried(retry=1, type="E", message="m", until=then) if kind == "retry" else TaskSleeping(key="z", until=then)
    await desk.hand_back(CLAIM, last, ago=500.0)
    assert desk.delay < 5 and desk.ended == []


async def test_a_signal_that_was_taken_wakes_nobody_again(desk: Desk) -> None:
    taken = EffectRecorded(key="s", name="signal.go", digest="", arguments=[5])
    waits = TaskSleeping(key="t", signal="go")
    inbox = "inbox.drains.1"
    await desk.append(inbox, SignalReceived(name="go", position=5, value=Raw(b"1")))
    await desk.hand_back(CLAIM, taken, waits, ago=500.0)
    assert desk.task > 1
    waiting = Waiting(cast(Any, desk.words), desk.log, SUBJECTS, "drains", "/agents/a", *nothing_private())
    events = [Event("task.drains.1", n, rfc3339(0), "", "", "", it) for n, it in enumerate((CLAIM, taken, waits), 1)]
    assert await waiting.due("1", events) is None
    other = [*events[:1], *events[2:]]
    assert await waiting.due("1", other) == pytest.approx(time.time(), abs=5)
