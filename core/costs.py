"""How it is asked what effects have cost, and what is said: the same words on the bus, in the shell, in a file."""

from __future__ import annotations

from msgspec import Struct, field

from dspex.core.errors import InvalidInput

__all__ = ["BY", "CostQuery", "CostRow", "Costs"]

BY = ("program", "model", "day", "task")


class CostQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Whose cost is wanted: of one `program` or `task`, or of all; a row for each of what `by` names. `day` is of UTC.
    `position` is up to where in the log an answer has to know."""

    program: str = ""
    task: str = ""
    by: list[str] = field(default_factory=lambda: ["program", "model"])
    position: int = 0

    def check(self) -> None:
        """Raises InvalidInput with what is wrong in it."""
        for name in self.by:
            if name not in BY:
                raise InvalidInput(f"{name[:40]!r} is nothing to sum up by; {', '.join(BY)} are")
        if self.task and not (self.task.isdecimal() and len(self.task) < 19):
            raise InvalidInput(f"{self.task[:40]!r} is no task's id")


class CostRow(Struct, kw_only=True, omit_defaults=True):
    """What some effects have cost together; of `program`, `model`, `day` and `task` those that were asked for. The
    model is "" for effects that asked none."""

    program: str | None = None
    model: str | None = None
    day: str | None = None
    task: str | None = None
    calls: int
    tokens: int
    usd: float


class Costs(Struct):
    """An answer: its rows by name, and the position up to which it knows. `more`: there are rows beyond these."""

    rows: list[CostRow]
    position: int
    more: bool = False
