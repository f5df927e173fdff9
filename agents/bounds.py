"""How much the log keeps of what has ended; all of it, unless told."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Bounds"]


@dataclass(frozen=True)
class Bounds:
    """How much the log keeps of what has ended: seconds since the end, messages, bytes. None is no bound."""

    age: float | None = None
    count: int | None = None
    bytes: int | None = None

    @property
    def any(self) -> bool:
        return any(bound is not None for bound in (self.age, self.count, self.bytes))
