"""What a supervisor decides: which child to start or to stop when one has come up, has ended, or is asked for.

The rules are those of Erlang/OTP's `supervisor` (OTP Design Principles, "Supervisor Behaviour"): children start in
order and stop in reverse, a restart strategy says who goes down with whom, and a supervisor that sees more restarts
than its intensity allows ends with all of its children and leaves the rest to its parent. What we add is
`beyond = "retry"`: there the failed ones are started again after growing delays, and given up when that does not help.

A `Tree` keeps the state and returns what is to be done. It reads no clock and draws no random number: both are given.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Action", "ChildSpec", "Ending", "Escalated", "GaveUp", "Intensity", "Kill", "Restart", "Start", "Stop", "Strategy",
    "SupervisorSpec", "Tree", "delay_of", "longest_stop",
]  # fmt: skip

Strategy = Literal["one_for_one", "one_for_all", "rest_for_one"]
Restart = Literal["permanent", "transient", "temporary"]
Ending = Literal["normal", "crash", "killed", "recycle", "refused"]
"""How a child ended: by itself in order; by its own fault; by somebody else's hand; to be replaced; for good."""
State = Literal["down", "starting", "serving", "stopping", "stopped", "gave up"]

STABLE = 10.0
"""Seconds after which a child that has come up is trusted, even if it has had no task."""
FIRST_DELAY, MAX_DELAY = 0.2, 5.0
"""Seconds before the first retry, and before the later ones, which wait twice as long each time."""
GIVE_UP = 16
"""Lives in a row that ended by their own fault before anything was served, after which a program's agent is given up.
With the delays between them that is about half a minute."""
HURRY = 1.0
"""Seconds of grace that are left when told to hurry."""


@dataclass(frozen=True)
class Intensity:
    """At most `count` restarts within `seconds`. `1/5s` in words."""

    count: int = 1
    seconds: float = 5.0

    @classmethod
    def read(cls, text: str) -> Intensity:
        """Raises ValueError for what is not like `1/5s`."""
        found = re.fullmatch(r"(\d{1,6})\s*/\s*(\d{1,6}(?:\.\d+)?)\s*s", text.strip())
        if not found or not float(found[2]):
            raise ValueError("write it as restarts and seconds, such as 1/5s")
        return cls(int(found[1]), float(found[2]))

    def __str__(self) -> str:
        return f"{self.count}/{self.seconds:g}s"


@dataclass(frozen=True)
class ChildSpec:
    """A process to look after. `shutdown` is how many seconds it gets between SIGTERM and SIGKILL."""

    name: str
    restart: Restart = field(default="permanent", kw_only=True)
    shutdown: float = field(default=10.0, kw_only=True)


@dataclass(frozen=True)
class SupervisorSpec:
    """A supervisor and its children, in their order.

    `beyond` its intensity it escalates to its parent, as in OTP, or retries by itself; `give_up` is after how many
    failures in a row it does so no more: with the one child, or with all when they live and die together. 0 is never.
    `ordered` False is for equal children, which start and stop together.
    """

    name: str
    children: tuple[ChildSpec | SupervisorSpec, ...] = ()
    strategy: Strategy = "one_for_one"
    intensity: Intensity = Intensity()
    restart: Restart = "permanent"
    beyond: Literal["escalate", "retry"] = "escalate"
    ordered: bool = True
    give_up: int = 0


@dataclass(frozen=True)
class Start:
    """Start the child of this name; `restarts` is how many were before it."""

    name: str
    restarts: int = 0


@dataclass(frozen=True)
class Stop:
    """Ask it to end (SIGTERM)."""

    name: str


@dataclass(frozen=True)
class Kill:
    """End it (SIGKILL): its grace is over."""

    name: str


@dataclass(frozen=True)
class Escalated:
    """A supervisor saw more restarts than its intensity allows. `delay` is when it retries, None when it does not."""

    name: str
    because: str
    delay: float | None


@dataclass(frozen=True)
class GaveUp:
    """A child, or a supervisor with all of its children, will not be started again."""

    name: str
    because: str


Action = Start | Stop | Kill | Escalated | GaveUp


def delay_of(fails: int, jitter: float) -> float:
    """Seconds until the next try after so many failures in a row: exponential backoff with a quarter of jitter.

    `jitter` is between 0 and 1.
    """
    return float(min(FIRST_DELAY * 2 ** min(max(fails - 2, 0), 10), MAX_DELAY) * (0.75 + 0.5 * jitter))


def longest_stop(spec: ChildSpec | SupervisorSpec) -> float:
    """Seconds that stopping takes at most."""
    if isinstance(spec, ChildSpec):
        return spec.shutdown
    each = [longest_stop(child) for child in spec.children] or [0.0]
    return sum(each) if spec.ordered else max(each)


@dataclass(eq=False)
class _Node:
    """What a child and a supervisor have alike. `leaving`: it is to go down, and `removed` for good."""

    parent: _Group | None
    leaving: bool = False
    removed: bool = False
    restarts: int = 0
    fails: int = 0
    due: float = 0.0
    why: str = ""


@dataclass(eq=False)
class _Child(_Node):
    spec: ChildSpec = ChildSpec("")
    state: State = "down"
    kill_at: float | None = None
    shutdown: float | None = None
    up_at: float | None = None
    proven: bool = False
    ever: bool = False
    taken_down: bool = False
    failed: bool = False
    """It has ended since its turn to start came: those behind it need not wait for it."""

    @property
    def alive(self) -> bool:
        return self.state in ("starting", "serving", "stopping")


@dataclass(eq=False)
class _Group(_Node):
    spec: SupervisorSpec = SupervisorSpec("")
    children: list[_Child | _Group] = field(default_factory=list)
    history: deque[float] = field(default_factory=deque)
    cycling: bool = False
    """Those that are leaving are started again when all of them are down."""
    failed: bool = False
    """It goes down because its intensity was exceeded: when it is, its parent deals with it."""
    own: bool = True
    """That it failed was the fault of its children, and not somebody else's hand."""
    given_up: bool = False

    @property
    def alive(self) -> bool:
        return any(child.alive for child in self.children)

    def below(self) -> Iterator[_Child]:
        for child in self.children:
            yield from child.below() if isinstance(child, _Group) else (child,)


class Tree:
    """The state of a supervisor and of all supervisors in it. Each method returns what is to be done, in order."""

    def __init__(self, spec: SupervisorSpec, restarts: dict[str, int] | None = None) -> None:
        self._children: dict[str, _Child] = {}
        self._groups: dict[str, _Group] = {}
        self._known = dict(restarts or {})
        self._hurry = self._begun = False
        self._actions: list[Action] = []
        made = self._made(spec, None)
        assert isinstance(made, _Group)
        self._root = made

    # -- what happens

    def begin(self, now: float) -> list[Action]:
        self._begun = True
        return self._settled(now)

    def ready(self, name: str, now: float) -> list[Action]:
        """The child has come up."""
        child = self._children.get(name)
        if child and child.state == "starting":
            child.state, child.up_at = "serving", now
        return self._settled(now)

    def served(self, name: str) -> None:
        """The child has done what it is for: what went wrong before does not count any more."""
        child = self._children.get(name)
        if child and child.state == "serving":
            self._trust(child)

    def died(self, name: str, ending: Ending, now: float, *, why: str = "", jitter: float = 0.5) -> list[Action]:
        """The child has ended, or could not be started."""
        child = self._children[name]
        was_up, proven = child.up_at is not None, child.proven
        child.kill_at, child.up_at, child.proven = None, None, False
        child.failed = True
        child.why = why or child.why
        if child.leaving:
            child.state = "down"
            child.taken_down = True
        elif ending == "refused":
            self._give_up(child, why)
        elif ending == "recycle":
            child.state, child.due = "down", now
            child.restarts += 1
        elif child.spec.restart == "temporary" or (child.spec.restart == "transient" and ending == "normal"):
            child.state = "stopped"
        else:
            own = ending == "crash" or (ending == "normal" and not was_up)
            child.fails = (0 if proven else child.fails) + own
            assert child.parent
            child.state = "down"
            child.restarts += 1
            child.due = now
            self._restart(child.parent, child, now, own, jitter)
        return self._settled(now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed."""
        for child in self._children.values():
            if child.up_at is not None and not child.proven and now - child.up_at >= STABLE:
                self._trust(child)
            if child.kill_at is not None and child.kill_at <= now and child.alive:
                self._actions.append(Kill(child.spec.name))
                child.kill_at = now + HURRY
        return self._settled(now)

    def stop(self, now: float, *, hurry: bool = False) -> list[Action]:
        """Stop all of them, in reverse order; in a hurry with little grace."""
        self._hurry = self._hurry or hurry
        self._leave(self._root)
        for child in self._children.values():
            if child.shutdown is not None:
                child.shutdown = None
                if child.state == "stopping":  # once more, with its own time
                    self._stop(child, now)
        if self._hurry:
            for child in self._children.values():
                if child.kill_at is not None:
                    child.kill_at = min(child.kill_at, now + HURRY)
        return self._settled(now)

    # -- children that come and go

    def add(self, under: str, spec: ChildSpec | SupervisorSpec, now: float, after: str | None = None) -> list[Action]:
        """One more child, behind the others or behind the one called `after`. Raises KeyError, ValueError."""
        group = self._groups[under]
        place = len(group.children)
        if after is not None:
            place = 1 + next(i for i, child in enumerate(group.children) if child.spec.name == after)
        group.children.insert(place, self._made(spec, group))
        return self._settled(now)

    def remove(self, name: str, now: float, shutdown: float | None = None) -> list[Action]:
        """Stop a child, or a supervisor with all of its own, and forget it. A child gets `shutdown` seconds in place of
        its own, as long as nobody stops the whole tree. Raises KeyError."""
        node = self._children.get(name) or self._groups[name]
        node.removed = True
        if isinstance(node, _Child):
            node.shutdown = shutdown
        self._leave(node)
        return self._settled(now)

    # -- how things stand

    def state(self, name: str) -> tuple[State | Literal["waiting", "restarting"], int, str]:
        """A child's state, how often it was started again, and why it is not up."""
        child = self._children[name]
        shown: State | Literal["waiting", "restarting"] = child.state
        if child.state == "down":
            above = [child, *_upwards(child.parent)]
            if any(isinstance(node, _Group) and node.given_up for node in above):
                shown = "gave up"
            elif any(isinstance(node, _Group) and node.cycling for node in above):
                shown = "restarting"
            elif any(node.leaving for node in above):
                shown = "stopped"
            else:
                shown = "restarting" if child.ever else "waiting"
        return shown, child.restarts, "" if child.state in ("serving", "starting") else child.why

    def is_leaving(self, name: str) -> bool:
        """Whether a child is to go down, so that its end is no surprise."""
        return self._children[name].leaving

    def path(self, name: str) -> list[str]:
        """The supervisors above a child or a supervisor, the highest first."""
        node = self._children.get(name) or self._groups[name]
        return [group.spec.name for group in _upwards(node.parent)][::-1]

    def spec_of(self, name: str) -> ChildSpec | SupervisorSpec:
        return (self._children.get(name) or self._groups[name]).spec

    def names(self) -> list[str]:
        """The children in their order."""
        return [child.spec.name for child in self._root.below()]

    def supervisors(self) -> list[str]:
        return list(self._groups)

    def over(self) -> bool:
        """Whether all of it is down and will stay so."""
        return self._root.leaving and not self._root.cycling and not self._root.alive

    def next_due(self) -> float | None:
        """When `tick` has something to do, unless something happens before."""
        times = [child.kill_at for child in self._children.values() if child.kill_at is not None]
        for child in self._children.values():
            due = max([child.due, *(group.due for group in _upwards(child.parent))])
            if child.state == "down" and not child.leaving and due:
                times.append(due)
        return min(times, default=None)

    # -- inside: the rules

    def _restart(self, group: _Group, node: _Child | _Group, now: float, own: bool, jitter: float) -> None:
        """A child is down and should not be: start it again, with others or not, or see that it was too often."""
        if group.leaving or group.cycling:  # it goes down, or all of it comes again anyway
            node.leaving = True
            return
        spec = group.spec
        if own and spec.beyond == "retry" and spec.give_up and node.fails >= spec.give_up:
            because = f"{node.fails} times in a row it ended before it had served anything; the last: {node.why}"
            self._give_up(node if spec.strategy == "one_for_one" else group, because)
            return
        group.history.append(now)
        while group.history[0] < now - spec.intensity.seconds:
            group.history.popleft()
        if len(group.history) > spec.intensity.count:
            self._exceeded(group, node, now, own, jitter)
        else:
            self._cycle(group, node)

    def _cycle(self, group: _Group, node: _Child | _Group) -> None:
        """Take down who goes down with `node`, so that all of them start again in their order."""
        if group.spec.strategy == "one_for_one":
            node.leaving = False
            return
        first = group.children.index(node) if group.spec.strategy == "rest_for_one" else 0
        for child in group.children[first:]:
            self._leave(child)
        group.cycling = True

    def _exceeded(self, group: _Group, node: _Child | _Group, now: float, own: bool, jitter: float) -> None:
        """More restarts than allowed: end with all children and leave it to the parent, or retry later."""
        spec = group.spec
        because = f"{len(group.history)} restarts within {spec.intensity.seconds:g} s, more than {spec.intensity.count}"
        because += f"; the last because of {node.why}" if node.why else ""
        group.history.clear()
        if spec.beyond == "escalate":
            self._actions.append(Escalated(spec.name, because, None))
            group.why, group.failed, group.own = node.why or because, True, own
            self._leave(group)
            if group.parent is None:
                group.given_up = True
                self._actions.append(GaveUp(spec.name, because))
            return
        delay = delay_of(node.fails if own else 0, jitter)
        self._actions.append(Escalated(spec.name, because, delay))
        (node if spec.strategy == "one_for_one" else group).due = now + delay
        self._cycle(group, node)

    def _give_up(self, node: _Child | _Group, why: str) -> None:
        node.why = why
        if isinstance(node, _Group):
            node.given_up = True
            for child in node.below():
                child.why = why
            self._leave(node)
        else:
            node.state = "gave up"
        self._actions.append(GaveUp(node.spec.name, why))

    def _trust(self, child: _Child) -> None:
        child.proven, child.fails = True, 0
        for group in _upwards(child.parent):
            group.fails = 0

    def _leave(self, node: _Child | _Group) -> None:
        node.leaving = True
        if isinstance(node, _Group):
            node.cycling = False
            for child in node.children:
                self._leave(child)

    # -- inside: from what should be to what is done

    def _settled(self, now: float) -> list[Action]:
        if self._begun:
            while self._take_down(self._root, now):  # a supervisor that is down may be the reason for more
                pass
            self._bring_up(self._root, now)
        done, self._actions = self._actions, []
        return done

    def _take_down(self, group: _Group, now: float) -> bool:
        """Stop who is leaving, in reverse order; True when that has changed what should be."""
        for child in reversed(list(group.children)):
            if isinstance(child, _Group):
                if self._take_down(child, now):
                    return True
            elif child.leaving and child.state in ("starting", "serving"):
                self._stop(child, now)
            if child.leaving and child.alive and group.spec.ordered:
                break
        for child in [child for child in group.children if child.removed and not child.alive]:
            group.children.remove(child)
            self._forget(child)
        if group.cycling and not any(child.leaving and child.alive for child in group.children):
            group.cycling = False
            for child in list(group.children):
                self._come_back(child)
        if group.failed and not group.alive:
            group.failed = False
            return self._ended(group, now)
        return False

    def _stop(self, child: _Child, now: float) -> None:
        child.state = "stopping"
        shutdown = child.spec.shutdown if child.shutdown is None else child.shutdown
        child.kill_at = now + (min(HURRY, shutdown) if self._hurry else shutdown)
        self._actions.append(Stop(child.spec.name))

    def _ended(self, group: _Group, now: float) -> bool:
        """A supervisor went down by itself. OTP's reason is `shutdown`, which restarts permanent ones only."""
        parent = group.parent
        if parent is None:
            return False
        if group.spec.restart == "permanent":
            group.restarts += 1
            group.fails += group.own
            self._restart(parent, group, now, group.own, jitter=0.5)
            if not (group.given_up or parent.leaving or parent.cycling):
                group.leaving = True
                self._come_back(group)
        return True

    def _come_back(self, node: _Child | _Group) -> None:
        """It was leaving to be started again."""
        if not node.leaving or node.removed:
            return
        if isinstance(node, _Group):
            if node.given_up:
                return
            node.leaving = False
            node.history.clear()
            for below in node.children:
                self._come_back(below)
        elif node.spec.restart == "temporary":
            node.state, node.leaving = "stopped", False
        elif node.state != "gave up":
            node.restarts += node.taken_down
            node.state, node.leaving, node.failed, node.taken_down = "down", False, False, False

    def _bring_up(self, group: _Group, now: float) -> bool:
        """Start who should be up, in order; True when all of them are up, or past waiting for."""
        waits_for_nobody = group.parent is not None and group.parent.spec.beyond == "retry"
        if group.leaving:
            return waits_for_nobody or not (group.alive or group.failed)
        if group.cycling or group.due > now:
            return waits_for_nobody
        whole = True
        for child in group.children:
            if isinstance(child, _Group):
                settled = self._bring_up(child, now)
            else:
                if child.state == "down" and not child.leaving and child.due <= now:
                    child.state, child.ever = "starting", True
                    self._actions.append(Start(child.spec.name, child.restarts))
                settled = child.state in ("serving", "stopped", "gave up") or child.leaving
                settled = settled or (group.spec.beyond == "retry" and child.failed)
            whole = whole and settled
            if group.spec.ordered and not settled:
                break
        return whole

    def _made(self, spec: ChildSpec | SupervisorSpec, parent: _Group | None) -> _Child | _Group:
        if spec.name in self._children or spec.name in self._groups:
            raise ValueError(f"two children are called {spec.name}")
        if isinstance(spec, ChildSpec):
            child = _Child(parent, spec=spec, restarts=self._known.get(spec.name, 0))
            self._children[spec.name] = child
            return child
        group = _Group(parent, spec=spec)
        self._groups[spec.name] = group
        group.children = [self._made(child, group) for child in spec.children]
        return group

    def _forget(self, node: _Child | _Group) -> None:
        if isinstance(node, _Group):
            for child in node.children:
                self._forget(child)
            del self._groups[node.spec.name]
        else:
            del self._children[node.spec.name]


def _upwards(group: _Group | None) -> Iterator[_Group]:
    while group is not None:
        yield group
        group = group.parent
