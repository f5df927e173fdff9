"""Limits: how fast, how much at once, and how much in all a program, an agent, a tenant, a study or a model may use.

Everything here is pure and time is an input. Who asks, who answers and what is written stands in `agents.limiter` and
`agents.limits`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from msgspec import Struct

from dspex.core.errors import InvalidInput
from dspex.core.subjects import aggregate, valid_token

__all__ = [
    "BUDGETS", "KINDS", "RESOURCES", "Amount", "Limit", "Scope", "Window", "bar", "budget_aggregate", "limit_of",
    "parse_pairs", "parse_scope", "total", "window_of",
]  # fmt: skip

KINDS = ("program", "agent", "tenant", "study", "model")
BUDGETS = ("usd", "tokens", "calls")
RESOURCES = ("rate", "concurrency", *BUDGETS)
MAX_NAME = 100
_UNITS = {
    "s": "s", "sec": "s", "second": "s", "min": "min", "minute": "min", "h": "hour", "hour": "hour", "d": "day",
    "day": "day", "month": "month",
}  # fmt: skip
_SECONDS = {"s": 1.0, "min": 60.0, "hour": 3600.0, "day": 86_400.0}
_FORMATS = {"s": "%Y%m%dT%H%M%S", "min": "%Y%m%dT%H%M", "hour": "%Y%m%dT%H", "day": "%Y%m%d", "month": "%Y%m"}
_AMOUNT = re.compile(r"\$?\s*([0-9][0-9_,]*(?:\.[0-9]+)?|\.[0-9]+)\s*(usd|tokens?|calls?|tasks?)?\s*(?:/\s*([a-z]+))?")


class Scope(NamedTuple):
    """What a limit is of: `program qabot`, written `qabot`; `agent`, `tenant`, `study` or `model`, written
    `tenant:t1`."""

    kind: str
    name: str

    def __str__(self) -> str:
        return self.name if self.kind == "program" else f"{self.kind}:{self.name}"

    @property
    def token(self) -> str:
        """The name as one token of a subject; a hash for names that cannot be one."""
        if valid_token(self.name) and len(self.name) <= MAX_NAME:
            return self.name
        return f"h-{hashlib.sha256(self.name.encode()).hexdigest()[:32]}"

    @property
    def aggregate(self) -> str:
        """Where its limits stand in the log."""
        return aggregate("limits", self.token, self.kind)


def parse_scope(text: str) -> Scope:
    """`qabot`, `agent:qabot-1`, `tenant:t1`, `study:s`, `model:openai/gpt-4o`. Raises InvalidInput."""
    kind, colon, name = text.partition(":")
    if not colon:
        kind, name = "program", text
    if kind not in KINDS:
        kinds = ", ".join(f"{each}:NAME" for each in KINDS[1:])
        raise InvalidInput(f"{text[:80]!r} can have no limit; a program (qabot) can, or {kinds}")
    if not 1 <= len(name) <= 256 or not name.isprintable() or (kind in ("program", "agent") and not valid_token(name)):
        raise InvalidInput(f"{name[:80]!r} is no name of {'an' if kind == 'agent' else 'a'} {kind}")
    return Scope(kind, name)


class Amount(Struct, frozen=True):
    """So much in a unit of time (`s`, `min`, `hour`, `day`, `month`), or in all ("")."""

    count: float
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.count:.12g}/{self.unit}" if self.unit else f"{self.count:.12g}"

    @property
    def per_second(self) -> float:
        """As a rate."""
        return self.count / _SECONDS[self.unit]

    @property
    def burst(self) -> float:
        """How many may start at once after a rest: one second's worth, one at least."""
        return max(1.0, self.per_second)


class Window(NamedTuple):
    """The time in which a budget counts, `[start, end)` in seconds since the epoch. Days and months begin at midnight
    UTC."""

    id: str
    start: float
    end: float


def window_of(unit: str, now: float) -> Window:
    """The window that `now` is in."""
    if not unit:
        return Window("all", 0.0, math.inf)
    when = datetime.fromtimestamp(now, UTC)
    if unit == "month":
        start = when.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        end = start.replace(year=start.year + start.month // 12, month=start.month % 12 + 1)
        return Window(f"{start:%Y%m}", start.timestamp(), end.timestamp())
    first = math.floor(now / _SECONDS[unit]) * _SECONDS[unit]
    return Window(f"{datetime.fromtimestamp(first, UTC):{_FORMATS[unit]}}", first, first + _SECONDS[unit])


class Limit(Struct, frozen=True):
    """The limits of one scope; None where there is none. `when_exhausted` says what becomes of a task that meets a
    budget which is used up: it fails, or it waits until the budget renews."""

    rate: Amount | None = None
    concurrency: int | None = None
    usd: Amount | None = None
    tokens: Amount | None = None
    calls: Amount | None = None
    when_exhausted: Literal["fail", "wait"] = "fail"

    def budget(self, resource: str) -> Amount | None:
        """The budget of `usd`, `tokens` or `calls`."""
        found: Amount | None = getattr(self, resource)
        return found

    @property
    def paced(self) -> bool:
        """Whether it bounds how fast or how much at once."""
        return self.rate is not None or self.concurrency is not None

    def texts(self) -> dict[str, str]:
        """As people write it: `{"rate": "20/s", "usd": "5/day"}`."""
        found = {name: str(getattr(self, name)) for name in RESOURCES if getattr(self, name) is not None}
        return found | ({"when_exhausted": self.when_exhausted} if self.when_exhausted != "fail" else {})


def limit_of(texts: Mapping[str, str]) -> Limit:
    """What `{"rate": "20/s", "concurrency": "8", "usd": "5/day"}` says. Raises InvalidInput."""
    given: dict[str, Amount | int | str] = {}
    for name, text in texts.items():
        if name == "when_exhausted":
            if text not in ("fail", "wait"):
                raise InvalidInput(f"when_exhausted is {text[:40]!r}; fail or wait is due")
            given[name] = text
        elif name not in RESOURCES:
            raise InvalidInput(f"{name[:40]!r} is no limit; {', '.join(RESOURCES)} and when_exhausted are")
        else:
            given[name] = _value(name, text)
    return Limit(**given)  # type: ignore[arg-type]  # each is what its name wants


def parse_pairs(texts: Mapping[str, str], base: Limit) -> Limit:
    """`base` with what is given put in its place; `none` takes a limit away. Raises InvalidInput."""
    merged = base.texts()
    for name, text in texts.items():
        if text.lower() == "none" and name in RESOURCES:
            merged.pop(name, None)
        else:
            merged[name] = text
    return limit_of(merged)


def _value(name: str, text: str) -> Amount | int:
    found = _AMOUNT.fullmatch(text.strip().lower())
    example = {"rate": "20/s", "concurrency": "8", "usd": "5/day", "tokens": "100000/hour", "calls": "1000/day"}[name]
    wrong = InvalidInput(f"{name} = {text[:40]!r}; a number is due, such as {example}")
    if not found or (found[2] and not _fits(name, found[2])):
        raise wrong
    count, unit = float(found[1].replace(",", "").replace("_", "")), found[3] or ""
    if unit and unit not in _UNITS:
        raise InvalidInput(f"{name} = {text[:40]!r}; the time is one of s, min, hour, day, month")
    unit = _UNITS.get(unit, "")
    if not 0 <= count < 1e15 or (name != "usd" and name != "rate" and count != int(count)):
        raise wrong
    if name == "concurrency":
        if unit:
            raise InvalidInput(f"concurrency = {text[:40]!r}; it is how many at once, such as 8")
        return int(count)
    if name == "rate":
        if not unit or unit == "month" or count <= 0:
            raise InvalidInput(f"rate = {text[:40]!r}; so many in a s, min, hour or day are due, such as 20/s")
    elif unit == "s":
        raise InvalidInput(f"{name} = {text[:40]!r}; a budget is for a min, hour, day or month, or in all")
    return Amount(count, unit)


def _fits(name: str, word: str) -> bool:
    return word.rstrip("s") == {"rate": "task", "concurrency": "task"}.get(name, name).rstrip("s")


def budget_aggregate(scope: Scope, resource: str, window: str) -> str:
    """Where the leases and alerts of one limit in one window stand in the log."""
    return aggregate("budget", scope.token, f"{scope.kind}-{resource}-{window}")


def bar(used: float, of: float, width: int = 20) -> str:
    """`████░░░░`: how much of a limit is used."""
    full = round(width * min(used / of, 1.0)) if of > 0 else width
    return "█" * full + "░" * (width - full)


def total(amounts: Iterable[float]) -> float:
    """A sum in which cents do not crumble."""
    return round(math.fsum(amounts), 9)
