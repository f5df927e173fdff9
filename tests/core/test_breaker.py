"""Circuit breakers as a pure state machine: windows, what opens and closes them, and the quota of trial calls."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspex import Breaker, BreakerOpen
from dspex.core.breaker import (
    SLICES,
    BreakerState,
    Tally,
    Window,
    breaker_name,
    fold,
    refused_until,
    trial_begins,
    trial_ends,
    trips,
)
from dspex.core.errors import DspexError
from dspex.core.events import BreakerClosed, BreakerHalfOpened, BreakerOpened, Event, Payload
from dspex.core.subjects import valid_token

outcomes = st.tuples(st.floats(0, 2), st.booleans(), st.booleans())
"""Seconds since the one before, whether it failed, whether it was slow."""


def one(failed: bool = False, slow: bool = False) -> Tally:
    return Tally(1, int(failed), int(slow))


def summed(ended: Sequence[tuple[float, bool, bool]]) -> Tally:
    return Tally(len(ended), sum(failed for _, failed, _ in ended), sum(slow for *_, slow in ended))


def evolved(state: BreakerState, payload: Payload) -> BreakerState:
    return fold([Event("breaker.p.e", state.version + 1, "", "", "", "", payload)], state)


# -- windows


@settings(deadline=None)
@given(st.lists(outcomes, max_size=60), st.integers(1, 20))
def test_a_window_by_count_holds_the_last_so_many(ended: list[tuple[float, bool, bool]], size: int) -> None:
    window = Window(Breaker(calls=size))
    for _, failed, slow in ended:
        window.add(one(failed, slow), 0.0)
    assert window.tally(0.0) == summed(ended[-size:])


@settings(deadline=None)
@given(st.lists(outcomes, max_size=60), st.floats(0, 5))
def test_a_window_by_time_holds_the_last_seconds_to_a_twentieth(
    ended: list[tuple[float, bool, bool]], later: float
) -> None:
    seconds, now = 4.0, 1000.0
    window, at = Window(Breaker(window=seconds)), []
    for wait, failed, slow in ended:
        now += wait
        window.add(one(failed, slow), now)
        at.append((now, failed, slow))
    now += later
    found = window.tally(now)
    surely = summed([each for each in at if each[0] > now - seconds + seconds / SLICES])
    at_most = summed([each for each in at if each[0] >= now - seconds - 1e-9])
    assert surely.calls <= found.calls <= at_most.calls
    assert surely.failures <= found.failures <= at_most.failures


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(0, 500), st.integers(1, 50))
def test_calls_that_others_report_count_at_their_rate(calls: int, failures: int, size: int) -> None:
    failures = min(failures, calls)
    window = Window(Breaker(calls=size))
    window.add(Tally(calls, failures, 0), 0.0)
    found = window.tally(0.0)
    assert found.calls == min(calls, size)
    assert abs(found.failures / found.calls - failures / calls) <= 0.5 / found.calls


def test_failures_of_four_agents_with_three_each_open_one_that_needs_ten() -> None:
    breaker = Breaker(failure_rate=1.0, min_calls=10)
    window = Window(breaker)
    verdicts = []
    for _ in range(4):
        window.add(Tally(3, 3, 0), 5.0)
        verdicts.append(trips(breaker, window.tally(5.0), 0.0) is not None)
    assert verdicts == [False, False, False, True]


# -- closed and open


@pytest.mark.parametrize(
    ("tally", "reason"),
    [
        (Tally(9, 9, 9), ""), (Tally(10, 4, 0), ""), (Tally(10, 5, 0), "failures"), (Tally(10, 0, 7), ""),
        (Tally(10, 0, 8), "slow"), (Tally(10, 5, 8), "failures"),
    ],
)  # fmt: skip
def test_a_rate_that_is_reached_opens_it_but_not_before_there_are_enough_calls(tally: Tally, reason: str) -> None:
    breaker = Breaker(failure_rate=0.5, slow_rate=0.8, slow_after="2s", min_calls=10, open_for="5s", window="10s")
    opened = trips(breaker, tally, 100.0)
    assert (opened.reason if opened else "") == reason
    if opened:
        assert (opened.since, opened.due, opened.window) == (100.0, 105.0, "10 s")
        assert (opened.calls, opened.failures, opened.slow) == (tally.calls, tally.failures, tally.slow)


def test_without_slow_after_no_call_is_slow() -> None:
    assert not Breaker().is_slow(1e9)
    assert trips(Breaker(), Tally(100, 0, 100), 0.0) is None
    assert (Breaker(slow_after=2).is_slow(2.0), Breaker(slow_after=2).is_slow(2.1)) == (False, True)


def test_an_open_one_refuses_until_it_is_due() -> None:
    breaker = Breaker(open_for=10)
    opened = trips(breaker, Tally(10, 10, 0), 100.0)
    assert opened
    state = evolved(BreakerState(), opened)
    assert state.status == "open"
    assert refused_until(breaker, state, 109.9) == 110.0
    assert trial_begins(breaker, state, "a", 109.9) is None
    assert refused_until(breaker, state, 110.0) is None
    assert trial_begins(breaker, state, "a", 110.0)


# -- half-open


class Bench:
    """A breaker that stands open and is due, and who tries it."""

    def __init__(self, **options: object) -> None:
        self.breaker = Breaker(**{"open_for": 10, "half_open": 3, "timeout": 4, **options})  # type: ignore[arg-type]
        opened = trips(self.breaker, Tally(100, 100, 0), 0.0)
        assert opened
        self.state, self.now = evolved(BreakerState(), opened), 10.0

    def begin(self, holder: str) -> bool:
        change = trial_begins(self.breaker, self.state, holder, self.now)
        if change:
            self.state = evolved(self.state, change)
        return change is not None

    def end(self, holder: str, result: Tally) -> Payload | None:
        change = trial_ends(self.breaker, self.state, holder, result, self.now)
        if change:
            self.state = evolved(self.state, change)
        return change


def test_no_more_trial_calls_than_the_quota() -> None:
    bench = Bench()
    assert [bench.begin(name) for name in "abcd"] == [True, True, True, False]
    assert bench.state.status == "half_open"
    assert refused_until(bench.breaker, bench.state, bench.now) == bench.now + 1


def test_trial_calls_that_go_well_close_it() -> None:
    bench = Bench()
    assert all(bench.begin(name) for name in "abc")
    changes = [bench.end(name, one()) for name in "abc"]
    assert [type(change) for change in changes] == [BreakerHalfOpened, BreakerHalfOpened, BreakerClosed]
    assert bench.state.status == "closed" and bench.state.calls == 3


def test_it_opens_again_as_soon_as_the_rest_cannot_close_it() -> None:
    bench = Bench()
    assert all(bench.begin(name) for name in "abc")
    bench.now = 12.0
    assert isinstance(bench.end("a", one(failed=True)), BreakerHalfOpened)
    opened = bench.end("b", one(failed=True))
    assert isinstance(opened, BreakerOpened)
    assert (opened.reason, opened.due) == ("trial", 22.0)
    assert bench.end("c", one()) is None, "nobody waits for it any more"


def test_slow_trial_calls_open_it_again() -> None:
    bench = Bench(slow_after=1, slow_rate=0.6)
    assert all(bench.begin(name) for name in "abc")
    changes = [bench.end(name, one(slow=name != "a")) for name in "abc"]
    assert isinstance(changes[-1], BreakerOpened)


def test_a_lost_callers_permit_comes_back_when_its_time_is_over() -> None:
    bench = Bench()
    assert all(bench.begin(name) for name in "abc")
    bench.now += 4.9
    assert not bench.begin("d")
    bench.now += 0.2  # the timeout and a second are over
    assert [bench.begin(name) for name in "defg"] == [True, True, True, False]
    assert bench.end("a", one()) is None, "its permit went to another"


def test_a_call_that_came_to_no_end_gives_its_permit_back() -> None:
    bench = Bench(half_open=1)
    assert bench.begin("a") and not bench.begin("b")
    bench.end("a", Tally())
    assert bench.state.status == "half_open" and bench.state.calls == 0
    assert bench.begin("b")


steps = st.lists(
    st.tuples(st.sampled_from(["begin", "end", "fail", "cancel", "die"]), st.integers(0, 5), st.floats(0, 3)), max_size=80
)


@settings(max_examples=200, deadline=None)
@given(steps, st.integers(1, 4), st.floats(0.05, 1))
def test_whatever_happens_the_quota_holds_and_it_can_always_close(
    work: list[tuple[str, int, float]], quota: int, rate: float
) -> None:
    bench = Bench(half_open=quota, failure_rate=rate)
    running: dict[str, float] = {}
    for count, (verb, who, wait) in enumerate(work):
        bench.now += wait
        before, holders = bench.state, sorted(running)
        if verb == "begin":
            if bench.begin(f"h{count}"):
                running[f"h{count}"] = bench.now
        elif holders:
            holder = holders[who % len(holders)]
            running.pop(holder)
            if verb != "die":
                bench.end(holder, {"end": one(), "fail": one(failed=True), "cancel": Tally()}[verb])
        alive = [permit for permit in bench.state.permits if permit.until > bench.now]
        assert bench.state.calls + len(alive) <= quota or bench.state.status != "half_open"
        if before.status == "open" and bench.state.status == "half_open":
            assert bench.now >= before.due
        assert before.status != "closed" or bench.state.status == "closed", "only its window opens a closed one"
    bench.now += 60
    for number in range(2 * quota + 2):
        if bench.state.status == "closed":
            break
        bench.now += 20
        if bench.begin(f"last{number}"):
            bench.end(f"last{number}", one())
    if bench.state.status != "closed":  # what failed before still counts in this phase; the next one is clean
        bench.now += 60
        for number in range(quota):
            assert bench.begin(f"clean{number}")
            bench.end(f"clean{number}", one())
    assert bench.state.status == "closed"


def test_the_last_event_says_all() -> None:
    bench = Bench()
    for number, holder in enumerate("abc", 2):
        change = trial_begins(bench.breaker, bench.state, holder, bench.now)
        assert change
        bench.state = evolved(bench.state, change)
        alone = fold([Event("breaker.p.e", number, "", "", "", "", change)])
        assert alone == bench.state and len(alone.permits) == number - 1
    assert fold.load(fold.dump(bench.state)) == bench.state


# -- what people write


def test_times_may_be_numbers_or_words() -> None:
    breaker = Breaker(window="10s", open_for="2m", slow_after="500ms", timeout=3)
    assert (breaker.window, breaker.open_for, breaker.slow_after, breaker.timeout) == (10.0, 120.0, 0.5, 3.0)
    assert Breaker().window == 60.0
    assert (Breaker(calls=5).least, Breaker(calls=50).least, Breaker(min_calls=3).least) == (5, 10, 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"failure_rate": 0}, {"failure_rate": 1.1}, {"slow_rate": -1}, {"window": "10s", "calls": 5}, {"calls": 0},
        {"half_open": 0}, {"min_calls": 0}, {"open_for": "soon"}, {"timeout": 0}, {"window": -1}, {"calls": 10_001},
    ],
    ids=str,
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_words_that_name_it(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Breaker(**wrong)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.text(min_size=1, max_size=200))
def test_every_effect_has_a_name_that_a_subject_can_hold(name: str) -> None:
    assert valid_token(breaker_name(name))


def test_a_call_of_another_program_has_a_name_of_its_own() -> None:
    assert breaker_name("call.reader") == "call-reader"
    assert breaker_name("a b") != breaker_name("a*b")


def test_a_refusal_is_made_again_from_what_is_recorded_of_it() -> None:
    error = BreakerOpen("charge is not called", 12.5)
    again = BreakerOpen(*error.args)
    assert (again.message, again.due, again.code, again.type) == ("charge is not called", 12.5, 503, "BreakerOpen")
    assert isinstance(error, DspexError)
