"""How an aggregate is rebuilt: a fold over its events, with a name and a version, so that a state which was kept is
known to be of the very fold that would make it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from msgspec import Struct

from dspex.core.events import Event, Head

__all__ = ["Fold", "Folded"]

S = TypeVar("S")


@dataclass(frozen=True)
class Fold(Generic[S]):
    """The state of an aggregate of one kind after some of its events. Pure: the same events give the same state.

    `version` is raised by whoever changes what `initial` and `evolve` give; states kept by another version are then
    made anew. `dump` and `load` are a state as bytes and back.
    """

    kind: str
    version: int
    initial: S
    evolve: Callable[[S, Event], S]
    load: Callable[[bytes], S]
    dump: Callable[[S], bytes] = msgspec.json.encode

    def __call__(self, events: Iterable[Event], state: S | None = None) -> S:
        """The state after `events`, which follow those that `state` is of."""
        evolve = self.evolve
        state = self.initial if state is None else state
        for event in events:
            state = evolve(state, event)
        return state


class Folded(Struct, frozen=True, kw_only=True):
    """A state, and which one: of what aggregate, after which version and position, and the time of the last event
    (RFC 3339)."""

    aggregate: str
    state: Any
    head: Head = Head()
    time: str = ""
