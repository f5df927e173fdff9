"""How many agents: within bounds, more when tasks wait, fewer after a while, and no back and forth."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspex.core.scaling import SETTLE, Load, Scale, Scaler

BOTH = Scale(1, 8, wait=1.0, quiet=30.0)


def simulate(scale: Scale, arrivals: list[float], seconds: float, slots: int, agents: int) -> list[int]:
    """The sizes over time of a fluid queue: so many tasks arrive in each second, and each takes so many."""
    scaler, sizes, queue = Scaler(scale), [], 0.0
    age = 0.0
    for now, coming in enumerate(arrivals):
        capacity = agents * slots / seconds
        done = min(queue + coming, capacity)
        queue = queue + coming - done
        age = queue / max(coming, capacity, 1e-9) if queue > 1e-9 else 0.0
        running = min(math.ceil(round(done * seconds, 6)), agents * slots)
        decision = scaler.decide(Load(math.ceil(round(queue, 6)), age, running, slots, seconds), agents, float(now))
        agents = decision.agents if decision else agents
        sizes.append(agents)
    return sizes


def turns(sizes: list[int]) -> int:
    """How often the direction changed."""
    steps = [after - before for before, after in pairwise(sizes) if after != before]
    return sum(1 for one, other in pairwise(steps) if one * other < 0)


@pytest.mark.parametrize(
    ("text", "shown"), [("8", "8"), ("1..8", "1..8"), (" 3 ", "3"), ("0", "0"), ("4..4", "4"), ("1000", "1000")]
)
def test_a_scale_in_words(text: str, shown: str) -> None:
    assert str(Scale.read(text)) == shown


@pytest.mark.parametrize("text", ["", "x", "8..1", "0..4", "1001", "1..1001", "-1", "1..", "1...3"])
def test_what_is_no_scale_is_refused_with_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="agents"):
        Scale.read(text)


def test_a_fixed_number_stays_whatever_waits() -> None:
    scaler = Scaler(Scale(3, 3))
    assert scaler.decide(Load(10_000, 100.0, 3, 1, 1.0), 3, 0.0) is None
    decision = scaler.decide(Load(), 5, 1.0)
    assert decision is not None and decision.agents == 3


def test_it_grows_when_a_task_has_waited_too_long_and_says_so() -> None:
    scaler = Scaler(BOTH)
    assert scaler.decide(Load(40, 0.9, 4, 4, 1.0), 1, 0.0) is None
    decision = scaler.decide(Load(40, 1.1, 4, 4, 1.0), 1, 1.0)
    assert decision is not None and decision.agents == 2
    assert decision.why == "40 tasks wait, the oldest for 1.1 s"


def test_it_waits_for_the_effect_of_what_it_did() -> None:
    scaler = Scaler(BOTH)
    load = Load(40, 5.0, 4, 4, 1.0)
    assert scaler.decide(load, 1, 0.0) is not None
    assert scaler.decide(load, 2, SETTLE - 0.1) is None
    decision = scaler.decide(load, 2, SETTLE)
    assert decision is not None and decision.agents == 4


def test_a_queue_of_quick_tasks_needs_one_more_and_not_many() -> None:
    decision = Scaler(BOTH).decide(Load(400, 1.5, 16, 16, 0.001), 4, 0.0)
    assert decision is not None and decision.agents == 5


def test_it_shrinks_to_what_would_have_done_all_the_time() -> None:
    scaler = Scaler(BOTH)
    for second in range(30):
        assert scaler.decide(Load(0, 0.0, 10 if second == 25 else 2, 4, 1.0), 8, float(second)) is None
    decision = scaler.decide(Load(0, 0.0, 2, 4, 1.0), 8, 30.0)
    assert decision is not None and decision.agents == 4, "10 at once, with 0.7 of 4 slots used"
    for second in range(31, 60):
        assert scaler.decide(Load(), 4, float(second)) is None
    last = scaler.decide(Load(), 4, 60.0)
    assert last is not None and last.agents == 1, "to the least, when nothing comes"


@given(
    st.floats(0.1, 100.0), st.floats(0.01, 20.0), st.integers(1, 16), st.integers(1, 20), st.integers(1, 10),
    st.integers(0, 30),
)  # fmt: skip
def test_a_constant_load_makes_it_settle(
    rate: float, seconds: float, slots: int, agents: int, least: int, more: int
) -> None:
    scale = Scale(least, least + more)
    sizes = simulate(scale, [rate] * 900, seconds, slots, agents)
    assert all(scale.least <= size <= scale.most for size in sizes)
    assert turns(sizes) <= 1, "once up to work off what had piled up, once down to what is needed"
    assert len(set(sizes[600:])) == 1, "and then it stays"
    needed = math.ceil(round(rate * seconds / slots, 6))
    assert sizes[-1] >= min(needed, scale.most)


@given(
    st.lists(
        st.builds(
            Load, st.integers(0, 10**6), st.floats(0, 1e6), st.integers(0, 10**4), st.integers(1, 64), st.floats(0, 600)
        ),
        max_size=200,
    ),
    st.integers(1, 20), st.integers(0, 20), st.integers(0, 50),
)  # fmt: skip
def test_whatever_it_is_told_it_keeps_to_the_bounds(loads: list[Load], least: int, more: int, agents: int) -> None:
    scaler, before = Scaler(Scale(least, least + more)), agents
    for second, load in enumerate(loads):
        decision = scaler.decide(load, agents, float(second))
        if decision:
            assert decision.agents != agents and decision.why
            agents = decision.agents
            assert least <= agents <= least + more
            assert second == 0 or agents <= 2 * before
        before = agents


@given(st.integers(1, 16), st.floats(0.05, 5.0), st.integers(2, 20))
def test_when_nothing_comes_any_more_it_ends_at_the_least(slots: int, seconds: float, most: int) -> None:
    busy, idle = [2.0 * slots / seconds] * 100, [0.0] * 1000
    sizes = simulate(Scale(1, most), busy + idle, seconds, slots, 1)
    assert max(sizes) >= 2 and sizes[-1] == 1
