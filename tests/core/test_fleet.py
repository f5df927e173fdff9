"""Which agents there should be: one program's number and code change while others go on, and nobody is missing."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspex.core.fleet import Action, Begin, Fleet, Leave, Rolled, RolledBack, surge


def started(agents: int) -> Fleet:
    """A fleet with one program whose agents all serve."""
    fleet = Fleet()
    for action in fleet.serve("qabot", agents):
        assert isinstance(action, Begin)
        fleet.serves("qabot", action.number)
    return fleet


def test_it_begins_with_all_agents_at_once() -> None:
    assert Fleet().serve("qabot", 3) == [Begin("qabot", number, 0) for number in (1, 2, 3)]


def test_more_and_fewer() -> None:
    fleet = started(2)
    assert fleet.scale("qabot", 4) == [Begin("qabot", 3, 0), Begin("qabot", 4, 0)]
    fleet.serves("qabot", 3)
    assert fleet.scale("qabot", 2) == [Leave("qabot", 4), Leave("qabot", 3)], "the one that does not serve yet is first"
    assert fleet.scale("qabot", 3) == [Begin("qabot", 5, 0)], "a number is nobody else's while its process lives"
    fleet.gone("qabot", 3)
    assert fleet.scale("qabot", 4) == [Begin("qabot", 3, 0)]
    assert fleet.scale("qabot", 0) == [Leave("qabot", number) for number in (5, 3, 2, 1)]


def test_the_only_agent_is_replaced_without_a_gap() -> None:
    fleet = started(1)
    assert fleet.roll("qabot", 1) == [Begin("qabot", 2, 1)]
    assert fleet.serves("qabot", 2) == [Leave("qabot", 1)]
    assert fleet.takes_no_more("qabot", 1) == [Rolled("qabot", 1)]
    assert fleet.generations() == {0, 1}, "what the old one has still runs on its code"
    fleet.gone("qabot", 1)
    assert fleet.generations() == {1}


def test_agents_are_replaced_one_by_one() -> None:
    fleet = started(2)
    assert fleet.roll("qabot", 1) == [Begin("qabot", 3, 1)]
    assert fleet.serves("qabot", 3) == [Leave("qabot", 2)]
    assert fleet.gone("qabot", 2) == [Begin("qabot", 2, 1)]
    assert fleet.serves("qabot", 2) == [Leave("qabot", 1)]
    assert fleet.gone("qabot", 1) == [Rolled("qabot", 1)]


def test_code_that_cannot_serve_touches_nobody() -> None:
    fleet = started(2)
    fleet.roll("qabot", 1)
    assert fleet.down("qabot", 3, "setup raised") == [RolledBack("qabot", 1, "setup raised"), Leave("qabot", 3)]
    fleet.gone("qabot", 3)
    assert fleet.serving("qabot") == 2 and fleet.generations() == {0}


def test_old_agents_that_had_left_already_are_made_up_for() -> None:
    fleet = started(2)
    fleet.roll("qabot", 1)
    fleet.serves("qabot", 3)
    fleet.gone("qabot", 2)
    assert fleet.down("qabot", 2, "SIGKILL") == [RolledBack("qabot", 1, "SIGKILL"), Leave("qabot", 2)]
    assert fleet.gone("qabot", 2) == [Begin("qabot", 2, 0)]
    assert fleet.serves("qabot", 2) == [Leave("qabot", 3)]


def test_a_new_agent_that_served_and_died_is_one_like_others() -> None:
    fleet = started(2)
    fleet.roll("qabot", 1)
    fleet.serves("qabot", 3)
    assert fleet.down("qabot", 3, "SIGKILL") == []
    assert fleet.gone("qabot", 2) == [], "the next step waits until it is back"
    assert fleet.serves("qabot", 3) == [Begin("qabot", 2, 1)]


def test_one_agent_can_be_asked_to_leave() -> None:
    fleet = started(3)
    assert fleet.lose("qabot", 2) == [Leave("qabot", 2)]
    assert fleet.wanted("qabot") == 2 and fleet.lose("qabot", 2) == []


def test_one_agent_can_be_replaced() -> None:
    fleet = started(2)
    assert fleet.renew("qabot", 1) == [Begin("qabot", 3, 0)]
    assert fleet.serves("qabot", 3) == [Leave("qabot", 1)]
    assert fleet.gone("qabot", 1) == [] and fleet.wanted("qabot") == 2


def test_one_roll_at_a_time() -> None:
    fleet = started(1)
    fleet.roll("qabot", 1)
    with pytest.raises(ValueError, match="already"):
        fleet.roll("qabot", 2)


class Life(RuleBasedStateMachine):
    """Agents come up, die and end in any order, while somebody scales and rolls."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.wanted = 2
        self.up: dict[int, str] = {}
        """What each process really is: starting, serving, leaving."""
        self.broken: set[int] = set()
        self.generation = 0
        self.enough = False
        self.do(self.fleet.serve("p", 2))

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Begin(number=number):
                    assert number not in self.up, "never two of one name"
                    self.up[number] = "starting"
                case Leave(number=number):
                    assert self.up[number] != "leaving"
                    self.up[number] = "leaving"
                case RolledBack(generation=generation):
                    assert generation in self.broken

    def numbers(self, *states: str) -> list[int]:
        return [number for number, state in self.up.items() if state in states]

    @rule(agents=st.integers(1, 6))
    def scale(self, agents: int) -> None:
        self.wanted, self.enough = agents, False
        self.do(self.fleet.scale("p", agents))

    @precondition(lambda self: not self.fleet.rolling("p"))
    @rule(broken=st.booleans())
    def roll(self, broken: bool) -> None:
        self.generation += 1
        if broken:
            self.broken.add(self.generation)
        self.do(self.fleet.roll("p", self.generation))

    @precondition(lambda self: self.numbers("starting"))
    @rule(data=st.data())
    def comes_up(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.numbers("starting")))
        if self.fleet.members("p")[number] in self.broken:
            self.do(self.fleet.down("p", number, "it cannot"))
        else:
            self.up[number] = "serving"
            self.do(self.fleet.serves("p", number))

    @precondition(lambda self: self.numbers("leaving"))
    @rule(data=st.data())
    def ends(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.numbers("leaving")))
        del self.up[number]
        self.do(self.fleet.gone("p", number))

    @invariant()
    def who_serves_is_enough_once_it_was(self) -> None:
        serving = len(self.numbers("serving"))
        self.enough = self.enough or serving >= self.wanted
        assert not self.enough or serving >= self.wanted

    @invariant()
    def nobody_is_forgotten_and_not_too_many_are_there(self) -> None:
        assert set(self.fleet.members("p")) == set(self.up)
        alive = self.numbers("starting", "serving")
        assert len(alive) <= self.wanted + surge(self.wanted) + 6

    def teardown(self) -> None:
        for _ in range(1000):  # when nothing more is asked for, all is soon as it should be
            for number in self.numbers("leaving"):
                del self.up[number]
                self.do(self.fleet.gone("p", number))
            for number in self.numbers("starting"):
                if self.up.get(number) != "starting":
                    continue
                if self.fleet.members("p")[number] in self.broken:
                    self.do(self.fleet.down("p", number, "it cannot"))
                else:
                    self.up[number] = "serving"
                    self.do(self.fleet.serves("p", number))
            if not self.numbers("starting", "leaving"):
                break
        assert len(self.numbers("serving")) == self.wanted and not self.numbers("starting", "leaving")
        assert len(self.fleet.generations()) == 1 and not self.fleet.rolling("p")
        assert not self.fleet.generations() & self.broken


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
