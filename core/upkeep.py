"""How the agents of a program are looked after: when they are started again, and what they may use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import get_args

from dspex.core.errors import ConfigurationError
from dspex.core.supervision import GIVE_UP, ChildSpec, Intensity, Restart, Strategy, SupervisorSpec

__all__ = ["Named", "Upkeep", "arranged", "stop_time"]

USUAL = Intensity()
LONGEST_SHUTDOWN = 3600.0
LEAST_MEMORY = 64 << 20
"""Bytes that an agent needs before it has done anything."""


@dataclass(frozen=True)
class Upkeep:
    """How each agent of a program is looked after.

    `restart` is permanent, transient (not after it ended in order) or temporary (never). More restarts than `intensity`
    allows are retried after growing delays; an agent that fails `give_up` times in a row before it has served anything
    is given up (0: never). `shutdown` is how many seconds it gets to end; `blocked_after` seconds with an event loop
    that stands still it is killed (0: it is only reported). `memory` is how many bytes it may hold, `cpu` how many
    processors it may use (0: all). After `recycle_after` tasks, or holding `recycle_memory` bytes, it drains and is
    replaced (0: never). Raises ConfigurationError.
    """

    restart: Restart = "permanent"
    intensity: Intensity = USUAL
    give_up: int = GIVE_UP
    shutdown: float = 10.0
    blocked_after: float = 0.0
    memory: int = 0
    cpu: float = 0.0
    recycle_after: int = 0
    recycle_memory: int = 0

    def __post_init__(self) -> None:
        if self.restart not in get_args(Restart):
            raise ConfigurationError(f"restart = {self.restart!r}: it is one of {', '.join(get_args(Restart))}")
        if not 0 < self.shutdown <= LONGEST_SHUTDOWN:
            raise ConfigurationError(f"shutdown = {self.shutdown:g}: it is between 0 and {LONGEST_SHUTDOWN:g} s")
        for name in ("give_up", "blocked_after", "memory", "cpu", "recycle_after", "recycle_memory"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} = {getattr(self, name):g}: it is not below 0, which is none")
        if 0 < self.blocked_after < 2:
            raise ConfigurationError(f"blocked_after = {self.blocked_after:g}: agents beat once a second; take 2")
        for name in ("memory", "recycle_memory"):
            if 0 < getattr(self, name) < LEAST_MEMORY:
                raise ConfigurationError(f"{name} = {getattr(self, name)} bytes: an idle agent needs up to 64 MiB")
        if self.memory and self.recycle_memory >= self.memory:
            raise ConfigurationError(
                f"recycle_memory = {self.recycle_memory} bytes: at memory = {self.memory} an agent is ended before that"
            )

    def over(self, name: str, agents: tuple[ChildSpec, ...]) -> SupervisorSpec:
        """The supervisor of a program's agents, which are equal: they start and stop together."""
        return SupervisorSpec(
            name, agents, intensity=self.intensity, beyond="retry", ordered=False, give_up=self.give_up
        )


@dataclass(frozen=True)
class Named:
    """A supervisor that somebody asked for: `children` are programs, or other such supervisors, in their order."""

    name: str
    children: tuple[str, ...]
    strategy: Strategy = "one_for_one"
    intensity: Intensity = USUAL
    restart: Restart = "permanent"
    give_up: int = GIVE_UP


def arranged(programs: tuple[SupervisorSpec, ...], named: tuple[Named, ...]) -> tuple[SupervisorSpec, ...]:
    """Put the supervisors of programs under those that were asked for.

    There a program is one child: the first death among its agents is the parent's to judge, by its strategy and
    intensity. Raises ConfigurationError for supervisors that are no tree.
    """
    left = {spec.name: spec for spec in programs}
    wanted = {one.name: one for one in named}
    above: dict[str, str] = {}
    for one in named:
        if one.name in left:
            raise ConfigurationError(f"[supervisors.{one.name}]: a program has this name already; choose another")
        if not one.children:
            raise ConfigurationError(f"[supervisors.{one.name}]: it has no children; name programs, or leave it out")
        for child in one.children:
            if child not in left and child not in wanted:
                have = ", ".join([*left, *(name for name in wanted if name != one.name)])
                raise ConfigurationError(f"[supervisors.{one.name}]: there is no program {child}; there are {have}")
            if child in above:
                both = f"{above[child]} and {one.name}" if above[child] != one.name else f"{one.name} twice"
                raise ConfigurationError(f"[supervisors.{one.name}]: {child} is under {both}; a child has one place")
            above[child] = one.name

    def made(name: str, top: bool) -> SupervisorSpec:
        if name in left:
            spec = left[name]
            return spec if top else replace(spec, intensity=Intensity(0), beyond="escalate", give_up=0)
        one = wanted[name]
        return SupervisorSpec(
            name, tuple(made(child, False) for child in one.children), strategy=one.strategy, intensity=one.intensity,
            restart=one.restart, beyond="retry" if top else "escalate", give_up=one.give_up if top else 0,
        )  # fmt: skip

    for name in wanted:
        seen, at = {name}, above.get(name)
        while at is not None:
            if at in seen:
                raise ConfigurationError(f"[supervisors.{name}]: it is above and below {at}; a tree has no cycles")
            seen.add(at)
            at = above.get(at)
    tops = [name for name in (*left, *wanted) if name not in above]
    return tuple(made(name, True) for name in tops)


def stop_time(shutdowns: list[float], named: bool) -> float:
    """Seconds that stopping the agents takes at most: all at once, or one after the other where they have an order."""
    return sum(shutdowns) if named else max(shutdowns, default=0.0)
