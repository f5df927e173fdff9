"""Whether budgets add up: what was lent, what was settled and what effects say they have cost, compared over a whole
log."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime

from msgspec import UNSET

from dspex.core.events import (
    BudgetLeased,
    BudgetSettled,
    EffectRecorded,
    Event,
    LimitCleared,
    LimitSet,
    TaskSubmitted,
    Usage,
)
from dspex.core.headers import STUDY
from dspex.core.limits import BUDGETS, Scope, limit_of, total
from dspex.core.subjects import parse_aggregate

__all__ = ["KNOWN_AFTER", "Audit", "audit"]

KNOWN_AFTER = 10.0
"""Seconds after which every agent that is in touch holds to a limit that was set."""
EPSILON = 1e-6


@dataclass
class _Window:
    """One budget in one window: what is lent by lease, and what the leases that are over have used. A lease may be lent
    anew after it was settled: its holder was taken for dead, and had not heard of what it was lent before."""

    open: dict[str, float] = field(default_factory=dict)
    known: set[str] = field(default_factory=set)
    settled: float = 0.0
    assumed: bool = False

    @property
    def committed(self) -> float:
        return total([self.settled, *self.open.values()])


class Audit:
    """Takes events in the order of the log, and says what does not add up. `faults` are sentences."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.spent: dict[tuple[str, str], float] = {}
        """What effects say they have cost under each scope and resource, once its limit was known to all."""
        self._windows: dict[tuple[str, str, str], _Window] = {}
        self._since: dict[tuple[str, str], float] = {}
        self._studies: dict[str, str] = {}

    def add(self, event: Event) -> None:
        match event.data:
            case LimitSet(scope=scope, limits=texts):
                limit = limit_of(texts)
                for resource in BUDGETS:
                    if limit.budget(resource) is None:
                        self._forget(scope, resource)
                    else:
                        self._since.setdefault((scope, resource), _time(event))
            case LimitCleared(scope=scope):
                for resource in BUDGETS:
                    self._forget(scope, resource)
            case BudgetLeased() as lent:
                self._lend(lent, event)
            case BudgetSettled() as settled:
                self._settle(settled, event)
            case TaskSubmitted(headers=headers) if STUDY in headers:
                self._studies[event.aggregate] = headers[STUDY]
            case EffectRecorded(usage=Usage() as usage) as record:
                self._spend(event, usage, _time(event) - record.seconds)

    def settled(self, scope: str, resource: str) -> float:
        """What the leases of a budget have spent, in all windows; open ones with all they hold."""
        return total(
            window.committed for (name, kind, _), window in self._windows.items() if (name, kind) == (scope, resource)
        )

    def assumed(self, scope: str, resource: str) -> bool:
        """Whether some of that is assumed, or still open: then it may be more than was spent."""
        found = [window for (name, kind, _), window in self._windows.items() if (name, kind) == (scope, resource)]
        return any(window.assumed or window.open for window in found)

    def end(self) -> list[str]:
        """All that does not add up."""
        late = []
        for (scope, resource), spent in self.spent.items():
            settled = self.settled(scope, resource)
            if spent > settled + EPSILON:
                late.append(
                    f"{resource} of {scope}: effects say {spent:.9g}, and only {settled:.9g} were lent and settled"
                )
        return self.faults + late

    def _lend(self, lent: BudgetLeased, event: Event) -> None:
        window = self._windows.setdefault((lent.scope, lent.resource, lent.window), _Window())
        window.known.add(lent.lease)
        window.open[lent.lease] = total([window.open.get(lent.lease, 0.0), lent.amount])
        if not lent.overrun and window.committed > lent.of + EPSILON:
            self.faults.append(
                f"{event.id}: {window.committed:.9g} {lent.resource} of {lent.scope} are lent or spent in window "
                f"{lent.window}, of {lent.of:.9g}"
            )

    def _settle(self, settled: BudgetSettled, event: Event) -> None:
        window = self._windows.setdefault((settled.scope, settled.resource, settled.window), _Window())
        lent = window.open.pop(settled.lease, None)
        if lent is None:
            how = "twice" if settled.lease in window.known else "and never lent"
            self.faults.append(f"{event.id}: lease {settled.lease} was settled {how}")
            return
        if settled.used > lent + EPSILON:
            self.faults.append(f"{event.id}: lease {settled.lease} spent {settled.used:.9g} of {lent:.9g}")
        window.settled = total([window.settled, settled.used])
        window.assumed = window.assumed or settled.assumed

    def _spend(self, event: Event, usage: Usage, began: float) -> None:
        _, program, _ = parse_aggregate(event.aggregate)
        scopes = [Scope("program", program), Scope("agent", event.source.rpartition("/")[2])]
        if usage.model is not UNSET and usage.model:
            scopes.append(Scope("model", usage.model))
        if study := self._studies.get(event.aggregate):
            scopes.append(Scope("study", study))
        for scope in map(str, scopes):
            for resource, amount in (("usd", usage.usd), ("tokens", usage.tokens), ("calls", usage.calls)):
                since = self._since.get((scope, resource))
                if since is not None and began > since + KNOWN_AFTER:
                    self.spent[scope, resource] = total([self.spent.get((scope, resource), 0.0), amount])

    def _forget(self, scope: str, resource: str) -> None:
        self._since.pop((scope, resource), None)


def audit(events: Iterable[Event]) -> list[str]:
    """What does not add up in a whole log, in its order: a budget lent beyond its limit, a lease that spent more than
    it had or was settled twice, costs that nobody had lent. Tenants are not looked at: events do not name them."""
    found = Audit()
    for event in events:
        found.add(event)
    return found.end()


def _time(event: Event) -> float:
    return datetime.fromisoformat(event.time).timestamp()
