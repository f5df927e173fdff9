"""Programs under the supervisors that somebody asked for, and how they are decided about there."""

from __future__ import annotations

from tests.core.test_supervision import World

from dspex.core.supervision import ChildSpec, Intensity, SupervisorSpec
from dspex.core.upkeep import Named, Upkeep, arranged, stop_time


def system(*named: Named) -> SupervisorSpec:
    programs = tuple(
        Upkeep(give_up=4).over(name, (ChildSpec(f"{name}-1"), ChildSpec(f"{name}-2"))) for name in ("qabot", "reader", "other")
    )
    return SupervisorSpec("top", arranged(programs, named), beyond="retry", ordered=False)


def test_without_any_each_program_is_by_itself() -> None:
    world = World(system())
    world.took()
    world.crash("qabot-1")
    assert world.took() == ["start qabot-1"]


def test_a_death_in_a_program_is_judged_by_the_supervisor_that_was_asked_for() -> None:
    world = World(system(Named("pair", ("reader", "qabot"), "rest_for_one", Intensity(5, 5))))
    assert world.tree.path("qabot-1") == ["top", "pair", "qabot"]
    world.took()
    world.crash("reader-1")
    took = world.took()
    assert "stop other-1" not in took
    assert {it for it in took if it.startswith("stop")} == {"stop qabot-2", "stop qabot-1", "stop reader-2"}
    starts = [it for it in took if it.startswith("start")]
    assert starts == ["start reader-1", "start reader-2", "start qabot-1", "start qabot-2"]
    assert {world.tree.state(name)[1] for name in ("reader-1", "reader-2", "qabot-1", "qabot-2")} == {1}
    world.crash("qabot-2")
    assert {it for it in world.took() if it.startswith("stop")} == {"stop qabot-1"}, "the first in order goes on"


def test_a_pair_that_cannot_live_is_given_up_and_the_others_go_on() -> None:
    world = World(system(Named("pair", ("reader", "qabot"), "one_for_all", give_up=4)))
    for _ in range(600):
        world.crash("qabot-1")
        world.wait(0.1)
    assert {world.tree.state(name)[0] for name in ("reader-1", "qabot-1")} == {"gave up"}
    assert set(world.alive) == {"other-1", "other-2"}


def test_one_that_is_killed_from_outside_is_never_given_up() -> None:
    world = World(system(Named("pair", ("reader", "qabot"), "one_for_all", give_up=4)))
    for _ in range(600):
        world.end("qabot-1", "killed", "SIGKILL")
        world.wait(0.5)
    assert len(world.alive) == 6


def test_supervisors_in_supervisors() -> None:
    inner = Named("inner", ("qabot",), intensity=Intensity(2, 5))
    world = World(system(inner, Named("outer", ("reader", "inner"), "one_for_all", Intensity(3, 5))))
    assert world.tree.path("qabot-1") == ["top", "outer", "inner", "qabot"]
    world.took()
    world.crash("qabot-1")
    assert "stop reader-1" not in world.took(), "the inner one sees to it"
    for _ in range(2):
        world.crash("qabot-1")
    assert "stop reader-1" in world.took(), "it was more than it allows itself"


def test_how_long_stopping_takes() -> None:
    assert stop_time([5, 10, 7], named=False) == 10
    assert stop_time([5, 10, 7], named=True) == 22
    assert stop_time([], named=False) == 0
