"""Which agents a supervisor should have: so many of each program, all of its newest code. Pure: it says what to do.

New code comes in a generation. A program is rolled over to one agent by agent: a new one begins, and only when it
serves one of the old ones leaves, so there are never fewer than there should be. If a new one cannot serve, all new
ones leave, and the old ones, which nobody has touched or which are made up for, go on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Action", "Begin", "Fleet", "Leave", "Rolled", "RolledBack", "surge"]


@dataclass(frozen=True)
class Begin:
    """Start an agent; `number` is part of its name, and nobody else's while it lives."""

    program: str
    number: int
    generation: int


@dataclass(frozen=True)
class Leave:
    """An agent takes no more tasks, and ends when it has done those it has."""

    program: str
    number: int


@dataclass(frozen=True)
class Rolled:
    """All that take tasks of the program are of this generation."""

    program: str
    generation: int


@dataclass(frozen=True)
class RolledBack:
    """An agent of this generation could not serve, so the program stays what it was."""

    program: str
    generation: int
    why: str


Action = Begin | Leave | Rolled | RolledBack


def surge(agents: int) -> int:
    """How many processes of a program there may be beyond its number while it is rolled over, old ones that end what
    they have among them."""
    return max(1, agents // 4)


@dataclass
class _Member:
    generation: int
    serving: bool = False
    ever: bool = False
    leaving: bool = False
    quiet: bool = False
    """It leaves, and takes no more tasks."""
    stale: bool = False
    """To be replaced by one of the same code."""


@dataclass
class _Program:
    wanted: int
    generation: int
    before: int | None = None
    """The generation that it is rolled over from."""
    members: dict[int, _Member] = field(default_factory=dict)

    def live(self) -> dict[int, _Member]:
        return {number: member for number, member in self.members.items() if not member.leaving}


class Fleet:
    """The agents of all programs. Each method that tells it something returns what is to be done."""

    def __init__(self) -> None:
        self._programs: dict[str, _Program] = {}

    # -- what is wanted

    def serve(self, program: str, agents: int, generation: int = 0) -> list[Action]:
        """One more program."""
        self._programs[program] = _Program(agents, generation)
        return self._settled(program)

    def scale(self, program: str, agents: int) -> list[Action]:
        """So many agents from now on. Raises KeyError."""
        self._programs[program].wanted = agents
        return self._settled(program)

    def roll(self, program: str, generation: int) -> list[Action]:
        """Go over to a generation. Raises KeyError, and ValueError while the program goes over to another."""
        it = self._programs[program]
        if it.before is not None:
            raise ValueError(f"{program} is being rolled over already")
        it.before, it.generation = it.generation, generation
        return self._settled(program)

    def renew(self, program: str, number: int) -> list[Action]:
        """Replace this very agent: another one begins, and when that serves, it leaves. Raises KeyError."""
        self._programs[program].members[number].stale = True
        return self._settled(program)

    def lose(self, program: str, number: int) -> list[Action]:
        """This very agent is to leave, and the program is to have one less. Raises KeyError."""
        it = self._programs[program]
        member = it.members[number]
        if member.leaving:
            return []
        member.leaving = True
        it.wanted = max(it.wanted - 1, 0)
        return [Leave(program, number), *self._settled(program)]

    # -- what happens

    def serves(self, program: str, number: int) -> list[Action]:
        member = self._member(program, number)
        if member is None or member.leaving:
            return []
        member.serving = member.ever = True
        return self._settled(program)

    def down(self, program: str, number: int, why: str) -> list[Action]:
        """An agent died, whether it will be started again or not. A new one that has never served tells that its
        generation cannot."""
        member = self._member(program, number)
        if member is None:
            return []
        member.serving = False
        it = self._programs[program]
        if it.before is None or member.ever or member.leaving or member.generation != it.generation:
            return []
        generation, it.generation, it.before = it.generation, it.before, None
        member.leaving = True
        return [RolledBack(program, generation, why), Leave(program, number), *self._settled(program)]

    def takes_no_more(self, program: str, number: int) -> list[Action]:
        """An agent that was to leave takes no more tasks."""
        member = self._member(program, number)
        if member is None or not member.leaving or member.quiet:
            return []
        member.quiet = True
        return self._settled(program)

    def gone(self, program: str, number: int) -> list[Action]:
        """An agent that was to leave has ended."""
        if self._member(program, number) is None:
            return []
        del self._programs[program].members[number]
        return self._settled(program)

    # -- how things stand

    def wanted(self, program: str) -> int:
        return self._programs[program].wanted

    def programs(self) -> list[str]:
        return list(self._programs)

    def current(self, program: str) -> int:
        """The generation that it is in, or comes from."""
        it = self._programs[program]
        return it.generation if it.before is None else it.before

    def rolling(self, program: str) -> bool:
        return self._programs[program].before is not None

    def members(self, program: str) -> dict[int, int]:
        """The generation of each agent by number, those that leave among them."""
        return {number: member.generation for number, member in self._programs[program].members.items()}

    def serving(self, program: str) -> int:
        """How many take tasks now."""
        return sum(member.serving for member in self._programs[program].live().values())

    def generations(self) -> set[int]:
        """Those whose code is still needed, to serve or to start somebody again."""
        found: set[int] = set()
        for it in self._programs.values():
            found |= {it.generation, *(member.generation for member in it.members.values())}
            found |= {it.before} if it.before is not None else set()
        return found

    # -- inside

    def _member(self, program: str, number: int) -> _Member | None:
        it = self._programs.get(program)
        return it.members.get(number) if it else None

    def _settled(self, program: str) -> list[Action]:
        return list(self._next(program, self._programs[program]))

    def _next(self, program: str, it: _Program) -> Iterator[Action]:
        """What is to be done now; more when something has happened."""
        while True:
            live = it.live()
            new = {number: each for number, each in live.items() if _is_new(each, it.generation)}
            old = {number: member for number, member in live.items() if number not in new}
            waits = bool(old) and not all(member.serving for member in new.values())
            if len(live) > it.wanted + (surge(it.wanted) if waits else 0):
                yield self._leave(program, old or new)
            elif (not old and len(new) < it.wanted) or (
                old and not waits and len(it.members) < it.wanted + surge(it.wanted)
            ):
                yield self._begin(program, it)
            else:
                break
        leaving = [each for each in it.members.values() if each.leaving and each.generation != it.generation]
        served = not old and all(each.serving for each in new.values())
        if it.before is not None and served and all(each.quiet for each in leaving):
            it.before = None
            yield Rolled(program, it.generation)

    def _begin(self, program: str, it: _Program) -> Begin:
        number = next(number for number in range(1, len(it.members) + 2) if number not in it.members)
        it.members[number] = _Member(it.generation)
        return Begin(program, number, it.generation)

    def _leave(self, program: str, among: dict[int, _Member]) -> Leave:
        """Of those who do not serve rather than of those who do, the youngest first."""
        number = max(among, key=lambda number: (not among[number].serving, number))
        among[number].leaving = True
        return Leave(program, number)


def _is_new(member: _Member, generation: int) -> bool:
    return member.generation == generation and not member.stale
