"""Sharing room that has a bound, so that whoever wants all of it leaves some for the others.

An owner may take more while it has less than is free: alone it gets a half, two that want everything get a third each,
and there is always something left for one who comes late (dynamic thresholds with alpha = 1; Choudhury and Hahne,
"Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

__all__ = ["Room", "Turns"]

Item = TypeVar("Item")


class Room:
    """Room for so many `things` and so many `bytes` of theirs, shared by owners."""

    def __init__(self, things: int, bytes: int) -> None:
        self._free, self._free_bytes = things, bytes
        self._things, self._bytes = things, bytes
        self._held: dict[Hashable, tuple[str, int]] = {}
        self._of: dict[str, tuple[int, int]] = {}

    def takes(self, owner: str, size: int = 0) -> bool:
        """Whether an owner may have room for one more, of `size` bytes."""
        things, bytes = self._of.get(owner, (0, 0))
        return things < self._free and (bytes + size <= self._free_bytes or not things)

    def take(self, thing: Hashable, owner: str, size: int) -> None:
        """Something has its room; more than there is when somebody insists."""
        self.leave(thing)
        self._held[thing] = owner, size
        self._count(owner, 1, size)

    def leave(self, thing: Hashable) -> bool:
        """Something needs no room any more; whether it had some."""
        held = self._held.pop(thing, None)
        if held:
            self._count(held[0], -1, -held[1])
        return held is not None

    def clear(self) -> None:
        """Nothing has room."""
        self._held.clear()
        self._of.clear()
        self._free, self._free_bytes = self._things, self._bytes

    def _count(self, owner: str, things: int, size: int) -> None:
        before = self._of.get(owner, (0, 0))
        now = before[0] + things, before[1] + size
        if now[0]:
            self._of[owner] = now
        else:
            self._of.pop(owner, None)
        self._free -= things
        self._free_bytes -= size


class Turns(Generic[Item]):
    """What waits, in a line for each owner; the owners take turns."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[Item]] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def of(self, owner: str) -> int:
        """How many of an owner wait."""
        return len(self._lines.get(owner, ()))

    def add(self, owner: str, item: Item) -> None:
        self._lines.setdefault(owner, deque()).append(item)
        self._size += 1

    def put_back(self, owner: str, item: Item) -> None:
        """What was taken and could not be used waits first in its line."""
        self._lines.setdefault(owner, deque()).appendleft(item)
        self._size += 1

    def take(self, may: Callable[[str], bool]) -> tuple[str, Item] | None:
        """The next item of the next owner that `may`; None when there is none."""
        for owner in list(self._lines):
            if not may(owner):
                continue
            line = self._lines.pop(owner)
            item = line.popleft()
            self._size -= 1
            if line:
                self._lines[owner] = line  # behind the others
            return owner, item
        return None

    def any(self, may: Callable[[str], bool]) -> bool:
        """Whether `take` would give something."""
        return any(may(owner) for owner in self._lines)

    def clear(self) -> None:
        self._lines.clear()
        self._size = 0
