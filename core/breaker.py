"""Circuit breakers: when calls to something outside are let through, and what their ends change. Pure: time is given.

The terms and their sense are those of resilience4j's CircuitBreaker (resilience4j.readme.io/docs/circuitbreaker):
closed, open and half-open; a sliding window by count or by time; a failure rate and a slow-call rate, reached when
equal or greater, and looked at from a least number of calls on; a wait while open; a quota of trial calls.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

from msgspec import Struct

from dspex.core.events import BreakerClosed, BreakerHalfOpened, BreakerOpened, Event, Permit
from dspex.core.fold import Fold
from dspex.core.subjects import valid_token

__all__ = [
    "MAX_CALLS", "Breaker", "BreakerState", "Status", "Tally", "Window", "breaker_name", "fold", "refused_until",
    "trial_begins", "trial_ends", "trips",
]  # fmt: skip

MAX_CALLS = 10_000
"""Calls that a window by count may hold."""
SLICES = 20
"""Parts that a window by time moves on in."""
PERMIT = 60.0
"""Seconds after which a trial call without a timeout counts as lost, and another one may be made."""
AGAIN = 1.0
"""Seconds to wait while trial calls are under way."""
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}

Status = Literal["closed", "open", "half_open"]
Seconds = float | str


@dataclass(frozen=True)
class Breaker:
    """When an effect is no longer called because too many of its calls fail or are slow.

    It opens when of at least `min_calls` calls in the window `failure_rate` or more failed, or `slow_rate` or more took
    longer than `slow_after`. The window is the last `window` of time, or the last `calls` calls. It stays open for
    `open_for`; then `half_open` trial calls are let through, and it closes or opens again by the same rates. Times are
    seconds or words: `10`, `"10s"`, `"500ms"`, `"2m"`.

    `timeout` ends a call that takes longer: an async one is cancelled, a plain one is left behind in its thread.
    `counts` are the exceptions that are failures; others are taken as answers. Raises ValueError for what makes no
    sense.
    """

    failure_rate: float = 0.5
    slow_rate: float = 1.0
    slow_after: Seconds | None = None
    window: Seconds | None = None
    calls: int | None = None
    min_calls: int = 10
    open_for: Seconds = 30.0
    half_open: int = 3
    timeout: Seconds | None = None
    counts: Sequence[type[Exception]] = (Exception,)

    def __post_init__(self) -> None:
        for name in ("slow_after", "window", "open_for", "timeout"):
            object.__setattr__(self, name, _seconds(name, getattr(self, name)))
        object.__setattr__(self, "counts", tuple(self.counts))
        if self.window is not None and self.calls is not None:
            raise ValueError("a breaker's window is a time (window=) or a number of calls (calls=), not both")
        if self.window is None and self.calls is None:
            object.__setattr__(self, "window", 60.0)
        for name in ("failure_rate", "slow_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a share above 0 and at most 1 is due")
        for name, most in (("calls", MAX_CALLS), ("min_calls", MAX_CALLS), ("half_open", 1000)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} is {value}; 1 to {most:,} are allowed")

    @property
    def least(self) -> int:
        """How many calls are needed before the rates say anything."""
        return min(self.min_calls, self.calls or MAX_CALLS)

    @property
    def permit_time(self) -> float:
        """Seconds after which a trial call counts as lost."""
        return PERMIT if self.timeout is None else cast(float, self.timeout) + 1.0

    @property
    def shown_window(self) -> str:
        return f"{self.calls:,} calls" if self.calls else f"{self.window:g} s"

    def is_slow(self, seconds: float) -> bool:
        return self.slow_after is not None and seconds > cast(float, self.slow_after)

    def verdict(self, tally: Tally, least: int) -> Literal["", "failures", "slow"]:
        """What of at least so many calls says that there are to be no more."""
        if tally.calls >= least:
            if tally.failures / tally.calls >= self.failure_rate:
                return "failures"
            if self.slow_after is not None and tally.slow / tally.calls >= self.slow_rate:
                return "slow"
        return ""


class Tally(Struct, frozen=True):
    """How many calls ended, and how many of those failed or were slow."""

    calls: int = 0
    failures: int = 0
    slow: int = 0

    def plus(self, other: Tally) -> Tally:
        return Tally(self.calls + other.calls, self.failures + other.failures, self.slow + other.slow)

    def minus(self, other: Tally) -> Tally:
        return Tally(self.calls - other.calls, self.failures - other.failures, self.slow - other.slow)


class Window:
    """The calls that a breaker judges by: those of the last seconds, in `SLICES` parts, or the last so many.

    Several that come at once, as others report them, are the oldest first that did not fail. At most `MAX_CALLS` parts.
    """

    def __init__(self, breaker: Breaker) -> None:
        self._calls, self._slice = breaker.calls, (cast(float, breaker.window or 0.0)) / SLICES
        self.clear()

    def clear(self) -> None:
        self._parts: deque[tuple[int, Tally]] = deque()
        self._total = Tally()

    def add(self, tally: Tally, now: float) -> None:
        """Calls that ended at `now`, in seconds of a clock that never goes back."""
        if self._calls is None:
            number = int(now // self._slice)
            if self._parts and self._parts[-1][0] >= number:
                number, last = self._parts.pop()
                self._parts.append((number, last.plus(tally)))
            else:
                self._parts.append((number, tally))
            self._total = self._total.plus(tally)
            self._forget(now)
            return
        for one in _singles(tally, self._calls):
            self._parts.append((0, one))
            self._total = self._total.plus(one)
        while len(self._parts) > self._calls:
            self._total = self._total.minus(self._parts.popleft()[1])

    def tally(self, now: float) -> Tally:
        """What the window holds."""
        self._forget(now)
        return self._total

    def _forget(self, now: float) -> None:
        while self._calls is None and self._parts and self._parts[0][0] <= now // self._slice - SLICES:
            self._total = self._total.minus(self._parts.popleft()[1])


class BreakerState(Struct, frozen=True, omit_defaults=True):
    """Where a breaker stands. `since` is when it opened and `due` when it may be tried again, in seconds since the
    epoch; `calls`, `failures` and `slow` are the evidence for the last change, over `window`; `permits` are the trial
    calls under way. Each event says all of it, so the last one is enough."""

    status: Status = "closed"
    since: float = 0.0
    due: float = 0.0
    calls: int = 0
    failures: int = 0
    slow: int = 0
    window: str = ""
    reason: str = ""
    permits: tuple[Permit, ...] = ()
    version: int = 0

    @property
    def tally(self) -> Tally:
        return Tally(self.calls, self.failures, self.slow)


def _evolve(state: BreakerState, event: Event) -> BreakerState:
    data, version = event.data, event.version
    match data:
        case BreakerOpened():
            return BreakerState(
                "open", data.since, data.due, data.calls, data.failures, data.slow, data.window, data.reason,
                version=version,
            )  # fmt: skip
        case BreakerHalfOpened():
            permits = tuple(data.permits)
            return BreakerState(
                "half_open", data.since, 0.0, data.calls, data.failures, data.slow, "", "", permits, version
            )
        case BreakerClosed():
            return BreakerState(
                "closed", 0.0, 0.0, data.calls, data.failures, data.slow, "", data.reason, (), version
            )
        case _:
            return state


def _load(data: bytes) -> BreakerState:
    import msgspec

    return msgspec.json.decode(data, type=BreakerState)


fold = Fold(kind="breaker", version=1, initial=BreakerState(), evolve=_evolve, load=_load)
"""The state of a breaker after some of its events."""


def trips(breaker: Breaker, tally: Tally, now: float) -> BreakerOpened | None:
    """What a closed breaker that has seen these calls becomes; None when it stays closed. Times are seconds since the
    epoch."""
    reason = breaker.verdict(tally, breaker.least)
    return _opened(breaker, tally, now, reason, breaker.shown_window) if reason else None


def refused_until(breaker: Breaker, state: BreakerState, now: float) -> float | None:
    """Until when no call is made; None when one may be tried."""
    if state.status == "closed" or (state.status == "open" and now >= state.due):
        return None
    if state.status == "open":
        return state.due
    return None if state.calls + len(_held(state, now)) < breaker.half_open else now + AGAIN


def trial_begins(breaker: Breaker, state: BreakerState, holder: str, now: float) -> BreakerHalfOpened | None:
    """The permit for a trial call of `holder`; None when there is none now. Those of lost callers come back."""
    if state.status == "closed" or refused_until(breaker, state, now) is not None:
        return None
    tally = state.tally if state.status == "half_open" else Tally()
    held = [*_held(state, now), Permit(holder, round(now + breaker.permit_time, 3))]
    return _half_opened(tally, held, state.since)


def trial_ends(
    breaker: Breaker, state: BreakerState, holder: str, result: Tally, now: float
) -> BreakerHalfOpened | BreakerOpened | BreakerClosed | None:
    """What the end of a trial call changes: `result` is of one call, or empty when it came to no end. None when nobody
    waits for it any more. It opens again as soon as the rest could not close it."""
    if state.status != "half_open" or all(permit.holder != holder for permit in state.permits):
        return None
    tally = state.tally.plus(result)
    failing = tally.failures / breaker.half_open >= breaker.failure_rate
    if failing or (tally.calls >= breaker.half_open and breaker.verdict(tally, 1)):
        return _opened(breaker, tally, now, "trial", f"{breaker.half_open} trial calls")
    if tally.calls >= breaker.half_open:
        return BreakerClosed(reason="trial", calls=tally.calls, failures=tally.failures, slow=tally.slow)
    left = [permit for permit in _held(state, now) if permit.holder != holder]
    return _half_opened(tally, left, state.since)


def breaker_name(effect: str) -> str:
    """The last part of a breaker's aggregate: the effect's name, or what a subject can hold of it."""
    plain = effect.replace(".", "-")
    if valid_token(plain):
        return plain
    digest = hashlib.sha256(effect.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', plain)[:100]}-{digest}"


def _held(state: BreakerState, now: float) -> list[Permit]:
    return [permit for permit in state.permits if permit.until > now]


def _opened(breaker: Breaker, tally: Tally, now: float, reason: str, window: str) -> BreakerOpened:
    return BreakerOpened(
        reason=reason, calls=tally.calls, failures=tally.failures, slow=tally.slow, window=window,
        since=round(now, 3), due=round(now + cast(float, breaker.open_for), 3),
    )  # fmt: skip


def _half_opened(tally: Tally, permits: list[Permit], since: float) -> BreakerHalfOpened:
    return BreakerHalfOpened(
        calls=tally.calls, failures=tally.failures, slow=tally.slow, permits=permits, since=since
    )


def _singles(tally: Tally, most: int) -> list[Tally]:
    """Calls one by one, at most so many with the same rates."""
    calls, failures, slow = tally.calls, tally.failures, tally.slow
    if calls > most:
        calls, failures, slow = most, round(failures * most / calls), round(slow * most / calls)
    return [Tally(1, int(calls - n <= failures), int(calls - n <= slow)) for n in range(calls)]


def _seconds(name: str, value: Seconds | None) -> float | None:
    """Seconds as a number, of a number or of words such as `10s`."""
    if value is None:
        return None
    found = re.fullmatch(r"([0-9.]+)\s*(ms|s|m|h)", value) if isinstance(value, str) else None
    try:
        seconds = float(found[1]) * _UNITS[found[2]] if found else float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name} is {value!r}; a time above 0 is due: 10, '10s', '500ms', '2m'")
    return seconds
