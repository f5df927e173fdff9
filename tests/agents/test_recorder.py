"""What is written, when, and what happens when it cannot be: the recorder with a log that does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest
from msgspec import Raw
from pydantic import TypeAdapter

from dspex.agents import recorder as module
from dspex.agents.recorder import Recorder, Renewing, Suspended
from dspex.agents.writer import BEHIND, MAX_COMMIT, Superseded
from dspex.core.codec import encode_commit
from dspex.core.effects import Call, Diverged, idempotency_key, spend
from dspex.core.errors import BudgetExhausted, EffectFailed, LimitExceeded, LogError, ProgramFailed
from dspex.core.events import (
    EffectRecorded,
    Event,
    Head,
    Payload,
    SignalReceived,
    TaskClaimed,
    TaskForked,
    TaskRetried,
    TaskSleeping,
    Usage,
)
from dspex.core.ports import Appended, Conflict
from dspex.core.spending import Cost
from dspex.store.memory import MemoryLog


class Fake:
    """An attempt: `commits` is its log, `turn` what the next commits wait for or raise."""

    id = "7"
    limit = 1 << 20
    lenient = over = False
    deadline: float | None = None
    left = 60.0

    def __init__(self) -> None:
        self.claimed = self.suspended = False
        self.commits: list[list[Payload]] = []
        self.under_way = self.most = 0
        self.turn: Callable[[], Awaitable[Any]] = lambda: asyncio.sleep(0.001)
        self.inbox: list[SignalReceived] = []
        self.budget: list[tuple[str, Cost | Usage]] = []
        self.refusals: list[Exception] = []
        self.branches: set[asyncio.Task[Any]] = set()

    def claim(self) -> TaskClaimed:
        return TaskClaimed(attempt=1, agent="a", assignment="x")

    def events(self, payloads: Sequence[Payload]) -> list[Event]:
        return [_event(payload) for payload in payloads]

    async def commit(self, events: list[Event]) -> Appended | Conflict:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            answer = await self.turn()
        finally:
            self.under_way -= 1
        if isinstance(answer, Conflict):
            return answer
        self.commits.append([event.data for event in events])
        self.claimed = True
        return Appended(Head(1, 1))

    async def signals(self, name: str) -> list[SignalReceived]:
        await asyncio.sleep(0.001)
        return [signal for signal in self.inbox if signal.name == name]

    async def call(self, program: str, body: bytes, key: str) -> bytes:
        return body

    async def reserve(self, cost: Cost, read_only: bool) -> Fake:
        self.budget.append(("reserve", cost))
        if self.refusals:
            raise self.refusals.pop(0)
        return self

    def settle(self, usage: Usage) -> None:
        self.budget.append(("settle", usage))

    def charge(self, usage: Usage) -> None:
        self.budget.append(("charge", usage))

    def seal_effect(self, place: str) -> None:
        raise AssertionError(place)

    def suspend(self) -> None:
        self.suspended = True

    @property
    def keys(self) -> list[str]:
        return [p.key for commit in self.commits for p in commit if isinstance(p, EffectRecorded)]


@pytest.fixture
async def fake() -> Fake:
    return Fake()


@pytest.fixture
async def recorder(fake: Fake) -> Recorder:
    return Recorder(fake, [], asyncio.get_running_loop())


def call(key: str, act: Callable[[], Any] = lambda: 1, *, digest: str = "d", **kind: bool) -> Call:
    async def perform() -> Any:
        return act()

    return Call(key=key, name=key, digest=digest, act=perform, adapter=TypeAdapter(Any), **kind)


async def test_the_claim_is_in_the_log_before_the_first_effect_leaves(fake: Fake, recorder: Recorder) -> None:
    assert await recorder.perform(call("a", lambda: [type(p).__name__ for p in fake.commits[0]])) == ["TaskClaimed"]


async def test_an_effect_waits_for_every_record_before_it(fake: Fake, recorder: Recorder) -> None:
    for key in "abc":
        await recorder.perform(call(key))
    assert await recorder.perform(call("d", lambda: fake.keys)) == ["a", "b", "c"]


async def test_what_stays_inside_waits_for_nothing(fake: Fake, recorder: Recorder) -> None:
    assert [recorder.perform_now(call(key, outside=False), lambda: 5) for key in "ab"] == [5, 5]
    assert fake.commits == []
    assert await recorder.perform(call("c", lambda: fake.keys)) == ["a", "b"]
    assert isinstance(fake.commits[0][0], TaskClaimed)


async def test_what_stays_inside_is_taken_along_by_the_last_commit(fake: Fake, recorder: Recorder) -> None:
    recorder.perform_now(call("a", outside=False), lambda: 5)
    assert [p.key for p in await recorder.rest() if isinstance(p, EffectRecorded)] == ["a"]


async def test_a_record_is_written_soon_though_nothing_asks_for_it(fake: Fake, recorder: Recorder) -> None:
    await recorder.perform(call("a"))
    await asyncio.sleep(BEHIND + 0.05)
    assert fake.keys == ["a"]


async def test_one_append_is_under_way_at_a_time_and_takes_what_has_come(fake: Fake, recorder: Recorder) -> None:
    async def slow() -> None:
        await asyncio.sleep(0.02)

    fake.turn = slow
    await asyncio.gather(*(recorder.perform(call(f"k{n}")) for n in range(50)))
    await recorder.perform(call("last"))
    assert fake.most == 1
    assert len(fake.commits) <= 4
    assert sorted(fake.keys) == sorted(f"k{n}" for n in range(50))


async def test_the_log_grows_with_the_number_of_effects(fake: Fake, recorder: Recorder) -> None:
    for n in range(300):
        await recorder.perform(call(f"k{n}"))
    written = sum(map(len, fake.commits)) + len(await recorder.rest())
    assert written == 301


async def test_no_commit_is_larger_than_its_bound(fake: Fake, recorder: Recorder) -> None:
    for n in range(30):
        recorder.perform_now(call(f"k{n}", outside=False), lambda: "x" * 50_000)
    rest = await recorder.rest()
    commits = [[p for p in commit if isinstance(p, EffectRecorded)] for commit in [*fake.commits, rest]]
    sizes = [sum(len(bytes(record.result)) for record in records) for records in commits]
    assert max(sizes) <= MAX_COMMIT
    assert len(fake.keys) + len(rest) == 30


async def test_a_conflict_ends_the_run_whatever_the_program_makes_of_it(fake: Fake, recorder: Recorder) -> None:
    await recorder.perform(call("a"))
    performed: list[int] = []

    async def lost() -> Conflict:
        return Conflict(Head(9, 9))

    fake.turn = lost
    for _ in range(2):
        with pytest.raises(Suspended):
            await recorder.perform(call("b", lambda: performed.append(1)))
    assert isinstance(recorder.broken, Superseded)
    assert performed == []


async def test_a_log_that_fails_ends_the_run(fake: Fake, recorder: Recorder) -> None:
    async def away() -> None:
        raise LogError("away")

    fake.turn = away
    with pytest.raises(Suspended):
        await recorder.perform(call("a"))
    assert isinstance(recorder.broken, LogError)
    with pytest.raises(Suspended):
        recorder.perform_now(call("b", outside=False), lambda: 1)


async def test_who_stops_waiting_for_a_record_does_not_stop_it(fake: Fake, recorder: Recorder) -> None:
    gate = asyncio.Event()
    fake.turn = gate.wait
    asking = asyncio.create_task(recorder.perform(call("a")))
    beside = asyncio.create_task(recorder.perform(call("b")))
    await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.sleep(0.01)
    assert asking.cancelled()
    assert fake.under_way == 1
    gate.set()
    assert await beside == 1
    assert [type(p) for p in fake.commits[0]] == [TaskClaimed]
    assert await recorder.perform(call("a")) == 1
    assert fake.most == 1


async def test_an_append_whose_asker_was_cancelled_is_repeated_byte_for_byte(fake: Fake) -> None:
    log, sent = MemoryLog(), []

    class Cut(Fake):
        """The first append reaches the log, and its asker is cancelled before the answer comes."""

        async def commit(self, events: list[Event]) -> Appended | Conflict:
            sent.append(encode_commit(events))
            result = await log.append("task.p.7", events, Head())
            if len(sent) == 1:
                await asyncio.sleep(3600)
            self.claimed = True
            return result

    again = Cut()
    recorder = Recorder(again, [], asyncio.get_running_loop())
    asking = asyncio.create_task(recorder.perform(call("a")))
    await asyncio.sleep(0.01)
    asking.cancel()
    await asyncio.wait({asking})
    assert await recorder.rest() == []
    assert again.claimed
    assert recorder.broken is None
    assert len(sent) == 2
    assert sent[0] == sent[1]


async def test_after_the_end_nothing_is_performed(fake: Fake, recorder: Recorder) -> None:
    await recorder.perform(call("a"))
    await recorder.rest()
    performed: list[int] = []
    with pytest.raises(Suspended):
        await recorder.perform(call("b", lambda: performed.append(1)))
    assert performed == []


async def test_an_effect_under_way_at_the_end_is_not_recorded(fake: Fake, recorder: Recorder) -> None:
    gate = asyncio.Event()

    async def act() -> int:
        await gate.wait()
        return 1

    asked = asyncio.create_task(recorder.perform(Call(key="a", name="a", digest="", act=act, adapter=TypeAdapter(Any))))
    await asyncio.sleep(0.01)
    assert await recorder.rest() == []
    gate.set()
    with pytest.raises(Suspended):
        await asked
    assert fake.keys == []


async def test_a_lenient_program_gets_the_record_for_other_arguments(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    fake.lenient = True
    recorder = Recorder(fake, past(EffectRecorded(key="a", name="a", digest="d", result=Raw(b"5"))), running())
    assert await recorder.perform(call("a", lambda: 1 / 0, digest="other")) == 5
    assert "task 7: at a a d was recorded, and a() is asked for now; the record counts" in caplog.text


async def test_what_a_fork_shares_counts_for_other_arguments_and_what_it_did_itself_does_not(fake: Fake) -> None:
    forked = TaskForked(parent="3", at=2, seed="3", records=1)
    mine = [EffectRecorded(key=key, name=key, digest="d", result=Raw(b"5")) for key in "ab"]
    recorder = Recorder(fake, past(forked, *mine), running())
    assert await recorder.perform(call("a", lambda: 1 / 0, digest="other")) == 5
    with pytest.raises(Suspended):
        await recorder.perform(call("b", lambda: 1 / 0, digest="other"))
    assert isinstance(recorder.broken, Diverged)


async def test_a_fork_draws_its_parents_numbers_and_has_keys_of_its_own(fake: Fake) -> None:
    parent = Recorder(fake, [], running())
    other = Fake()
    other.id = "8"
    forked = Recorder(other, past(TaskForked(parent="7", at=0, seed="7")), running())
    assert forked.seed("x") == parent.seed("x")
    keys = [await each.perform(call("k", idempotency_key)) for each in (parent, forked)]
    assert keys[0] != keys[1]


def past(*payloads: Payload) -> list[Event]:
    return [Event("task.p.7", number, "", "", "", "", payload) for number, payload in enumerate(payloads, 1)]


def running() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


async def test_other_arguments_diverge_for_good(fake: Fake) -> None:
    before = _event(EffectRecorded(key="a", name="a", digest="d", result=Raw(b"4")))
    again = Recorder(fake, [before], asyncio.get_running_loop())
    assert await again.perform(call("a")) == 4
    with pytest.raises(Suspended):
        await again.perform(call("a", digest="other"))
    assert isinstance(again.broken, Diverged)
    assert fake.commits == []


async def test_a_task_may_have_so_many_effects(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_RECORDS", 2)
    for key in "ab":
        await recorder.perform(call(key))
    performed: list[int] = []
    with pytest.raises(LimitExceeded, match="2 effects"):
        await recorder.perform(call("c", lambda: performed.append(1)))
    assert performed == []


async def test_a_result_that_is_too_large_is_a_recorded_failure(fake: Fake, recorder: Recorder) -> None:
    fake.limit = 100
    for _ in range(2):
        with pytest.raises(EffectFailed, match="1,002 bytes"):
            await recorder.perform(call("a", lambda: "x" * 1000))
    await recorder.writer.flush()
    assert fake.keys == ["a"]


async def test_the_idempotency_key_belongs_to_task_life_and_place(fake: Fake) -> None:
    loop = asyncio.get_running_loop()
    fresh, again = Recorder(fake, [], loop), Recorder(fake, [], loop)
    clean = Recorder(fake, [_event(TaskRetried(retry=1, type="", message="", until=0.0, clean=True))], loop)
    keys = [await each.perform(call(key, idempotency_key)) for each in (fresh, again, clean) for key in "ab"]
    assert keys[:2] == keys[2:4]
    assert len({*keys}) == 4
    assert all(len(key) == 32 for key in keys)


# -- waiting


def _event(data: Payload) -> Event:
    return Event(aggregate="task.p.7", version=1, time="", source="", correlation="", causation="", data=data)


async def test_a_run_that_only_waits_is_suspended_with_all_it_waits_for(fake: Fake, recorder: Recorder) -> None:
    waits = [asyncio.create_task(recorder.sleep("s", 60)), asyncio.create_task(recorder.signal("g", "go", None))]
    fake.branches = set(waits)
    await asyncio.wait(waits, timeout=2)
    assert fake.suspended
    assert {key: (wait.until is None, wait.signal) for key, wait in recorder.waits.items()} == {
        "s": (False, ""), "g": (True, "go"),
    }  # fmt: skip


async def test_a_run_is_not_suspended_while_an_effect_is_under_way(fake: Fake, recorder: Recorder) -> None:
    gate = asyncio.Event()

    async def act() -> int:
        await gate.wait()
        return 1

    asked = asyncio.create_task(recorder.perform(Call(key="a", name="a", digest="", act=act, adapter=TypeAdapter(Any))))
    sleeping = asyncio.create_task(recorder.sleep("s", 60))
    await asyncio.sleep(0.1)
    assert not fake.suspended
    gate.set()
    assert await asked == 1
    await asyncio.wait([sleeping], timeout=2)
    assert fake.suspended


async def test_a_signal_that_comes_beside_a_busy_branch_is_seen(fake: Fake, recorder: Recorder) -> None:
    busy = asyncio.create_task(recorder.sleep("s", 1.4))
    waiting = asyncio.create_task(recorder.signal("g", "go", None))
    await asyncio.sleep(0.05)
    fake.inbox.append(SignalReceived(name="go", position=3, value=Raw(b'"on"')))
    assert await asyncio.wait_for(waiting, 1.3) == "on"
    await busy
    assert not fake.suspended


async def test_two_branches_never_take_the_same_signal(fake: Fake, recorder: Recorder) -> None:
    fake.inbox = [SignalReceived(name="go", position=n, value=Raw(str(n).encode())) for n in (3, 4)]
    assert sorted(await asyncio.gather(recorder.signal("g", "go", None), recorder.signal("h", "go", None))) == [3, 4]
    assert recorder.taken("go") == {3, 4}


async def test_a_sleep_ends_when_it_was_first_said(fake: Fake) -> None:
    again = Recorder(fake, [_event(TaskSleeping(key="s", until=1.0))], asyncio.get_running_loop())
    await asyncio.wait_for(again.sleep("s", 3600), 1)


@pytest.mark.parametrize("seconds", [float("inf"), float("nan"), 1e12])
async def test_a_sleep_without_an_end_is_refused(recorder: Recorder, seconds: float) -> None:
    with pytest.raises(ValueError, match="a wait takes at most"):
        await recorder.sleep("s", seconds)


async def test_a_thread_that_waits_is_let_go_when_its_run_is_suspended(recorder: Recorder) -> None:
    with pytest.raises(Suspended):
        await asyncio.wait_for(asyncio.to_thread(lambda: recorder.wait_in_thread(recorder.sleep("s", 60))), 2)


async def test_records_that_could_not_be_written_are_not_forgotten_by_the_end(fake: Fake, recorder: Recorder) -> None:
    await recorder.perform(call("a"))

    async def away() -> None:
        raise LogError("away")

    fake.turn = away
    await asyncio.sleep(2 * BEHIND)
    assert isinstance(recorder.broken, LogError)
    with pytest.raises(LogError):
        await recorder.rest()


# -- effects that only read


async def test_what_only_reads_waits_for_nothing_and_shares_a_commit(fake: Fake, recorder: Recorder) -> None:
    for key in "abc":
        assert await recorder.perform(call(key, lambda: len(fake.commits), read_only=True)) == 0
    assert await recorder.perform(call("d", lambda: fake.keys)) == ["a", "b", "c"]
    assert len(fake.commits) == 1


async def test_what_only_reads_is_written_soon(fake: Fake, recorder: Recorder) -> None:
    await recorder.perform(call("a", read_only=True))
    await asyncio.sleep(BEHIND + 0.05)
    assert [type(p).__name__ for p in fake.commits[0]] == ["TaskClaimed", "EffectRecorded"]


async def test_what_only_reads_does_not_run_ahead_of_the_log_without_bound(fake: Fake, recorder: Recorder) -> None:
    gate = asyncio.Event()
    fake.turn = gate.wait
    done: list[int] = []

    async def read() -> None:
        for n in range(40):
            await recorder.perform(call(f"k{n}", lambda: "x" * 30_000, read_only=True))
            done.append(n)

    reading = asyncio.create_task(read())
    await asyncio.sleep(0.1)
    assert sum(30_000 for _ in done) <= 3 * MAX_COMMIT
    assert not reading.done()
    gate.set()
    await reading
    assert len(done) == 40
    assert fake.most == 1


async def test_an_effect_in_a_loop_of_the_programs_own_is_told(recorder: Recorder) -> None:
    def plainly() -> None:
        asyncio.run(recorder.perform(call("a")))

    with pytest.raises(ProgramFailed, match="write `async def predict`"):
        await asyncio.to_thread(plainly)


# -- what effects cost

CENT = Cost(usd=0.01, tokens=100, model="small")


def _costly(act: Callable[[], Awaitable[Any]], **kind: Any) -> Call:
    return Call(key="a", name="a", digest="", act=act, adapter=TypeAdapter(Any), **kind)


def _records(fake: Fake) -> list[EffectRecorded]:
    return [it for commit in fake.commits for it in commit if isinstance(it, EffectRecorded)]


async def test_an_effect_counts_as_what_it_says_it_has_cost(fake: Fake, recorder: Recorder) -> None:
    async def act() -> str:
        spend(usd=0.003, tokens=40)
        await asyncio.to_thread(spend, usd=0.001, tokens=2, model="large")
        return "done"

    assert await recorder.perform(_costly(act, cost=CENT)) == "done"
    await recorder.writer.flush()
    usage = Usage(0.004, 42, 1, "large")
    assert fake.budget == [("reserve", CENT), ("settle", usage)]
    assert [record.usage for record in _records(fake)] == [usage]


async def test_an_effect_that_says_nothing_counts_as_the_most_it_may_cost_also_when_it_raises(
    fake: Fake, recorder: Recorder
) -> None:
    async def act() -> None:
        raise OSError("no line")

    with pytest.raises(OSError, match="no line"):
        await recorder.perform(_costly(act, cost=CENT))
    await recorder.writer.flush()
    usage = Usage(0.01, 100, 1, "small")
    assert fake.budget == [("reserve", CENT), ("settle", usage)]
    assert [record.usage for record in _records(fake)] == [usage]


async def test_an_effect_that_only_reads_is_no_call(fake: Fake, recorder: Recorder) -> None:
    async def act() -> None:
        spend()

    await recorder.perform(_costly(act, cost=CENT, read_only=True))
    assert fake.budget == [("reserve", CENT), ("settle", Usage(0.0, 0, 0, "small"))]


async def test_a_cost_that_nobody_had_said_is_charged(fake: Fake, recorder: Recorder) -> None:
    async def act() -> None:
        spend(usd=1)

    await recorder.perform(_costly(act))
    assert fake.budget == [("charge", Usage(1.0, 0, 1))]


async def test_an_exhausted_budget_is_what_the_effect_raised_and_is_recorded(fake: Fake, recorder: Recorder) -> None:
    async def act() -> None:
        raise AssertionError("performed")

    fake.refusals = [BudgetExhausted("usd of qabot is used up", 1e9)]
    with pytest.raises(BudgetExhausted) as raised:
        await recorder.perform(_costly(act, cost=CENT))
    assert (raised.value.code, raised.value.renews) == (429, 1e9)
    await recorder.writer.flush()
    [record] = _records(fake)
    assert (record.error, bool(record.usage)) == ("dspex.core.errors:BudgetExhausted", False)
    assert fake.budget == [("reserve", CENT)]


async def test_who_waits_for_a_budget_sleeps_until_it_renews(fake: Fake, recorder: Recorder) -> None:
    async def act() -> str:
        raise AssertionError("performed")

    fake.refusals = [Renewing(4e9)]
    asked = asyncio.create_task(recorder.perform(_costly(act, cost=CENT)))
    with pytest.raises((Suspended, asyncio.CancelledError)):
        await asked
    assert fake.suspended
    assert recorder.waits == {"a": TaskSleeping(key="a", until=4e9)}


async def test_nothing_is_reserved_for_an_effect_that_was_recorded(fake: Fake) -> None:
    async def act() -> None:
        raise AssertionError("performed")

    record = EffectRecorded(key="a", name="a", digest="", result=Raw(b"1"), usage=Usage(0.01, 100, 1))
    again = Recorder(fake, [_event(record)], asyncio.get_running_loop())
    assert await again.perform(_costly(act, cost=CENT)) == 1
    assert fake.budget == []
