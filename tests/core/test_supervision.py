"""What a supervisor decides, after OTP's documented semantics, and what holds whatever happens."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dspex.core.supervision import (
    FIRST_DELAY,
    HURRY,
    MAX_DELAY,
    STABLE,
    Action,
    ChildSpec,
    Escalated,
    GaveUp,
    Intensity,
    Kill,
    Start,
    Stop,
    SupervisorSpec,
    Tree,
    delay_of,
    longest_stop,
)


class World:
    """Does what a tree decides, with children that come up and end at once unless they are told to be slow."""

    def __init__(self, spec: SupervisorSpec, *, slow: bool = False, **more: Any) -> None:
        self.now, self.slow = 100.0, slow
        self.alive: dict[str, int] = {}
        self.did: list[Action] = []
        self.tree = Tree(spec, **more)
        self.do(self.tree.begin(self.now))

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            self.did.append(action)
            if isinstance(action, Start):
                assert action.name not in self.alive, "two of one identity"
                self.alive[action.name] = action.restarts
                if not self.slow:
                    self.do(self.tree.ready(action.name, self.now))
            if isinstance(action, Stop | Kill) and not self.slow:
                self.end(action.name)

    def end(self, name: str, ending: Any = "normal", why: str = "") -> None:
        if self.alive.pop(name, None) is not None:
            self.do(self.tree.died(name, ending, self.now, why=why))

    def crash(self, *names: str, why: str = "exit 1") -> None:
        for name in names:
            self.end(name, "crash", why)

    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.do(self.tree.tick(self.now))

    def took(self) -> list[str]:
        """What was done since the last look, in short."""
        did, self.did = self.did, []
        return [f"{type(action).__name__.lower()} {action.name}" for action in did]


def group(*names: str, **more: Any) -> SupervisorSpec:
    return SupervisorSpec("top", tuple(ChildSpec(name) for name in names), **more)


# -- start and stop


def test_a_child_is_started_when_the_one_before_it_has_come_up() -> None:
    world = World(group("a", "b", "c"), slow=True)
    assert world.took() == ["start a"]
    world.do(world.tree.ready("a", world.now))
    assert world.took() == ["start b"]
    assert world.tree.state("c")[0] == "waiting"


def test_equal_children_start_together() -> None:
    world = World(group("a", "b", "c", ordered=False), slow=True)
    assert world.took() == ["start a", "start b", "start c"]


def test_they_stop_in_reverse_each_when_the_one_behind_it_has_ended() -> None:
    world = World(group("a", "b", "c"))
    world.took()
    world.slow = True
    world.do(world.tree.stop(world.now))
    assert world.took() == ["stop c"]
    world.end("c")
    assert world.took() == ["stop b"]
    world.end("b")
    world.end("a")
    assert world.took() == ["stop a"] and world.tree.over()


def test_who_does_not_end_in_its_grace_is_killed() -> None:
    world = World(SupervisorSpec("top", (ChildSpec("a", shutdown=7.0),)))
    world.slow = True
    world.do(world.tree.stop(world.now))
    world.wait(6.9)
    assert "kill a" not in world.took()
    assert world.tree.next_due() == pytest.approx(107.0)
    world.wait(0.2)
    assert world.took() == ["kill a"]


def test_told_to_hurry_the_grace_is_short() -> None:
    world = World(group("a", "b"))
    world.slow = True
    world.do(world.tree.stop(world.now))
    world.do(world.tree.stop(world.now, hurry=True))
    world.took()
    world.wait(HURRY)
    assert world.took() == ["kill b"]
    world.end("b")
    world.wait(HURRY)
    assert world.took() == ["stop a", "kill a"]


def test_nested_supervisors_start_and_stop_with_their_children() -> None:
    inner = SupervisorSpec("inner", (ChildSpec("b"), ChildSpec("c")))
    world = World(SupervisorSpec("top", (ChildSpec("a"), inner, ChildSpec("d"))))
    assert world.took() == ["start a", "start b", "start c", "start d"]
    world.do(world.tree.stop(world.now))
    assert world.took() == ["stop d", "stop c", "stop b", "stop a"]
    assert world.tree.path("b") == ["top", "inner"]


def test_how_long_stopping_takes_at_most() -> None:
    inner = SupervisorSpec("inner", (ChildSpec("b", shutdown=3), ChildSpec("c", shutdown=4)), ordered=False)
    assert longest_stop(SupervisorSpec("top", (ChildSpec("a", shutdown=2), inner))) == 6


# -- restart types


@pytest.mark.parametrize(
    ("restart", "ending", "comes_back"),
    [
        ("permanent", "normal", True), ("permanent", "crash", True), ("permanent", "killed", True),
        ("transient", "normal", False), ("transient", "crash", True), ("transient", "killed", True),
        ("temporary", "normal", False), ("temporary", "crash", False), ("temporary", "killed", False),
        ("temporary", "recycle", True), ("transient", "recycle", True), ("permanent", "refused", False),
    ],
)  # fmt: skip
def test_who_is_started_again(restart: Any, ending: Any, comes_back: bool) -> None:
    world = World(SupervisorSpec("top", (ChildSpec("a", restart=restart),)))
    world.took()
    world.end("a", ending)
    assert ("start a" in world.took()) is comes_back


def test_to_be_replaced_is_no_restart_that_counts() -> None:
    world = World(group("a"))
    for _ in range(20):
        world.end("a", "recycle")
    assert world.alive == {"a": 20}


def test_a_refusal_is_given_up_with_its_reason() -> None:
    world = World(group("a", "b"))
    world.end("a", "refused", why="no such table")
    assert GaveUp("a", "no such table") in world.did
    assert world.tree.state("a") == ("gave up", 0, "no such table")
    assert world.tree.state("b")[0] == "serving"


# -- strategies


def test_one_for_one_restarts_the_one() -> None:
    world = World(group("a", "b", "c"))
    world.took()
    world.crash("b")
    assert world.took() == ["start b"]


def test_one_for_all_stops_the_others_in_reverse_and_starts_all_in_order() -> None:
    world = World(group("a", "b", "c", strategy="one_for_all"))
    world.took()
    world.crash("b")
    assert world.took() == ["stop c", "stop a", "start a", "start b", "start c"]
    assert {name: world.tree.state(name)[1] for name in "abc"} == {"a": 1, "b": 1, "c": 1}


def test_rest_for_one_restarts_it_and_those_behind_it() -> None:
    world = World(group("a", "b", "c", "d", strategy="rest_for_one"))
    world.took()
    world.crash("b")
    assert world.took() == ["stop d", "stop c", "start b", "start c", "start d"]


def test_nobody_starts_before_all_that_go_down_are_down() -> None:
    world = World(group("a", "b", "c", strategy="one_for_all"))
    world.took()
    world.slow = True
    world.crash("a")
    world.end("c")
    assert world.took() == ["stop c", "stop b"]
    world.end("b")
    assert world.took() == ["start a"]


def test_a_temporary_child_that_goes_down_with_others_is_not_started_again() -> None:
    spec = SupervisorSpec("top", (ChildSpec("a"), ChildSpec("b", restart="temporary")), strategy="one_for_all")
    world = World(spec)
    world.took()
    world.crash("a")
    assert world.took() == ["stop b", "start a"]
    assert world.tree.state("b")[0] == "stopped"


def test_a_transient_child_that_has_ended_starts_again_with_all() -> None:
    spec = SupervisorSpec("top", (ChildSpec("a"), ChildSpec("b", restart="transient")), strategy="one_for_all")
    world = World(spec)
    world.end("b", "normal")
    world.took()
    world.crash("a")
    assert world.took() == ["start a", "start b"]


def test_a_whole_supervisor_is_a_child_for_the_strategy() -> None:
    inner = SupervisorSpec("inner", (ChildSpec("b"), ChildSpec("c")))
    world = World(SupervisorSpec("top", (ChildSpec("a"), inner), strategy="one_for_all"))
    world.took()
    world.crash("a")
    assert world.took() == ["stop c", "stop b", "start a", "start b", "start c"]


# -- intensity and escalation


def test_more_restarts_than_the_intensity_end_all_of_it() -> None:
    world = World(group("a", "b", "c"))
    world.took()
    world.crash("b")
    world.wait(4.9)
    world.crash("b", why="exit 7")
    assert world.took() == ["start b", "escalated top", "gaveup top", "stop c", "stop a"]
    assert world.tree.over()
    assert world.tree.state("a") == ("gave up", 0, "")


def test_the_window_slides() -> None:
    world = World(group("a"))
    for _ in range(10):
        world.crash("a")
        world.wait(5.1)
    assert world.alive == {"a": 10}


def test_the_restarts_of_all_children_count_together() -> None:
    world = World(group("a", "b", intensity=Intensity(2, 5)))
    world.crash("a", "b")
    assert not world.tree.over()
    world.crash("a")
    assert world.tree.over()


def test_one_restart_of_all_counts_once() -> None:
    world = World(group("a", "b", "c", strategy="one_for_all", intensity=Intensity(2, 5)))
    world.crash("a", "b")
    assert set(world.alive) == {"a", "b", "c"}


def test_none_allowed_escalates_at_once() -> None:
    world = World(group("a", intensity=Intensity(0, 5)))
    world.crash("a")
    assert world.tree.over()


def nested(**more: Any) -> SupervisorSpec:
    inner = SupervisorSpec("inner", (ChildSpec("b"), ChildSpec("c")), **more)
    return SupervisorSpec("top", (ChildSpec("a"), inner, ChildSpec("d")))


def test_the_parent_restarts_a_supervisor_that_escalates() -> None:
    world = World(nested())
    world.took()
    world.crash("b", "b")
    assert world.took() == ["start b", "escalated inner", "stop c", "start b", "start c"]
    assert set(world.alive) == {"a", "b", "c", "d"}


def test_and_counts_it_in_its_own_intensity() -> None:
    world = World(nested())
    world.crash("b", "b")
    world.took()
    world.crash("b", "b")
    assert world.took() == [
        "start b", "escalated inner", "stop c", "escalated top", "gaveup top", "stop d", "stop a",
    ]  # fmt: skip
    assert world.tree.over()


@pytest.mark.parametrize("restart", ["transient", "temporary"])
def test_a_supervisor_that_escalates_has_ended_in_order(restart: Any) -> None:
    """Its reason is `shutdown`, so only a permanent one is started again."""
    world = World(nested(restart=restart))
    world.took()
    world.crash("b", "b")
    assert world.took() == ["start b", "escalated inner", "stop c"]
    assert set(world.alive) == {"a", "d"}
    assert world.tree.state("c")[0] == "stopped"


# -- what we add: a supervisor that retries by itself


def program(*names: str, give_up: int = 16, **more: Any) -> SupervisorSpec:
    children = tuple(ChildSpec(name) for name in names)
    inner = SupervisorSpec("qabot", children, beyond="retry", ordered=False, give_up=give_up, **more)
    return SupervisorSpec("top", (ChildSpec("registrar"), inner, ChildSpec("other")), beyond="retry")


def until_up(world: World, name: str) -> None:
    for _ in range(200):
        if name in world.alive:
            return
        world.wait(0.05)
    raise AssertionError(f"{name} is {world.tree.state(name)}")


def run_down(world: World, name: str, times: int) -> list[float]:
    """Let a child fail so often; the delays of the retries."""
    delays = []
    for _ in range(times):
        until_up(world, name)
        before = len(world.did)
        world.crash(name)
        delays += [it.delay for it in world.did[before:] if isinstance(it, Escalated) and it.delay is not None]
    return delays


def test_a_crash_loop_is_slowed_down_and_then_given_up_alone() -> None:
    world = World(program("q-1"))
    delays = run_down(world, "q-1", 16)
    assert delays == sorted(delays) and delays[0] == FIRST_DELAY and delays[-1] == MAX_DELAY
    state, restarts, why = world.tree.state("q-1")
    assert (state, restarts) == ("gave up", 16) and "16 times in a row" in why and "exit 1" in why
    assert set(world.alive) == {"registrar", "other"}


def test_those_who_serve_go_on_while_another_fails() -> None:
    world = World(program("q-1", "q-2"))
    world.took()
    run_down(world, "q-1", 16)
    assert world.tree.state("q-2") == ("serving", 0, "")
    assert "stop q-2" not in world.took()


def test_to_have_served_forgets_what_was_before() -> None:
    world = World(program("q-1"))
    for _ in range(5):
        run_down(world, "q-1", 15)
        until_up(world, "q-1")
        world.tree.served("q-1")
    assert "q-1" in world.alive


def test_to_have_been_up_for_a_while_does_too() -> None:
    world = World(program("q-1"))
    for _ in range(5):
        run_down(world, "q-1", 15)
        until_up(world, "q-1")
        world.wait(STABLE + 0.1)
    assert "q-1" in world.alive


def test_deaths_by_somebody_elses_hand_never_lead_to_giving_up() -> None:
    world = World(program("q-1", "q-2"))
    for number in range(600):
        world.end(f"q-{1 + number % 2}", "killed", "SIGKILL")
        world.wait(0.5)
    assert {"q-1", "q-2", "registrar", "other"} == set(world.alive)
    assert max(it.delay or 0 for it in world.did if isinstance(it, Escalated)) <= FIRST_DELAY * 1.25


def test_those_that_live_and_die_together_are_given_up_together() -> None:
    world = World(program("q-1", "q-2", strategy="one_for_all"))
    run_down(world, "q-1", 16)
    assert {world.tree.state(name)[0] for name in ("q-1", "q-2")} == {"gave up"}
    assert set(world.alive) == {"registrar", "other"}


def test_zero_never_gives_up() -> None:
    world = World(program("q-1", give_up=0))
    run_down(world, "q-1", 100)
    world.wait(10)
    assert "q-1" in world.alive


def test_others_need_not_wait_for_one_that_cannot_come_up() -> None:
    spec = SupervisorSpec("top", (ChildSpec("a"), ChildSpec("b")), beyond="retry")
    world = World(spec, slow=True)
    world.crash("a")
    assert world.took() == ["start a", "start a", "start b"]


def test_what_was_given_up_can_be_tried_again_anew() -> None:
    world = World(program("q-1"))
    run_down(world, "q-1", 16)
    world.do(world.tree.remove("q-1", world.now))
    world.do(world.tree.add("qabot", ChildSpec("q-1"), world.now))
    assert world.tree.state("q-1") == ("serving", 0, "")


def test_the_delay_grows_to_its_bound_with_a_quarter_of_jitter() -> None:
    assert [delay_of(n, 0.5) for n in (0, 2, 3, 4, 50)] == [FIRST_DELAY, FIRST_DELAY, 0.4, 0.8, MAX_DELAY]
    assert delay_of(50, 0.0) == MAX_DELAY * 0.75 and delay_of(50, 1.0) == MAX_DELAY * 1.25


# -- children that come and go


def test_a_child_is_added_behind_another_and_removed_in_order() -> None:
    world = World(program("q-1"))
    world.took()
    world.do(world.tree.add("qabot", ChildSpec("q-2"), world.now, after="q-1"))
    assert world.took() == ["start q-2"]
    assert world.tree.names() == ["registrar", "q-1", "q-2", "other"]
    world.do(world.tree.remove("q-1", world.now))
    assert world.took() == ["stop q-1"]
    assert world.tree.names() == ["registrar", "q-2", "other"]
    with pytest.raises(ValueError, match="two children are called q-2"):
        world.tree.add("qabot", ChildSpec("q-2"), world.now)


def test_a_whole_supervisor_is_added_and_removed() -> None:
    world = World(program("q-1"))
    world.do(world.tree.add("top", SupervisorSpec("new", (ChildSpec("n-1"), ChildSpec("n-2"))), world.now))
    assert {"n-1", "n-2"} < set(world.alive)
    world.do(world.tree.remove("new", world.now))
    assert "new" not in world.tree.supervisors() and "n-1" not in world.tree.names()


def test_one_that_is_removed_while_it_restarts_does_not_come_back() -> None:
    world = World(program("q-1"))
    run_down(world, "q-1", 2)
    world.do(world.tree.remove("q-1", world.now))
    world.wait(60)
    assert "q-1" not in world.alive and "q-1" not in world.tree.names()


def test_counts_of_an_earlier_supervisor_go_on() -> None:
    world = World(group("a"), restarts={"a": 7})
    assert world.alive == {"a": 7}


@pytest.mark.parametrize(("text", "count", "seconds"), [("1/5s", 1, 5), ("0/1s", 0, 1), (" 10 / 60 s", 10, 60)])
def test_an_intensity_in_words(text: str, count: int, seconds: float) -> None:
    assert Intensity.read(text) == Intensity(count, seconds)


@pytest.mark.parametrize("text", ["", "5", "1/5", "1/0s", "-1/5s", "a/b"])
def test_what_is_no_intensity(text: str) -> None:
    with pytest.raises(ValueError, match="1/5s"):
        Intensity.read(text)


# -- what holds whatever happens

RESTARTS = st.sampled_from(["permanent", "transient", "temporary"])
STRATEGIES = st.sampled_from(["one_for_one", "one_for_all", "rest_for_one"])
INTENSITIES = st.builds(Intensity, st.integers(0, 3), st.sampled_from([1.0, 5.0]))


@st.composite
def trees(draw: Any, depth: int = 2, prefix: str = "s") -> SupervisorSpec:
    children: list[Any] = []
    for number in range(draw(st.integers(1, 3))):
        if depth and draw(st.booleans()):
            children.append(draw(trees(depth=depth - 1, prefix=f"{prefix}{number}")))
        else:
            children.append(ChildSpec(f"{prefix}{number}w", restart=draw(RESTARTS), shutdown=draw(st.sampled_from([1.0, 3.0]))))
    return SupervisorSpec(
        prefix, tuple(children), strategy=draw(STRATEGIES), intensity=draw(INTENSITIES), restart=draw(RESTARTS),
        beyond=draw(st.sampled_from(["escalate", "retry"])), give_up=draw(st.sampled_from([0, 3])),
    )  # fmt: skip


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["ready", "ready", "ready", "end", "end", "wait", "served", "remove"]), st.integers(0, 20),
        st.sampled_from(["normal", "crash", "killed", "recycle", "refused"]), st.floats(0, 3),
    ),
    max_size=60,
)  # fmt: skip


def order_of(spec: Any) -> list[str]:
    return [spec.name] if isinstance(spec, ChildSpec) else [name for child in spec.children for name in order_of(child)]


@settings(max_examples=300, deadline=None)
@given(trees(), STEPS)
def test_whatever_happens_the_rules_hold(spec: SupervisorSpec, steps: list[Any]) -> None:
    world = World(spec, slow=True)
    order = order_of(spec)
    for what, pick, ending, seconds in steps:
        alive = sorted(world.alive)
        name = alive[pick % len(alive)] if alive else ""
        before = len(world.did)
        match what:
            case "ready" if name:
                world.do(world.tree.ready(name, world.now))
            case "served" if name:
                world.tree.served(name)
            case "end" if name:
                world.end(name, ending, "it was so")
            case "remove" if name and pick == 20:
                world.do(world.tree.remove(name, world.now))
            case _:
                world.wait(seconds)
        new = world.did[before:]
        starts = [order.index(action.name) for action in new if isinstance(action, Start)]
        assert starts == sorted(starts), "they start in order"
        stops = [order.index(action.name) for action in new if isinstance(action, Stop)]
        assert stops == sorted(stops, reverse=True), "and stop in reverse"
        for action in new:
            assert not (isinstance(action, Stop) and action.name not in world.alive), "only who lives is stopped"
            assert not (isinstance(action, GaveUp) and not action.because), "nobody is given up without a reason"
    world.do(world.tree.stop(world.now))
    ended: list[str] = []
    while world.alive:
        stopping = [name for name in world.alive if world.tree.state(name)[0] == "stopping"]
        assert stopping, "somebody is left that nobody has told to stop"
        ended.append(max(stopping, key=order.index))
        world.end(ended[-1])
    assert world.tree.over()
    known = [order.index(name) for name in ended]
    assert known == sorted(known, reverse=True), "the end goes in reverse too"
    before = len(world.did)
    world.wait(1000)
    assert not world.did[before:], "what is over stays over"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 4), min_size=1, max_size=30), INTENSITIES)
def test_the_intensity_counts_in_a_sliding_window(gaps: list[float], intensity: Intensity) -> None:
    """It escalates at the first restart that is one too many within the seconds before it, and never earlier."""
    world = World(group("a", intensity=intensity))
    times: list[float] = []
    for gap in gaps:
        world.wait(gap)
        times.append(world.now)
        world.crash("a")
        within = Counter(world.now - time <= intensity.seconds for time in times)[True]
        assert world.tree.over() is (within > intensity.count)
        if world.tree.over():
            return
