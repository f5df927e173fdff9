"""What is lent of a limit to the processes that hold to it: tokens of a rate, permits of a concurrency, parts of a
budget. Pure: time is an input, and every decision can be made again.

The promises, each a property test: permits given out never exceed the limit; a rate never gives more than its burst and
what time has brought; what is lent of a budget and what is spent of it never exceed it, unless a program spends more
than it said it would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import msgspec
from msgspec import Struct

from dspex.core.events import BudgetLeased, BudgetSettled, Event, LimitCleared, LimitReached, LimitSet
from dspex.core.fold import Fold
from dspex.core.limits import Amount, total

__all__ = [
    "BLOCKS", "Bucket", "BudgetState", "Decision", "Ledger", "LimitsState", "Shares", "alerts", "budget", "limits",
    "portions",
]  # fmt: skip

BLOCKS = 64
"""A budget is lent in blocks of this part of it, less when little is left."""
PERCENTS = (80, 100)
EPSILON = 1e-9


class Bucket:
    """A token bucket, known by the time at which it is or was empty (generic cell rate algorithm, ITU-T I.371)."""

    def __init__(self, empty_at: float = -math.inf) -> None:
        self.empty_at = empty_at

    def take(self, rate: Amount, count: int, now: float) -> float:
        """Take tokens, if need be of the future; seconds until all of them may be used."""
        self.empty_at = max(self.empty_at, now - rate.burst / rate.per_second) + count / rate.per_second
        return max(0.0, self.empty_at - now)

    def wait(self, rate: Amount, now: float) -> float:
        """Seconds until one more could be used, without taking it."""
        return max(0.0, max(self.empty_at, now - rate.burst / rate.per_second) + 1 / rate.per_second - now)


def portions(limit: int, wants: Mapping[str, int]) -> dict[str, int]:
    """A limit shared among those who want some of it: nobody gets more than he wants, none could give to one with
    less. Whoever comes first by name gets what cannot be shared evenly."""
    given = dict.fromkeys(wants, 0)
    left = limit
    while left > 0:
        wanting = sorted(name for name in wants if given[name] < wants[name])
        if not wanting:
            break
        each = left // len(wanting)
        for name in wanting:
            more = min(max(each, 1), wants[name] - given[name], left)
            given[name] += more
            left -= more
    return given


@dataclass
class _Share:
    have: int
    want: int
    use: int
    seen: float


class Shares:
    """The permits of one concurrency limit. What a holder has is lowered only on its own word, and raised only by
    what nobody has; so the sum of what all have never exceeds the limit, however words cross or are lost."""

    def __init__(self) -> None:
        self.holders: dict[str, _Share] = {}

    @property
    def use(self) -> int:
        """How many permits are in use, as far as their holders have said."""
        return sum(share.use for share in self.holders.values())

    def ask(self, holder: str, limit: int, *, have: int, want: int, use: int, now: float, more: bool = True) -> int:
        """How many permits the holder may have from now on; `more` false gives none that it had not. It has at most
        `have`, and keeps that until it has heard our answer."""
        self.holders[holder] = _Share(max(have, use), want, use, now)
        others = sum(share.have for name, share in self.holders.items() if name != holder)
        fair = portions(limit, {name: max(share.want, share.use) for name, share in self.holders.items()})[holder]
        cap = min(fair, max(limit - others, 0))
        if not more:
            cap = min(cap, have)
        self.holders[holder].have = max(self.holders[holder].have, cap)
        return cap

    def drop(self, holder: str) -> None:
        self.holders.pop(holder, None)


class LimitsState(Struct, frozen=True, omit_defaults=True):
    """The limits of a scope as they were set last, in words; empty when there are none."""

    scope: str = ""
    limits: dict[str, str] = {}
    who: str = ""
    why: str = ""
    time: str = ""


def _evolve_limits(state: LimitsState, event: Event) -> LimitsState:
    match event.data:
        case LimitSet(scope=scope, limits=texts, who=who, why=why):
            return LimitsState(scope, texts, who, why, event.time)
        case LimitCleared(scope=scope, who=who, why=why):
            return LimitsState(scope, {}, who, why, event.time)
        case _:
            return state


class BudgetState(Struct, frozen=True, omit_defaults=True):
    """One budget in one window: what is lent by lease and to whom, what the settled leases have spent, and which
    percentages were told of."""

    open: dict[str, float] = {}
    holders: dict[str, str] = {}
    settled: float = 0.0
    assumed: float = 0.0
    """The part of `settled` that dead holders may not have spent."""
    reached: list[int] = []

    @property
    def committed(self) -> float:
        """What is spent or lent."""
        return total([self.settled, *self.open.values()])


def _evolve_budget(state: BudgetState, event: Event) -> BudgetState:
    match event.data:
        case BudgetLeased(lease=lease, amount=amount, holder=holder):
            open = {**state.open, lease: total([state.open.get(lease, 0.0), amount])}
            return msgspec.structs.replace(state, open=open, holders={**state.holders, lease: holder})
        case BudgetSettled(lease=lease, used=used, assumed=assumed) if lease in state.open:
            rest = {name: amount for name, amount in state.open.items() if name != lease}
            holders = {name: holder for name, holder in state.holders.items() if name != lease}
            return msgspec.structs.replace(
                state, open=rest, holders=holders, settled=total([state.settled, used]),
                assumed=total([state.assumed, used if assumed else 0.0]),
            )  # fmt: skip
        case LimitReached(percent=percent) if percent not in state.reached:
            return msgspec.structs.replace(state, reached=[*state.reached, percent])
        case _:
            return state


limits: Fold[LimitsState] = Fold(
    kind="limits", version=1, initial=LimitsState(), evolve=_evolve_limits,
    load=msgspec.json.Decoder(LimitsState).decode,
)  # fmt: skip
budget: Fold[BudgetState] = Fold(
    kind="budget", version=1, initial=BudgetState(), evolve=_evolve_budget,
    load=msgspec.json.Decoder(BudgetState).decode,
)  # fmt: skip


class Decision(Struct, frozen=True):
    """What a lease may hold in all, and why it is no more: "" when it is enough, "wait" while others may give back,
    "exhausted" when that cannot help in this window."""

    granted: float
    refused: Literal["", "wait", "exhausted"] = ""


@dataclass
class Ledger:
    """One budget in one window, as whoever lends it knows it: the fold of its events, and what holders have said since
    of each lease they have: how much is spent, and how much is reserved by effects under way."""

    state: BudgetState = field(default_factory=BudgetState)
    spent: dict[str, float] = field(default_factory=dict)
    reserved: dict[str, float] = field(default_factory=dict)

    @property
    def used(self) -> float:
        """What is spent for sure."""
        return total([self.state.settled, *(self.spent.get(lease, 0.0) for lease in self.state.open)])

    def report(self, lease: str, used: float, reserved: float) -> None:
        """A holder says how its lease stands."""
        self.spent[lease], self.reserved[lease] = used, reserved

    def decide(self, lease: str, want: float, limit: float, *, whole: bool) -> Decision:
        """How much a lease may hold when an effect under it `want`s so much more. `whole`: there are no parts of it."""
        have = self.state.open.get(lease, 0.0)
        spent = self.spent.get(lease, 0.0)
        need = total([spent, self.reserved.get(lease, 0.0), want])
        left = total([limit, -self.state.committed])
        if spent > have + EPSILON:  # more than it said it would: true, whatever the limit is
            return Decision(max(spent, have), "" if need <= spent + EPSILON else self._refusal(want, limit))
        if need <= have + EPSILON:
            exhausted = self.used >= limit - EPSILON
            return Decision(have, "exhausted" if exhausted else "")
        lack = total([need, -have])
        if lack > left + EPSILON:
            return Decision(have, self._refusal(want, limit))
        block = min(limit / BLOCKS, left / 8)
        more = max(lack, math.floor(block) if whole else round(block, 6))
        return Decision(total([have, min(more, max(left, lack))]))

    def _refusal(self, want: float, limit: float) -> Literal["wait", "exhausted"]:
        return "exhausted" if self.used + want > limit + EPSILON or self.used >= limit - EPSILON else "wait"

    def idle(self) -> set[str]:
        """Leases under which nothing is under way: their holders can give back the rest."""
        return {lease for lease in self.state.open if not self.reserved.get(lease)}


def alerts(used: float, of: float, told: Iterable[int]) -> list[int]:
    """The percentages of a limit that are reached and of which nobody was told yet."""
    return [each for each in PERCENTS if each not in told and of > 0 and used >= of * each / 100 - EPSILON]
