"""Doors that are decided to close: by whom, and what becomes of it when he dies in between."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dspex.agents.doorkeeper import Doorkeeper
from dspex.agents.grounds import JetStreamGround
from dspex.bus.client import Client
from dspex.bus.server import Server
from dspex.core.codec import decode_commit
from dspex.core.doors import Marks
from dspex.core.errors import LogError
from dspex.core.subjects import Subjects

prefixes = iter(f"k{number}" for number in range(100))


class House:
    """A log in JetStream with the doors of two programs, and who decides on them."""

    programs = ["p", "q"]

    def __init__(self, client: Client, subjects: Subjects, ground: JetStreamGround) -> None:
        self.client, self.subjects, self.ground = client, subjects, ground

    def keeper(self, marks: Marks, *, dies: bool = False) -> Doorkeeper:
        async def apply() -> None:
            if dies:
                raise LogError("he died")
            await self.open(keeper)

        keeper = Doorkeeper(self.ground, self.subjects, marks, "/registrar/r", lambda: self.programs, apply)
        return keeper

    async def open(self, keeper: Doorkeeper) -> None:
        await self.ground.open_doors(self.programs, self.programs, keeper.shut(self.programs))

    async def is_open(self, door: str, program: str) -> bool:
        reply = await self.client.request(self.subjects.door(door, program), b"{}")
        return reply.status != 503

    async def types(self, aggregate: str) -> list[str]:
        entries = await self.ground.log.read(aggregate)
        return [event.type for entry in entries for event in decode_commit(entry.body, entry.position)]


@pytest.fixture
async def house(shared_server: Server, tmp_path: Path) -> AsyncIterator[House]:
    subjects = Subjects(next(prefixes))
    async with await Client.connect(shared_server.url) as client:
        ground = await JetStreamGround.stand(client, subjects, 1, None, tmp_path)
        await ground.open_doors(House.programs, House.programs)
        yield House(client, subjects, ground)


async def test_who_dies_between_the_decision_and_the_doors_leaves_it_to_the_next(house: House) -> None:
    for _ in range(3):
        assert await house.is_open("task", "p")
    first = house.keeper(Marks(max_open=2), dies=True)
    with pytest.raises(LogError):
        await first._look()
    assert await house.types("doors.p.0") == ["DoorsClosed"]
    assert await house.is_open("task", "p"), "he died before the stream was changed"
    second = house.keeper(Marks(max_open=2))
    await second.recall()
    await house.open(second)
    assert not await house.is_open("task", "p") and await house.is_open("task", "q")
    assert "wait or run, and 2 may" in second.said("p") and second.said("q") == ""
    await second._look()
    assert await house.types("doors.p.0") == ["DoorsClosed"], "what is closed is not closed again"


async def test_doors_open_again_when_there_is_room_also_by_another(house: House) -> None:
    full = house.keeper(Marks(max_bytes=1))
    assert await house.is_open("task", "q")  # the log has something
    await full._look()
    assert "could have" in full.said("p") and full.said("q") == full.said("p")
    for program in house.programs:
        assert not await house.is_open("task", program) and not await house.is_open("outcome", program)
        assert await house.is_open("signal", program)
    roomy = house.keeper(Marks(max_bytes=1 << 30, room=0))
    await roomy.recall()
    assert not await house.is_open("task", "p")
    await roomy._look()
    assert all([await house.is_open(door, program) for door in ("task", "outcome") for program in house.programs])
    assert await house.types("doors.ALL.0") == ["DoorsClosed", "DoorsOpened"]


async def test_a_program_that_comes_while_doors_are_closed_has_consumers_and_no_door(house: House) -> None:
    full = house.keeper(Marks(max_bytes=1))
    assert await house.is_open("task", "q")  # the log has something
    await full._look()
    programs = [*house.programs, "late"]
    made = await house.ground.open_doors(programs, ["late"], full.shut(programs))
    assert made["late"] > 0 and not await house.is_open("task", "late")
    await house.ground.open_doors(programs, [])
    assert await house.is_open("task", "late")
    assert await house.ground.waiting("late") == 1
