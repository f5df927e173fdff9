"""All that a run left behind, as the checks get it: nothing of it is read from anywhere while they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.chaos.history import History, Performance
from benchmarks.chaos.told import Told
from benchmarks.chaos.workload import Expected, expect

__all__ = ["Archived", "Evidence", "Snapshot", "Views", "Violation"]


@dataclass(frozen=True)
class Violation:
    """A promise that was broken: by which check, where, and how."""

    check: str
    what: str
    task: int = 0
    position: int = 0


@dataclass(frozen=True)
class Archived:
    """What verifying the archive and comparing it with the log found; `position` is its last."""

    position: int
    faults: Sequence[tuple[int, str]] = ()
    gaps: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True)
class Snapshot:
    """A state that was kept: of which aggregate, by which version of its fold, after which of its versions."""

    aggregate: str
    fold: int
    version: int
    state: bytes


@dataclass(frozen=True)
class Views:
    """The rows of the view `tasks` by id, the snapshots, and up to where in the log the view knows."""

    tasks: dict[int, dict[str, Any]]
    snapshots: Sequence[Snapshot] = ()
    position: int = 0


@dataclass
class Evidence:
    """One run. `expected` says how a task with this input and these headers must end; None: it may end in any way.

    `skew` is by how many seconds the clocks of two machines, or a clock that was shifted, may differ: 0 on one machine.
    `hanging` are jobs that their clients gave up. `may_forge` says that somebody hostile could write into the log, so
    that rows which are no commits are no surprise.
    """

    history: History
    told: Told
    performances: Sequence[Performance] = ()
    expected: Callable[[Any, Mapping[str, str]], Expected | None] = expect
    archived: Archived | None = None
    views: Views | None = None
    skew: float = 0.0
    may_forge: bool = False
    hanging: Sequence[str] = ()
