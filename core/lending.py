"""What a process that holds to limits and the limiter say to each other, as JSON on `dspex.limits.lease.<program>`.

A holder always says all that it has and wants, so every word stands alone: one that is lost, late or repeated does no
harm. Times are seconds from now, except `empty_at`, which is seconds since the epoch by the limiter's clock.
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

__all__ = ["Answer", "Ask", "Claim", "Lent", "Pace", "Paced", "UsedUp"]


class Pace(Struct, omit_defaults=True):
    """What a holder has and wants of a scope's concurrency and rate: permits that it may use, uses and could use, and
    how many more tokens; `empty_at` is the last that it heard of the bucket."""

    have: int = 0
    want: int = 0
    use: int = 0
    tokens: int = 0
    empty_at: float = 0.0


class Claim(Struct, omit_defaults=True):
    """What a holder has of a budget under one lease: spent, reserved by effects under way, and how much more it wants.
    `window` is "" until it was told. `close`: it gives back what is not spent."""

    scope: str
    resource: str
    window: str = ""
    want: float = 0.0
    used: float = 0.0
    reserved: float = 0.0
    close: bool = False


class Ask(Struct, omit_defaults=True):
    """A holder's word: which limits it knows (`seen`), what it has by scope, and by lease. `gone`: it ends."""

    holder: str
    agent: str
    seen: int = -1
    paces: dict[str, Pace] = {}
    leases: dict[str, Claim] = {}
    gone: bool = False


class Paced(Struct, omit_defaults=True):
    """How many permits the holder may use, and so many more tokens, usable `after` seconds."""

    cap: int | None = None
    tokens: int = 0
    after: float = 0.0
    empty_at: float = 0.0


class Lent(Struct, omit_defaults=True):
    """What a lease may spend in all, for how long, and why not more. `over`: there will be no more under this lease.
    `close`: others wait for what it does not use."""

    window: str = ""
    granted: float = 0.0
    left: float | None = None
    over: bool = False
    close: bool = False
    refused: Literal["", "wait", "exhausted"] = ""
    used: float = 0.0
    of: float = 0.0
    renews: float = 0.0


class UsedUp(Struct, omit_defaults=True):
    """A budget of which nothing is left: when it renews, in seconds since the epoch; 0: never."""

    scope: str
    resource: str
    used: float
    of: float
    renews: float = 0.0


class Answer(Struct, omit_defaults=True):
    """The limiter's word. `limits` are those that concern the holder, when it does not know them yet; `again` is when
    it should ask again at the latest."""

    seen: int
    limits: dict[str, dict[str, str]] | None = None
    paces: dict[str, Paced] = {}
    leases: dict[str, Lent] = {}
    used_up: list[UsedUp] = []
    again: float = 1.0
