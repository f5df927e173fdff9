"""What an effect may cost at most, said before it is performed, and what it has cost, said inside of it."""

from __future__ import annotations

import math

from msgspec import Struct

from dspex.core.errors import InvalidInput
from dspex.core.events import Usage

__all__ = ["Cost", "Spent", "cost_of", "usage_of"]


class Cost(Struct, frozen=True):
    """The most that one call of an effect may cost, in dollars and tokens, and the model that it asks, if any."""

    usd: float = 0.0
    tokens: int = 0
    model: str = ""

    def of(self, resource: str, read_only: bool) -> float:
        """The part of `usd`, `tokens` or `calls`."""
        return {"usd": self.usd, "tokens": self.tokens, "calls": 0 if read_only else 1}[resource]


class Spent:
    """What an effect under way says that it has cost; several words add up."""

    __slots__ = ("model", "tokens", "usd")

    def __init__(self) -> None:
        self.usd, self.tokens, self.model = 0.0, 0, ""

    def add(self, usd: float, tokens: int, model: str) -> None:
        """Raises InvalidInput for what cannot be a cost."""
        cost = cost_of(usd, tokens, model)
        self.usd, self.tokens, self.model = self.usd + cost.usd, self.tokens + cost.tokens, model or self.model


def cost_of(usd: float, tokens: int, model: str) -> Cost:
    """A cost that makes sense. Raises InvalidInput."""
    for name, value in (("usd", usd), ("tokens", tokens)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            raise InvalidInput(f"{name} = {value!r}: a cost is a number, 0 or more")
    if tokens != int(tokens):
        raise InvalidInput(f"tokens = {tokens!r}: tokens are whole")
    return Cost(float(usd), int(tokens), str(model)[:256])


def usage_of(cost: Cost | None, spent: Spent | None, read_only: bool) -> Usage | None:
    """What an effect has cost: what it said, or else the most that it may cost; None when it costs nothing."""
    if spent is not None:
        usd, tokens, model = spent.usd, spent.tokens, spent.model or (cost.model if cost else "")
    elif cost is not None:
        usd, tokens, model = cost.usd, cost.tokens, cost.model
    else:
        return None
    usage = Usage(round(usd, 9), tokens, 0 if read_only else 1)
    return Usage(usage.usd, usage.tokens, usage.calls, model) if model else usage
