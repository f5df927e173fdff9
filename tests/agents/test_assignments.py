"""Values by their hash: proposed once, found by every process, and instances of them within a bound."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from dspex import InvalidAssignment, InvalidInput, LimitExceeded, NotFound, Program, ProgramFailed, Schema, variable
from dspex.agents import assignments as module
from dspex.agents.assignments import Assignments, Instances
from dspex.core.codec import decode_commit
from dspex.core.events import AssignmentProposed, Event
from dspex.core.ports import Appended, Conflict
from dspex.core.space import Assignment
from dspex.core.subjects import Subjects
from dspex.store.memory import MemoryLog

set_up: list[tuple[int, int]] = []


class Rooms(Program):
    """Has a setup that says so."""

    class Input(Schema):
        n: int = 0

    class Output(Schema):
        n: int

    rooms = variable(1, low=1, high=1000)

    def setup(self) -> None:
        set_up.append((self.rooms, threading.get_ident()))
        if self.rooms == 13:
            raise OSError("no such room")

    def predict(self, input: Input) -> Output:
        return self.Output(n=self.rooms)


class Grown(Rooms):
    """The same with one more variable, as after a change of the code."""

    name = "rooms"
    beds = variable(2, low=1, high=4)


@pytest.fixture
async def log() -> MemoryLog:
    return MemoryLog(Subjects())


def known(log: MemoryLog, program: Program | None = None) -> Assignments:
    return Assignments(program or Rooms(), log, Subjects(), "/agents/a")


async def proposals(log: MemoryLog) -> list[AssignmentProposed]:
    entries = await log.read("variables.rooms.0")
    found = [event.data for entry in entries for event in decode_commit(entry.body, entry.position)]
    return [data for data in found if isinstance(data, AssignmentProposed)]


async def test_what_one_process_proposes_all_others_find(log: MemoryLog) -> None:
    here, there = known(log), known(log)
    made = [await here.propose({"rooms": n}, who="ada", why="more") for n in (5, 6, 7)]
    assert [(it.version, it.fresh) for it in made] == [(1, True), (2, True), (3, True)]
    for each in made:
        assert await there.find(each.assignment.hash) == each.assignment
    assert [(it.who, it.why, it.values) for it in await proposals(log)] == [("ada", "more", {"rooms": n}) for n in (5, 6, 7)]
    late = await here.propose({"rooms": 8})
    assert await there.find(late.assignment.hash) == late.assignment, "also what came after it had read"


async def test_the_same_values_are_proposed_once_by_however_many(log: MemoryLog) -> None:
    processes = [known(log) for _ in range(5)]
    made = await asyncio.gather(*(each.propose({"rooms": 2 + n % 3}) for each in processes for n in range(6)))
    assert len(await proposals(log)) == 3 == sum(it.fresh for it in made)
    assert {it.version for it in made} == {1, 2, 3}


async def test_the_default_and_the_values_in_force_need_no_proposal(log: MemoryLog) -> None:
    here = known(log, Rooms(rooms=4))
    default, force = Rooms.space().default(), Rooms(rooms=4).assignment
    assert (await here.find(default.hash), await here.find(force.hash)) == (default, force)
    assert (await here.propose({"rooms": 1})).version == 0
    assert await proposals(log) == []
    assert (await here.record(force)).fresh, "but those in force are written down, for later"


async def test_a_proposal_is_on_top_of_its_base(log: MemoryLog) -> None:
    here = known(log, Grown())
    base = await here.propose({"rooms": 9})
    assert (await here.propose({"beds": 4}, base=base.assignment.hash)).assignment.to_json() == {"beds": 4, "rooms": 9}
    with pytest.raises(NotFound):
        await here.propose({}, base="feed")
    assert (await here.propose({"beds": 3}, base="feed")).assignment.to_json() == {"beds": 3, "rooms": 1}


async def test_what_cannot_be_is_refused(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    here = known(log)
    with pytest.raises(InvalidAssignment, match="rooms = 0: it must be from 1 to 1000"):
        await here.propose({"rooms": 0})
    with pytest.raises(NotFound, match="rooms knows no assignment 'feed'"):
        await here.find("feed")
    monkeypatch.setattr(module, "MAX_PROPOSALS", 2)
    for n in (2, 3):
        await here.propose({"rooms": n})
    with pytest.raises(LimitExceeded, match="rooms has 2 proposals"):
        await here.propose({"rooms": 4})
    assert not (await here.propose({"rooms": 3})).fresh, "one that is there already is no new one"


async def test_values_of_other_variables_are_told_from_unknown_ones(log: MemoryLog) -> None:
    old = await known(log).propose({"rooms": 5})
    with pytest.raises(InvalidInput, match=f"the assignment {old.assignment.hash[:8]} is from other variables"):
        await known(log, Grown()).find(old.assignment.hash)
    new = await known(log, Grown()).propose({"beds": 4})
    with pytest.raises(InvalidInput, match="does not fit the code that runs now: beds = 4: no such variable"):
        await known(log).find(new.assignment.hash)


async def test_instances_are_set_up_once_outside_of_the_loop(log: MemoryLog) -> None:
    set_up.clear()
    here = known(log)
    instances = Instances(Rooms(), here)
    wanted = (await here.propose({"rooms": 5})).assignment.hash
    made = await asyncio.gather(*(instances.get(wanted) for _ in range(10)))
    assert len(set(map(id, made))) == 1 and made[0].rooms == 5
    [(rooms, thread)] = set_up
    assert rooms == 5 and thread != threading.get_ident()


async def test_so_many_instances_are_kept_and_the_least_used_goes(log: MemoryLog, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up.clear()
    monkeypatch.setattr(module, "MAX_INSTANCES", 2)
    here = known(log)
    instances = Instances(Rooms(), here)
    hashes = [(await here.propose({"rooms": n})).assignment.hash for n in (2, 3, 4)]
    for number in (0, 1, 0, 2, 0, 1):
        await instances.get(hashes[number])
    assert [rooms for rooms, _ in set_up] == [2, 3, 4, 3]


async def test_a_setup_that_fails_fails_its_task_and_is_tried_again_by_the_next(log: MemoryLog) -> None:
    here = known(log)
    instances = Instances(Rooms(), here)
    wanted = (await here.propose({"rooms": 13})).assignment.hash
    set_up.clear()
    for _ in range(2):
        with pytest.raises(ProgramFailed, match=f"Rooms.setup raised OSError on values {wanted[:8]}"):
            await instances.get(wanted)
    assert len(set_up) == 2
    with pytest.raises(NotFound):
        await instances.get("feed")


async def test_a_conflict_is_read_and_tried_again(log: MemoryLog) -> None:
    class Late(MemoryLog):
        """Somebody else appends just before us."""

        others = 3

        async def append(self, aggregate: str, events: Sequence[Event], expected: Any) -> Appended | Conflict:
            if self.others:
                self.others -= 1
                await known(self).record(Rooms(rooms=100 + self.others).assignment)
            return await super().append(aggregate, events, expected)

    busy = Late(Subjects())
    made = await known(busy).propose({"rooms": 5})
    assert made.fresh and len(await proposals(busy)) == 4
    assert isinstance(made.assignment, Assignment)
