"""Whether a task is what kills its processes, decided from how its attempts died.

A process that dies takes all the tasks in it along, so a death in company says little of each of them, and a task that
was hit by it is only a suspect. A suspect runs with few others, then alone; only who dies alone is found guilty. This
is group testing (Dorfman 1943, "The Detection of Defective Members of Large Populations"), with groups that shrink.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import Enum

from dspex.core.events import AttemptDied
from dspex.core.task import TaskState

__all__ = ["LOST", "Company", "company", "few", "is_proven", "is_used_up", "own_doing", "pause", "why_dead"]

FEW = 16
"""Suspects of one agent that run at a time, in its ordinary company."""
LOST = 8
"""Times `Program.attempts`: so many attempts may be lost for whatever reason, also when no death was ever proven."""
OUTSIDE = frozenset({"", "SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGSTOP", "exit 1"})
"""Ends that somebody else may have given a process: of a task that dies so alone, two count as one. (An agent exits
with 1 when its connection is closed for good.)"""
PAUSE, LONGEST = 0.25, 4.0
"""Seconds before the next run alone, doubled with each death alone: who kills processes from outside goes on."""


class Company(Enum):
    """In what company a task is to run next."""

    ANY = "any"
    FEW = "few"
    NONE = "none"


def company(state: TaskState) -> Company:
    """By the deaths since the task last came to rest: none, one in company, more."""
    if not state.deaths:
        return Company.ANY
    return Company.FEW if len(state.deaths) == 1 and not state.deaths[0].alone else Company.NONE


def few(slots: int) -> int:
    """How many suspects an agent with so many slots runs at once."""
    return min(FEW, max(1, slots // 4))


def own_doing(reason: str) -> bool:
    """Whether a process ended in a way that nobody outside gives it: an exit status of its own, a crash, memory."""
    return reason not in OUTSIDE


def is_proven(state: TaskState, attempts: int) -> bool:
    """Whether a task died alone so often that nothing else can be it: `attempts` times by its own doing, twice as often
    in ways that may come from outside."""
    weight = sum(2 if own_doing(death.reason) else 1 for death in state.deaths if death.alone)
    return weight >= 2 * attempts


def is_used_up(state: TaskState, attempts: int) -> bool:
    """Whether so many attempts were lost that it is given up whatever the reason."""
    return state.attempts - state.rested >= LOST * attempts


def pause(state: TaskState) -> float:
    """Seconds that a suspect waits before it runs alone again."""
    alone = sum(death.alone for death in state.deaths)
    return min(PAUSE * 2**alone, LONGEST) if alone else 0.0


def why_dead(state: TaskState) -> str:
    """The sentence for a dead letter: how it died each time."""
    apart = [("with nothing else in its process", True), ("beside other tasks", False)]
    told = [f"{_counted(state.deaths, alone)} {words}" for words, alone in apart if _counted(state.deaths, alone)]
    tried = f"{state.attempts} attempt{'' if state.attempts == 1 else 's'}"
    if not told:
        return f"{tried} died or were lost before they came to an end"
    return f"its process died again and again in {tried}: {'; '.join(told)}"


def _counted(deaths: Sequence[AttemptDied], alone: bool) -> str:
    """`SIGKILL, exit 3 (3 times)`."""
    counts = Counter(death.reason or "unknown" for death in deaths if death.alone is alone)
    return ", ".join(reason if count == 1 else f"{reason} ({count} times)" for reason, count in counts.items())
