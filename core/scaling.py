"""How many agents a program should have: a fixed number, or one between bounds that follows what waits and how long.

A task should not wait longer than `wait` seconds. By Little's law (L = lambda W; J. D. C. Little, "A Proof for the
Queuing Formula", 1961) so many slots are needed as tasks run now, and as many more as clear the queue within `wait`. A
program grows when a task has waited too long, at most to the double at once, and then waits for the effect. It shrinks
to what it would have needed over the whole of the last `quiet` seconds, with room to spare: what is left after that is
never too little for the same load, so a constant load makes it neither grow nor shrink again.
"""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass

__all__ = ["MAX_AGENTS", "Decision", "Load", "Scale", "Scaler"]

MAX_AGENTS = 1000
"""Agents of one program under one supervisor."""
BUSY = 0.7
"""How much of its slots a program should use after it has shrunk."""
SETTLE = 3.0
"""Seconds after a change before the next one upwards: new agents must have had time to help."""


@dataclass(frozen=True)
class Scale:
    """How many agents there may be: from `least` to `most`. Equal bounds are a fixed number.

    `wait` is how many seconds a task may wait, `quiet` for how many seconds less load must have lasted.
    """

    least: int
    most: int
    wait: float = 1.0
    quiet: float = 30.0

    @classmethod
    def read(cls, text: str) -> Scale:
        """`8` or `1..8`. Raises ValueError with a sentence."""
        found = re.fullmatch(r"(\d{1,4})(?:\.\.(\d{1,4}))?", text.strip())
        if found is None:
            raise ValueError(f"{text[:40]!r} is no number of agents; write 8, or 1..8 for between one and eight")
        scale = cls(int(found[1]), int(found[2] or found[1]))
        scale.check()
        return scale

    def check(self) -> None:
        """Raises ValueError when nobody could keep to it."""
        if self.most > MAX_AGENTS:
            raise ValueError(f"{self.most} agents of one program are more than {MAX_AGENTS:,}")
        if self.least > self.most:
            raise ValueError(f"{self.least}..{self.most} agents: the first number is the smaller one")
        if self.most and not self.least:
            raise ValueError(f"0..{self.most} agents: with none there would be nobody to notice that tasks come")

    @property
    def automatic(self) -> bool:
        return self.least < self.most

    def __str__(self) -> str:
        return f"{self.least}..{self.most}" if self.automatic else str(self.most)


@dataclass(frozen=True)
class Load:
    """What a program has to do: tasks `waiting` for an agent, the `oldest` of them for so many seconds; `running` in
    our agents, each of which has `slots`; a task takes `seconds` there, 0 when nobody knows."""

    waiting: int = 0
    oldest: float = 0.0
    running: int = 0
    slots: int = 1
    seconds: float = 0.0

    def needs(self, wait: float, busy: float = 1.0) -> int:
        """How many agents work this off, so that nothing waits longer than `wait` and `busy` of the slots are used."""
        at_once = self.running + self.waiting * self.seconds / wait
        return math.ceil(round(at_once / (self.slots * busy), 6))


@dataclass(frozen=True)
class Decision:
    """So many agents from now on, and why, in words."""

    agents: int
    why: str


class Scaler:
    """Decides for one program. Tell it the load about once a second."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self._since: float | None = None
        self._grown = -math.inf
        self._needed: deque[tuple[float, int]] = deque()
        """What would have been needed when; only what is the most from then on."""

    def decide(self, load: Load, agents: int, now: float) -> Decision | None:
        """What should change, with `agents` there now; None when it is right as it is."""
        scale = self.scale
        if not scale.least <= agents <= scale.most:
            return self._change(max(scale.least, min(agents, scale.most)), f"the bounds are {scale}", now)
        if not scale.automatic:
            return None
        self._remember(load, now)
        if load.waiting and load.oldest > scale.wait and now - self._grown >= SETTLE:
            wanted = min(max(agents + 1, min(load.needs(scale.wait), 2 * agents)), scale.most)
            if wanted > agents:
                return self._change(wanted, _waits(load), now)
        since = self._since if self._since is not None else now
        most = max(self._needed[0][1], scale.least)
        if most < agents and now - since >= scale.quiet:
            return self._change(most, f"{most} would have done for {scale.quiet:g} s", now)
        return None

    def _remember(self, load: Load, now: float) -> None:
        if self._since is None:
            self._since = now
        needed = load.needs(self.scale.wait, BUSY)
        if load.waiting and load.oldest > self.scale.wait:
            needed = self.scale.most  # what waits too long says that there are too few, whatever a task takes
        while self._needed and self._needed[-1][1] <= needed:
            self._needed.pop()
        self._needed.append((now, needed))
        while self._needed[0][0] < now - self.scale.quiet:
            self._needed.popleft()

    def _change(self, agents: int, why: str, now: float) -> Decision:
        self._grown = self._since = now
        self._needed.clear()
        return Decision(agents, why)


def _waits(load: Load) -> str:
    tasks = "1 task waits" if load.waiting == 1 else f"{load.waiting:,} tasks wait"
    return f"{tasks}, the oldest for {load.oldest:.1f} s"
