"""What limits say, and the promises of what is lent of them: never more than there is, and nothing is lost for good."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspex.core.audit import audit
from dspex.core.errors import BudgetExhausted, InvalidInput, LimitExceeded, task_error
from dspex.core.events import BudgetLeased, BudgetSettled, EffectRecorded, Event, LimitSet, Payload, Usage
from dspex.core.leases import Bucket, Ledger, Shares, alerts, budget, portions
from dspex.core.limits import Amount, Limit, Scope, bar, budget_aggregate, limit_of, parse_pairs, parse_scope, window_of
from dspex.core.spending import Cost, Spent, cost_of, usage_of
from dspex.core.subjects import parse_aggregate

# -- words


@pytest.mark.parametrize(
    ("texts", "meant"),
    [
        ({"rate": "20/s", "concurrency": "8", "usd": "5/day"}, {"rate": "20/s", "concurrency": "8", "usd": "5/day"}),
        ({"tokens": "100_000 tokens / hour"}, {"tokens": "100000/hour"}),
        ({"usd": "$2.50/month", "calls": "7"}, {"usd": "2.5/month", "calls": "7"}),
        ({"rate": "90/minute", "when_exhausted": "wait"}, {"rate": "90/min", "when_exhausted": "wait"}),
        ({"when_exhausted": "fail", "usd": "1"}, {"usd": "1"}),
    ],
)
def test_limits_are_read_as_people_write_them(texts: dict[str, str], meant: dict[str, str]) -> None:
    assert limit_of(texts).texts() == meant
    assert limit_of(limit_of(texts).texts()) == limit_of(texts)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"rate": "20"}, "20/s"), ({"rate": "20/month"}, "20/s"), ({"rate": "0/s"}, "20/s"),
        ({"concurrency": "8/s"}, "how many at once"), ({"concurrency": "1.5"}, "such as 8"),
        ({"usd": "5/week"}, "one of s, min, hour"), ({"usd": "5/s"}, "min, hour, day or month"),
        ({"usd": "-5"}, "a number is due"), ({"usd": "nan"}, "a number is due"), ({"tokens": "5 usd"}, "a number is due"),
        ({"euros": "5"}, "'euros' is no limit"), ({"when_exhausted": "beg"}, "fail or wait"),
    ],
)  # fmt: skip
def test_another_limit_is_refused_in_words(texts: dict[str, str], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        limit_of(texts)


def test_what_is_set_stands_beside_what_was_and_none_takes_it_away() -> None:
    before = limit_of({"rate": "20/s", "usd": "5/day"})
    assert parse_pairs({"usd": "6/day", "concurrency": "3"}, before).texts() == {
        "rate": "20/s", "concurrency": "3", "usd": "6/day",
    }  # fmt: skip
    assert parse_pairs({"rate": "none", "usd": "none"}, before) == Limit()


@pytest.mark.parametrize("text", ["qabot", "agent:qabot-ce93-1", "tenant:t1", "study:s 1", "model:openai/gpt-4o"])
def test_a_scope_is_what_it_is_written_as(text: str) -> None:
    scope = parse_scope(text)
    assert str(scope) == text
    assert parse_aggregate(scope.aggregate).id == scope.kind
    assert parse_aggregate(budget_aggregate(scope, "usd", "20261123")).kind == "budget"


@pytest.mark.parametrize("text", ["", "qa bot", "planet:x", "agent:", "agent:a.b", "model:", "study:" + "x" * 300])
def test_another_scope_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_scope(text)


@settings(deadline=None)
@given(now=st.floats(0, 4e9), unit=st.sampled_from(["min", "hour", "day", "month"]))
def test_windows_follow_each_other_without_a_gap(now: float, unit: str) -> None:
    window = window_of(unit, now)
    assert window.start <= now < window.end
    assert window_of(unit, window.start) == window
    after = window_of(unit, window.end)
    assert (after.start, after.id > window.id) == (window.end, True)


def test_days_and_months_begin_at_midnight_utc() -> None:
    assert window_of("day", 1_795_478_399.9).id == "20261123"
    assert window_of("day", 1_795_478_400).id == "20261124"
    assert window_of("month", 1_798_761_599).id == "202612" and window_of("month", 1_798_761_600).id == "202701"
    assert window_of("", 5.0) == ("all", 0.0, math.inf)


def test_a_bar_is_as_full_as_its_limit() -> None:
    assert [bar(used, 4, 4) for used in (0, 1, 4, 9)] == ["░░░░", "█░░░", "████", "████"]


def test_an_alert_is_told_once_for_each_percentage() -> None:
    assert [alerts(used, 10, ()) for used in (7.9, 8, 10)] == [[], [80], [80, 100]]
    assert alerts(10, 10, [80]) == [100] and alerts(11, 10, [80, 100]) == []


def test_a_refusal_for_a_budget_is_one_on_both_sides_of_the_bus() -> None:
    error = task_error(429, "used up", type="BudgetExhausted", retry_after=3.0)
    assert isinstance(error, BudgetExhausted) and isinstance(error, LimitExceeded) and error.retry_after == 3.0
    assert BudgetExhausted(*BudgetExhausted("used up", 7.0).args).renews == 7.0


# -- what an effect costs


def test_what_an_effect_says_counts_and_else_the_most_it_may_cost() -> None:
    cost, spent = Cost(0.5, 100, "small"), Spent()
    spent.add(0.1, 3, "")
    spent.add(0.2, 4, "large")
    assert usage_of(cost, spent, read_only=False) == Usage(0.3, 7, 1, "large")
    assert usage_of(cost, None, read_only=True) == Usage(0.5, 100, 0, "small")
    assert usage_of(cost, Spent(), read_only=False) == Usage(0.0, 0, 1, "small")
    assert usage_of(None, None, read_only=False) is None


@pytest.mark.parametrize("usd", [-1, math.nan, math.inf, "1", True])
def test_what_is_no_cost_is_refused(usd: Any) -> None:
    with pytest.raises(InvalidInput, match="0 or more"):
        cost_of(usd, 0, "")


# -- a rate


@settings(deadline=None)
@given(
    count=st.integers(1, 500), unit=st.sampled_from(["s", "min", "hour"]),
    asks=st.lists(st.tuples(st.floats(0, 5), st.integers(1, 40)), min_size=1, max_size=60),
)  # fmt: skip
def test_a_bucket_never_gives_more_than_its_burst_and_what_time_has_brought(
    count: int, unit: str, asks: list[tuple[float, int]]
) -> None:
    rate, bucket, now = Amount(count, unit), Bucket(), 1_000_000.0
    given_at: list[tuple[float, int]] = []
    for pause, tokens in asks:
        now += pause
        given_at.append((now + bucket.take(rate, tokens, now), tokens))
    for start, _ in given_at:
        for end, _ in given_at:
            inside = sum(tokens for when, tokens in given_at if start <= when <= end)
            # What is lent at once is usable when the last of it is, so a piece counts whole.
            piece = max(tokens for _, tokens in asks)
            assert inside <= rate.burst + rate.per_second * max(end - start, 0.0) + piece + 1e-6


def test_a_bucket_that_rests_is_full_again_and_no_fuller() -> None:
    rate, bucket = Amount(20, "s"), Bucket()
    assert [bucket.take(rate, 20, 100.0), bucket.wait(rate, 100.0)] == [0.0, pytest.approx(0.05)]
    assert bucket.take(rate, 21, 200.0) == pytest.approx(0.05)


# -- permits


@settings(deadline=None)
@given(limit=st.integers(0, 40), wants=st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 20), max_size=7))
def test_portions_are_fair_and_give_all_there_is(limit: int, wants: dict[str, int]) -> None:
    given = portions(limit, wants)
    assert sum(given.values()) == min(limit, sum(wants.values()))
    assert all(given[name] <= wants[name] for name in wants)
    for name in wants:
        if given[name] < wants[name]:  # who is short is at most one behind anybody else
            assert all(given[other] <= given[name] + 1 for other in wants)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), limit=st.integers(1, 12))
def test_permits_in_use_never_exceed_the_limit_whatever_is_lost(data: st.DataObject, limit: int) -> None:
    """Holders take and give back as they like between their words; any answer may be lost; the dead come back empty."""
    shares, caps, use = Shares(), dict.fromkeys("abcd", 0), dict.fromkeys("abcd", 0)
    for _ in range(data.draw(st.integers(1, 40))):
        name = data.draw(st.sampled_from("abcd"))
        match data.draw(st.sampled_from(["word", "lost", "start", "end", "die"])):
            case "start" if use[name] < caps[name]:
                use[name] += 1
            case "end" if use[name]:
                use[name] -= 1
            case "die":
                shares.drop(name)
                caps[name] = use[name] = 0
            case "word" | "lost" as fate:
                want = data.draw(st.integers(0, 6))
                have = max(caps[name], use[name])
                cap = shares.ask(name, limit, have=have, want=want, use=use[name], now=0.0)
                begun = data.draw(st.integers(0, max(caps[name] - use[name], 0)))  # before the answer comes
                use[name] += begun
                if fate == "word":
                    caps[name] = cap
        assert sum(use.values()) <= limit


def test_permits_that_come_back_are_there_for_others() -> None:
    shares = Shares()
    assert shares.ask("a", 3, have=0, want=3, use=0, now=0) == 3
    assert shares.ask("b", 3, have=0, want=3, use=0, now=0) == 0
    assert shares.ask("a", 3, have=3, want=3, use=1, now=1) == 2
    assert shares.ask("a", 3, have=2, want=3, use=1, now=2) == 2
    assert shares.ask("b", 3, have=0, want=3, use=0, now=2) == 1
    shares.drop("a")
    assert shares.ask("b", 3, have=1, want=3, use=1, now=9) == 3


# -- budgets


class Bank:
    """The limiter's part of one budget, with what it writes."""

    def __init__(self, limit: float, whole: bool) -> None:
        self.limit, self.whole, self.ledger, self.log = limit, whole, Ledger(), list[Event]()
        self._write(LimitSet(scope="p", limits={"usd": f"{limit:.12f}"}))

    def _write(self, payload: Payload) -> None:
        # Everything happens long after the limit was set, when all hold to it.
        when = f"2026-11-{23 if self.log else 22}T10:00:00.000000Z"
        self.log.append(Event("budget.p.program-usd-all", len(self.log) + 1, when, "t", "", "", payload))
        self.ledger.state = budget([self.log[-1]], self.ledger.state)

    def lend(self, lease: str, want: float, used: float, reserved: float) -> tuple[float, str]:
        self.ledger.report(lease, used, reserved)
        decision = self.ledger.decide(lease, want, self.limit, whole=self.whole)
        more = decision.granted - self.ledger.state.open.get(lease, 0.0)
        if more > 0:
            self._write(BudgetLeased(scope="p", resource="usd", window="all", lease=lease, holder=lease[0], amount=more,
                                     of=self.limit))  # fmt: skip
        return self.ledger.state.open.get(lease, 0.0), decision.refused

    def settle(self, lease: str, used: float, assumed: bool = False) -> None:
        if lease in self.ledger.state.open:
            self._write(BudgetSettled(scope="p", resource="usd", window="all", lease=lease, used=used, assumed=assumed))

    def effect(self, usd: float) -> None:
        record = EffectRecorded(key="k", name="e", digest="", usage=Usage(usd, 0, 1))
        self.log.append(Event("task.p.1", 1, "2026-11-23T10:00:00.000000Z", "/agents/p-1", "", "", record))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), limit=st.floats(0.01, 100), whole=st.booleans())
def test_a_budget_is_never_exceeded_and_all_of_it_adds_up(data: st.DataObject, limit: float, whole: bool) -> None:
    """Holders reserve the most that an effect may cost and spend less or all of it; any of them may die at any time."""
    bank, number, spent, recorded = Bank(limit, whole), 0, 0.0, 0.0
    leases = dict.fromkeys("abc", "")
    used: dict[str, float] = {}
    died = False
    for _ in range(data.draw(st.integers(1, 40))):
        name = data.draw(st.sampled_from("abc"))
        if not leases[name]:
            number += 1
            leases[name] = f"{name}{number}"
            used[leases[name]] = 0.0
        lease = leases[name]
        fate = data.draw(st.sampled_from(["effect", "effect", "close", "die"]))
        if fate == "effect":
            most = data.draw(st.floats(0, limit))
            granted, refused = bank.lend(lease, most, used[lease], 0.0)
            if refused or granted < used[lease] + most - 1e-9:
                assert refused
                continue
            cost = data.draw(st.floats(0, 1)) * most
            used[lease] = round(used[lease] + cost, 9)
            spent += round(cost, 9)
            if data.draw(st.booleans()):
                bank.ledger.report(lease, used[lease], 0.0)
            bank.effect(round(cost, 9))
            recorded += round(cost, 9)
        elif fate == "close":
            bank.settle(lease, used[lease])
            leases[name] = ""
        else:
            died = died or bool(bank.ledger.state.open.get(lease))
            bank.settle(lease, bank.ledger.state.open.get(lease, 0.0), assumed=True)
            leases[name] = ""
        assert bank.ledger.state.committed <= limit + 1e-6
        assert spent <= limit + 1e-6
    for lease in filter(None, leases.values()):
        bank.settle(lease, used[lease])
    assert audit(bank.log) == []
    settled = bank.ledger.state.settled
    assert settled >= recorded - 1e-6
    assert died or settled == pytest.approx(recorded, abs=1e-6)


def test_what_a_dead_holder_had_not_spent_stays_spent_and_the_rest_goes_on() -> None:
    bank = Bank(1.0, whole=False)
    assert bank.lend("a1", 0.4, 0.0, 0.0)[0] == 0.4
    bank.settle("a1", 0.4, assumed=True)
    assert bank.lend("b1", 0.7, 0.0, 0.0) == (0.0, "wait" if bank.ledger.used + 0.7 <= 1.0 else "exhausted")
    assert bank.lend("b1", 0.6, 0.0, 0.0) == (0.6, "")


def test_who_finds_the_rest_lent_but_not_spent_waits_for_it() -> None:
    bank = Bank(1.0, whole=False)
    bank.lend("a1", 0.9, 0.0, 0.0)
    assert bank.lend("b1", 0.5, 0.0, 0.0) == (0.0, "wait")
    bank.settle("a1", 0.2)
    assert bank.lend("b1", 0.5, 0.0, 0.0)[1] == ""


def test_an_effect_that_cost_more_than_it_said_is_true_whatever_the_limit_is() -> None:
    bank = Bank(1.0, whole=False)
    bank.lend("a1", 1.0, 0.0, 0.0)
    granted, refused = bank.lend("a1", 0.1, 1.5, 0.0)
    assert (granted, refused) == (1.5, "exhausted")


@pytest.mark.parametrize(
    ("tail", "words"),
    [
        ([BudgetLeased(scope="p", resource="usd", window="all", lease="b", holder="b", amount=0.9, of=1.0)], "lent or spent"),
        ([BudgetSettled(scope="p", resource="usd", window="all", lease="a", used=0.6)], "spent 0.6 of 0.5"),
        ([BudgetSettled(scope="p", resource="usd", window="all", lease="z", used=0.0)], "never lent"),
        ([BudgetSettled(scope="p", resource="usd", window="all", lease="a", used=0.0)] * 2, "twice"),
        ([EffectRecorded(key="k", name="e", digest="", usage=Usage(0.7, 0, 1))], "only 0.5 were lent"),
    ],
)  # fmt: skip
def test_the_audit_finds_what_does_not_add_up(tail: list[Payload], words: str) -> None:
    bank = Bank(1.0, whole=False)
    first = BudgetLeased(scope="p", resource="usd", window="all", lease="a", holder="a", amount=0.5, of=1.0)
    log = bank.log + [
        Event("task.p.1" if isinstance(it, EffectRecorded) else "budget.p.program-usd-all", 1,
              "2026-11-23T10:00:00.000000Z", "/agents/p-1", "", "", it)
        for it in [first, *tail]
    ]  # fmt: skip
    [fault] = audit(log)
    assert words in fault


def test_scopes_with_names_that_no_subject_can_hold_have_places_of_their_own() -> None:
    one, other = Scope("model", "a/b"), Scope("model", "a.b")
    assert one.aggregate != other.aggregate
