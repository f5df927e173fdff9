"""When the stored doors are closed, so that what runs has room to finish, and when they open again. Pure: the measures
are given."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from msgspec import Struct

from dspex.core.events import DoorsClosed, DoorsOpened, Event
from dspex.core.fold import Fold
from dspex.core.subjects import STORED_DOORS, aggregate

__all__ = ["ALL", "DoorsState", "Level", "Marks", "closed_doors", "doors_aggregate", "fold", "over_marks", "over_open"]

ALL = "ALL"
"""Stands for every program in the name of an aggregate; no program can be called so."""
CALM = 0.8
"""A program's doors open again when it has so much of the tasks that closed them."""


@dataclass(frozen=True)
class Marks:
    """When the doors are closed: shares of what the log has or could have (`high_water`, and `low_water` to open them
    again), the bytes that it may have (None: what its disk has), the bytes of a disk that stay free (a tenth of a small
    one), and how many tasks of one program may wait or run. Raises ValueError for marks that make no sense."""

    high_water: float = 0.8
    low_water: float = 0.7
    max_bytes: int | None = None
    room: int = 256 << 20
    max_open: int | None = 1_000_000

    def __post_init__(self) -> None:
        if not 0 < self.low_water < self.high_water <= 1:
            marks = f"low_water {self.low_water:.0%} and high_water {self.high_water:.0%}"
            raise ValueError(f"{marks}: both above 0 and at most 100%, the first below the second")


class Level(Struct, frozen=True):
    """How full it is, in bytes: what the log has, and what is free of how much where it is kept (None: nobody says)."""

    used: int
    free: int | None = None
    total: int | None = None


class DoorsState(Struct, frozen=True, omit_defaults=True):
    """Whether doors are closed, and why."""

    closed: DoorsClosed | None = None


def _evolve(state: DoorsState, event: Event) -> DoorsState:
    match event.data:
        case DoorsClosed() as closed:
            return DoorsState(closed)
        case DoorsOpened():
            return DoorsState()
        case _:
            return state


fold = Fold(
    kind="doors", version=1, initial=DoorsState(), evolve=_evolve, load=msgspec.json.Decoder(DoorsState).decode
)
"""The state of the doors of a program, or of all, after some of their events."""


def doors_aggregate(program: str) -> str:
    """Where it is written that doors are closed; "" for those of all programs."""
    return aggregate("doors", program or ALL, 0)


def over_marks(marks: Marks, level: Level, *, closed: bool) -> DoorsClosed | None:
    """Why no new task of any program may come, if there is a reason. `closed` doors ask for more room to open again."""
    share = marks.low_water if closed else marks.high_water
    could = [marks.max_bytes] if marks.max_bytes is not None else []
    if level.free is not None:
        could.append(level.used + level.free)
    capacity = min(could, default=None)
    if capacity is not None and level.used > share * capacity:
        what = f"the log has {_size(level.used)} of the {_size(capacity)} that it could have"
        return _closed("room", f"{what}, and may have {marks.high_water:.0%}", marks, level.used, int(share * capacity))
    if level.free is not None:
        room = marks.room if level.total is None else min(marks.room, level.total // 10)
        needed = room * 5 // 4 if closed else room
        if level.free < needed:
            what = f"{_size(level.free)} are free where the log is kept, and {_size(room)} are kept for what runs"
            return _closed("room", what, marks, level.free, needed)
    return None


def over_open(marks: Marks, program: str, tasks: int, *, closed: bool) -> DoorsClosed | None:
    """Why no new task of one program may come, if there is a reason: `tasks` of it wait or run."""
    if marks.max_open is None:
        return None
    limit = int(marks.max_open * CALM) if closed else marks.max_open
    if tasks <= limit:
        return None
    message = (
        f"no new tasks of {program} are taken now: {tasks:,} wait or run, and {marks.max_open:,} may. They go on, and "
        f"its door opens by itself when {int(marks.max_open * CALM):,} are left"
    )
    return DoorsClosed(reason="open", message=message, program=program, used=tasks, limit=limit)


def closed_doors(closed: dict[str, DoorsClosed], programs: list[str]) -> frozenset[tuple[str, str]]:
    """The doors to be shut, as pairs of door and program. Signals always come through: they let running tasks end."""
    shut = {("task", program) for program in closed if program}
    if "" in closed:
        shut |= {(door, program) for program in programs for door in STORED_DOORS if door != "signal"}
    return frozenset(shut)


def _closed(reason: str, what: str, marks: Marks, used: int, limit: int) -> DoorsClosed:
    message = (
        f"no new tasks are taken now: {what}. What runs goes on. Make room (disk, [retention], [doors] max_bytes); "
        "the doors open by themselves"
    )
    return DoorsClosed(reason=reason, message=message, used=used, limit=limit)


def _size(count: int) -> str:
    """`1.5 GiB`."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
