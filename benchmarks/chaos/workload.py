"""The tasks of a campaign, each made from the seed and its number alone, and how each of them must end."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CODE_OF_A_FAILURE", "PROGRAM", "Expected", "Job", "expect", "job", "step", "value_of"]

PROGRAM = "chaos"
CODE_OF_A_FAILURE = 500
KINDS = {"quick": 36, "steps": 40, "fail": 4, "nap": 6, "signal": 5, "hold": 5, "late": 4}
"""So many of a hundred tasks: no effect; five effects, two of them at once; a refusal; a sleep in the log between two
effects; a wait for a signal; a wait that only a cancel ends; one that only its deadline ends."""


@dataclass(frozen=True)
class Job:
    """What a client does about one number: what it submits and how, and what it does beside."""

    n: int
    body: dict[str, Any]
    ask: bool
    key: str
    deadline: float | None
    twice: bool
    scored: bool
    read: bool
    cancel: bool

    @property
    def kind(self) -> str:
        return str(self.body["kind"])

    @property
    def headers(self) -> dict[str, str]:
        keyed = {"Dspex-Key": self.key} if self.key else {}
        return keyed | ({"Dspex-Deadline": f"{self.deadline:g}"} if self.deadline is not None else {})


@dataclass(frozen=True)
class Expected:
    """How a task may end, and the output it then gives; None: the log has more to say about it (a signal's value).
    One that `waits` completes when somebody sends what it waits for."""

    types: frozenset[str]
    output: dict[str, Any] | None = None
    code: int = 0
    at_least: float = 0.0
    waits: bool = False


def job(seed: int, n: int) -> Job:
    """The job of this number: the same for the same seed, whoever does it and when."""
    chance = random.Random(f"{seed}/job/{n}")
    kind = chance.choices(list(KINDS), list(KINDS.values()))[0]
    seconds = {"nap": 2.0, "late": 0.0}.get(kind, chance.choice((0.0, 0.005, 0.02)))
    waits = kind in ("nap", "signal", "hold", "late")
    told = kind in ("signal", "hold")  # with a key, so that whoever has to tell it something learns its id
    return Job(
        n=n, body={"n": n, "kind": kind, "seconds": seconds}, ask=not waits and chance.random() < 0.4,
        key=f"{seed}-{n}" if told or chance.random() < 0.8 else "", deadline=3.0 if kind == "late" else None,
        twice=chance.random() < 0.1, scored=chance.random() < 0.1, read=chance.random() < 0.5,
        cancel=kind == "hold" or (not waits and chance.random() < 0.02),
    )  # fmt: skip


def value_of(n: int) -> int:
    """What five steps make of a number."""
    value = step(step(n * 1000))
    return step(step(value + 1) * 3 + step(value + 2))


def step(value: int) -> int:
    """What one effect makes of a number."""
    return (value * 31 + 7) % 1_000_003


def expect(body: Any, headers: Mapping[str, str]) -> Expected | None:
    """How a task with this input and these headers must end; None when it is none of ours, or was tampered with."""
    strange = headers.keys() - {"Dspex-Key", "Dspex-Reply", "Dspex-Deadline", "Dspex-Actor"}
    if any(name.startswith("Dspex-") for name in strange) or not _is_input(body):
        return None
    n, kind = body["n"], body["kind"]
    if ("Dspex-Deadline" in headers) != (kind == "late") or len(headers.get("Dspex-Key", "-")) not in range(1, 257):
        return None
    completed, failed = frozenset({"TaskCompleted"}), frozenset({"TaskFailed"})
    return {
        "quick": Expected(completed, {"n": n, "value": n * 7}),
        "steps": Expected(completed, {"n": n, "value": value_of(n)}),
        "nap": Expected(completed, {"n": n, "value": step(step(n))}, at_least=body["seconds"]),
        "signal": Expected(completed),
        "fail": Expected(failed, code=CODE_OF_A_FAILURE),
        "late": Expected(failed, code=408, waits=True),
        "hold": Expected(frozenset({"TaskCancelled"}), waits=True),
    }[kind]


def _is_input(body: Any) -> bool:
    if not isinstance(body, dict) or body.keys() != {"n", "kind", "seconds"} or body["kind"] not in KINDS:
        return False
    n, seconds = body["n"], body["seconds"]
    return type(n) is int and abs(n) < 1 << 40 and type(seconds) in (int, float) and 0 <= seconds <= 5
