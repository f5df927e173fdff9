"""Who is taken for what kills its processes: never somebody that died only in company."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dspex.core.events import AttemptDied
from dspex.core.suspicion import FEW, LOST, Company, company, few, is_proven, is_used_up, pause, why_dead
from dspex.core.task import TaskState


def state(*deaths: tuple[str, bool], attempts: int = 1, rested: int = 0) -> TaskState:
    died = tuple(AttemptDied(attempt=n, agent="a", reason=why, alone=alone) for n, (why, alone) in enumerate(deaths, 2))
    return TaskState(status="running", attempts=attempts, rested=rested, deaths=died)


def test_the_company_shrinks_with_the_deaths() -> None:
    together = ("SIGKILL", False)
    assert [company(state(*[together] * n)) for n in range(4)] == [Company.ANY, Company.FEW, Company.NONE, Company.NONE]
    assert company(state(("SIGKILL", True))) is Company.NONE


def test_few_are_never_none_and_never_many() -> None:
    assert [few(slots) for slots in (1, 4, 16, 256, 1000)] == [1, 1, 4, FEW, FEW]


def test_a_death_of_its_own_doing_counts_twice_one_that_may_come_from_outside() -> None:
    assert not is_proven(state(*[("exit 3", True)] * 2), 3)
    assert is_proven(state(*[("exit 3", True)] * 3), 3)
    assert not is_proven(state(*[("SIGKILL", True)] * 5), 3)
    assert is_proven(state(*[("SIGKILL", True)] * 6), 3)
    assert is_proven(state(("SIGSEGV", True), ("SIGKILL", True), ("exit 1", True)), 2)


@given(st.lists(st.sampled_from(["SIGKILL", "exit 3", "SIGSEGV", ""]), max_size=50), st.integers(1, 5))
def test_nobody_is_found_by_deaths_in_company(reasons: list[str], attempts: int) -> None:
    assert not is_proven(state(*[(reason, False) for reason in reasons]), attempts)


def test_lost_attempts_are_bounded_and_rest_begins_anew() -> None:
    assert not is_used_up(state(attempts=LOST * 3 - 1), 3)
    assert is_used_up(state(attempts=LOST * 3), 3)
    assert not is_used_up(state(attempts=LOST * 3, rested=1), 3)


def test_the_pauses_grow_to_a_bound() -> None:
    pauses = [pause(state(*[("SIGKILL", True)] * n)) for n in range(9)]
    assert pauses[:3] == [0.0, 0.5, 1.0] and pauses == sorted(pauses) and pauses[-1] == 4.0


def test_the_sentence_says_how_it_died_each_time() -> None:
    told = why_dead(state(("SIGKILL", False), ("exit 3", True), ("exit 3", True), ("exit 3", True), attempts=6))
    assert told == (
        "its process died again and again in 6 attempts: exit 3 (3 times) with nothing else in its process; SIGKILL"
        " beside other tasks"
    )
    assert why_dead(state(attempts=24)) == "24 attempts died or were lost before they came to an end"
