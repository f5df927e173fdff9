"""One reload of code: what it is to change, how far it is, and when the author's files ask for one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspex.agents.registrar import difference
from dspex.compose.loader import Loader, can_reload
from dspex.compose.plans import About, Plan
from dspex.core.errors import Conflict, InvalidInput, TaskError

__all__ = ["Change", "Reload", "Watcher", "compared"]

LOOK = 0.5
"""Seconds between two looks at the author's files; what has changed must have stayed the same for one of them."""


@dataclass
class Reload:
    """A reload that somebody asked for: of these `programs`, or of all. `waiting` are those who want to know."""

    id: str = ""
    programs: list[str] = field(default_factory=list)
    by: str = ""
    replace: bool = False
    loading: bool = True
    over: bool = False
    error: TaskError | None = None
    generation: int = 0
    begun: float = 0.0
    was: str = ""
    wanted: list[tuple[str, str]] = field(default_factory=list)
    todo: deque[str] = field(default_factory=deque)
    done: list[dict[str, Any]] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    _plans: list[Plan] = field(default_factory=list)
    _loader: Loader | None = None

    def begin(self, generation: int, loader: Loader) -> None:
        self.generation, self._loader, self.begun = generation, loader, time.monotonic()

    @property
    def loader(self) -> Loader:
        assert self._loader, "it has begun"
        return self._loader

    def apps(self, plans: Sequence[Plan]) -> None:
        """What has to be loaded. Raises InvalidInput when that cannot be done."""
        for plan in plans:
            if plan.program:
                what = f"{plan.program.name} was given as a class, not as a file, so there is nothing to load again"
                raise InvalidInput(what)
            one = (plan.app, self.programs[0] if self.programs else plan.name)
            if one not in self.wanted:
                self.wanted.append(one)
        if not can_reload():
            raise InvalidInput("code is reloaded on Linux only; elsewhere stop `dspex up` and start it again")
        self._plans = list(plans)

    def plan_of(self, fresh: str) -> Plan:
        """The plan that a program belongs to which the old code did not have."""
        return next((plan for plan in self._plans if plan.name in ("", fresh)), self._plans[0])

    def answer(self) -> dict[str, Any]:
        """What became of it. Raises what it ended with."""
        if self.error:
            raise self.error
        return {"id": self.id, "programs": self.done}


@dataclass(frozen=True)
class Change:
    """Programs that are to be rolled over, that are new, and that the new code has no more."""

    changed: list[str]
    fresh: list[str]
    gone: list[str]


def compared(
    old: Mapping[str, About], new: Mapping[str, About], programs: Sequence[str], *, replace: bool, may_grow: bool = True
) -> Change:
    """What new code changes. Raises Conflict for another schema or a program that is gone, unless these are to
    `replace` what is there, and for one more program where there `may_grow` none."""
    wanted = programs or list(old)
    gone = [name for name in wanted if name not in new]
    fresh = [] if programs else [name for name in new if name not in old]
    changed = [name for name in wanted if name in new]
    if fresh and not may_grow:
        more = f"the new code has one more program, {fresh[0]}, which has no identity under the access rules"
        raise Conflict(f"{more}: start `dspex up` again")
    if replace:
        return Change(changed, fresh, gone)
    if gone:
        missing = f"the new code has no program {gone[0]}, whose tasks would wait for ever"
        raise Conflict(f"{missing}: reload with --replace if that is meant")
    for name in changed:
        if old[name].fingerprint != new[name].fingerprint:
            other = f"{name} has other schemas in the new code ({difference(old[name], new[name])})"
            raise Conflict(f"{other}; choose another name, or reload with --replace to let the new ones take over")
    return Change(changed, fresh, gone)


class Watcher:
    """Watches files for changes."""

    def __init__(self) -> None:
        self._looked = 0.0
        self._known: dict[str, tuple[int, int]] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self._folders = False

    def changed(self, now: float, files: Sequence[str]) -> bool:
        """Whether one of them is another one than when this was said last, and is at rest."""
        if now - self._looked < LOOK:
            return False
        self._looked = now
        folders = {str(Path(file).parent) for file in files} if self._folders else set()
        seen, self._seen = self._seen, {file: _state(file) for file in (*files, *sorted(folders))}
        for file, state in self._seen.items():
            self._known.setdefault(file, state)
        if all(self._known[file] == state for file, state in self._seen.items()) or seen != self._seen:
            return False
        self._known = dict(self._seen)
        self._folders = False
        return True

    def failed(self) -> None:
        """What was there could not be loaded: a file that is missing may come, so the folders count, too."""
        self._folders = True


def _state(file: str) -> tuple[int, int]:
    try:
        found = Path(file).stat()
    except OSError:
        return 0, 0
    return found.st_mtime_ns, found.st_size
