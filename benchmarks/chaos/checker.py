"""The checker: pure functions over what clients were told and what the log says.

Every check gets the whole evidence of a run and yields what is broken. `tests/benchmarks/test_checker.py` breaks a good
history once for each of them, so that none can be blind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from benchmarks.chaos import check_effects, check_state, check_tasks
from benchmarks.chaos.evidence import Evidence, Violation

__all__ = ["CHECKS", "MAX_NAMED", "check"]

MAX_NAMED = 50
"""Violations of one check that are named; a run that breaks more has said enough."""

CHECKS: dict[str, Callable[[Evidence], Iterable[Violation]]] = {
    "acknowledged": check_tasks.acknowledged,
    "ended_once": check_tasks.ended_once,
    "endings": check_tasks.endings,
    "answers": check_tasks.answers,
    "hanging": check_tasks.hanging,
    "keys": check_tasks.keys,
    "cancelled": check_tasks.cancelled,
    "signals": check_tasks.signals,
    "recorded_once": check_effects.recorded_once,
    "performed": check_effects.performed,
    "claims": check_effects.claims,
    "timers": check_effects.timers,
    "positions": check_state.positions,
    "versions": check_state.versions,
    "folds": check_state.folds,
    "views": check_state.views,
    "snapshots": check_state.snapshots,
    "archive": check_state.archive,
    "budgets": check_state.budgets,
}


def check(seen: Evidence) -> list[Violation]:
    """All that is broken, by check; no more than `MAX_NAMED` of each."""
    return [found for each in CHECKS.values() for found in islice(each(seen), MAX_NAMED)]
