"""What a system is to serve: plans, the programs in them, and what has to be known of a program's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from msgspec import Struct

from dspex.agents.code import code_of, files_of
from dspex.compose.app import load_app
from dspex.core.errors import ConfigurationError, DspexError
from dspex.core.program import Program
from dspex.core.scaling import Scale
from dspex.core.upkeep import Upkeep

__all__ = ["About", "Plan", "check_names", "programs_of"]


@dataclass(frozen=True)
class Plan:
    """A program to serve: `app` is loaded in the supervisor, unless `program` is given; `agents` serve each, to begin
    with, and as many as `scale` allows. Of several programs in `app` all are served, or the one called `name`."""

    app: str = ""
    agents: int = 1
    name: str = ""
    program: type[Program] | None = None
    values: dict[str, Any] = field(default_factory=dict)
    scale: Scale | None = None
    max_queue: int | None = None
    upkeep: Upkeep = field(default_factory=Upkeep)

    @property
    def bounds(self) -> Scale:
        return self.scale or Scale(self.agents, self.agents)


class About(Struct, frozen=True):
    """A program as one load of its code gives it."""

    program: str
    doc: str
    fingerprint: str
    code: str
    input_schema: dict[str, Any]
    output_schema: dict[str, Any]
    slots: int
    timeout: float
    files: list[str]

    @classmethod
    def of(cls, program: type[Program]) -> Self:
        about = program.describe()
        return cls(
            about.name, about.doc, about.fingerprint, code_of(program), about.input_schema, about.output_schema,
            program.slots(), program.timeout, [str(file) for file in files_of(program)],
        )  # fmt: skip


def programs_of(plan: Plan) -> list[type[Program]]:
    """The programs that a plan names. Raises ConfigurationError when they cannot be loaded."""
    if plan.program:
        return [plan.program]
    found = load_app(plan.app)
    named = [program for program in found if plan.name in ("", program.name)]
    if not named:
        have = ", ".join(program.name for program in found)
        raise ConfigurationError(f"[programs.{plan.name}]: {plan.app} has no program {plan.name}; it has {have}")
    return named


def check_names(programs: Sequence[type[Program]]) -> None:
    """Raises DspexError when two programs have the same name."""
    seen: dict[str, type[Program]] = {}
    for program in programs:
        other = seen.setdefault(program.name, program)
        if other is not program:
            both = f"{other.__name__} and {program.__name__}"
            raise DspexError(f"{both} are both called {program.name}; name one of them")
