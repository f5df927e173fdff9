"""The values that tasks of one program may run on: those in force, the default, and every proposal in the log.

The truth is the aggregate `variables.<program>.0`. What is kept here is only where each proposal stands, so it may be
as large as it likes.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from dspex.agents.journal import events_for
from dspex.core.codec import decode_commit
from dspex.core.errors import InvalidAssignment, InvalidInput, LimitExceeded, LogError, NotFound, ProgramFailed
from dspex.core.events import AssignmentProposed, Head
from dspex.core.ports import Appended, Entry, Log
from dspex.core.program import Program
from dspex.core.space import Assignment
from dspex.core.subjects import Subjects, aggregate

__all__ = ["MAX_INSTANCES", "MAX_PROPOSALS", "Assignments", "Instances", "Proposal", "decode_proposal"]

logger = logging.getLogger("dspex.agents")

MAX_PROPOSALS = 10_000
"""Proposals that one program may have."""
MAX_INSTANCES = 16
"""Instances on other values than those in force that one agent keeps ready; the least recently used one goes."""
MAX_WORDS = 1000
"""Characters of who proposes, and why."""
TRIES = 20


class Proposal(NamedTuple):
    """A proposal as the log has it. `version` is 0 for the default values, which every agent knows anyway."""

    assignment: Assignment
    version: int
    fresh: bool


class Assignments:
    """What one program's values may be, found by their hash. `program` is the instance on the values in force."""

    def __init__(self, program: Program, log: Log, subjects: Subjects, source: str) -> None:
        self._program, self._log, self._subjects, self._source = program, log, subjects, source
        self._aggregate = aggregate("variables", program.name, 0)
        self._space = program.space()
        self._known = {it.hash: it for it in (self._space.default(), program.assignment)}
        self._places: dict[str, tuple[int, int]] = {}
        self._head = Head()
        self._one = asyncio.Lock()

    async def find(self, hash: str) -> Assignment:
        """The values with this hash. Raises NotFound, InvalidInput for values that today's code does not admit."""
        if hash in self._known:
            return self._known[hash]
        if hash not in self._places:
            async with self._one:
                await self._catch_up()
        place = self._places.get(hash)
        entry = await self._log.entry(place[1]) if place else None
        if entry is None:
            name = self._program.name
            raise NotFound(f"{name} knows no assignment {hash[:40]!r}; see `dspex vars {name}`")
        for event in decode_commit(entry.body, entry.position):
            if isinstance(event.data, AssignmentProposed) and event.data.assignment == hash:
                return self._admitted(hash, event.data.values)
        raise LogError(f"position {entry.position} does not hold the assignment {hash} any more")

    def _admitted(self, hash: str, values: Mapping[str, Any]) -> Assignment:
        try:
            found = self._space.assign({}, base=Assignment.from_json(values))
        except InvalidAssignment as error:
            raise InvalidInput(f"the assignment {hash[:8]} does not fit the code that runs now: {error}") from None
        if found.hash != hash:
            raise InvalidInput(f"the assignment {hash[:8]} is from other variables than the code that runs now has")
        return found

    async def propose(
        self, values: Mapping[str, Any], *, base: str | None = None, who: str = "", why: str = ""
    ) -> Proposal:
        """Make values known: `values` on top of those with the hash `base`, or of those in force. Proposing the same
        twice is the same. A base that nobody knows is replaced by the values in force when some values are given.

        Raises InvalidAssignment, NotFound, LimitExceeded, LogError.
        """
        try:
            start = self._program.assignment if base is None else await self.find(base)
        except (NotFound, InvalidInput):
            if not values:
                raise
            start = self._program.assignment
        return await self.record(self._space.assign(values, base=start), who=who, why=why)

    async def record(self, wanted: Assignment, *, who: str = "", why: str = "") -> Proposal:
        """Have an assignment in the log, unless it is there, or is the default. Raises LimitExceeded, LogError."""
        if wanted.hash == self._space.default().hash:
            return Proposal(wanted, 0, False)
        event = AssignmentProposed(
            assignment=wanted.hash, values=wanted.to_json(), who=who[:MAX_WORDS], why=why[:MAX_WORDS]
        )
        async with self._one:
            for _ in range(TRIES):
                await self._catch_up()
                if wanted.hash in self._places:
                    return Proposal(wanted, self._places[wanted.hash][0], False)
                if len(self._places) >= MAX_PROPOSALS:
                    raise LimitExceeded(f"{self._program.name} has {MAX_PROPOSALS:,} proposals; it may not have more")
                events = events_for(self._aggregate, self._head, [event], source=self._source)
                result = await self._log.append(self._aggregate, events, self._head)
                if isinstance(result, Appended):
                    self._head = result.head
                    self._places[wanted.hash] = (result.head.version, result.head.position)
                    return Proposal(wanted, result.head.version, True)
        raise LogError(f"{self._aggregate} changed {TRIES} times while a proposal was being added to it; try again")

    async def _catch_up(self) -> None:
        """Read what was proposed since we looked."""
        last = await self._log.last(self._aggregate)
        if last is None:
            return
        if decode_commit(last.body, last.position)[0].version == self._head.version + 1:
            self._take(last)  # the usual case needs no scan
        while self._head.position < last.position:
            page = await self._log.scan(self._head.position, 1000, self._subjects.event(self._aggregate))
            for entry in page or [last]:
                self._take(entry)

    def _take(self, entry: Entry) -> None:
        for event in decode_commit(entry.body, entry.position):
            self._head = Head(event.version, entry.position)
            if isinstance(event.data, AssignmentProposed):
                self._places.setdefault(event.data.assignment, (event.version, entry.position))


class Instances:
    """Instances of a program by the hash of their values, made and set up when the first task asks for them."""

    def __init__(self, program: Program, assignments: Assignments) -> None:
        self._program, self._assignments = program, assignments
        self._ready: OrderedDict[str, asyncio.Task[Program]] = OrderedDict()
        self._one = asyncio.Lock()

    async def get(self, hash: str) -> Program:
        """The program on these values, set up. Raises NotFound, InvalidInput, ProgramFailed when `setup` raised."""
        if hash == self._program.assignment.hash:
            return self._program
        making = self._ready.get(hash)
        if making is None:
            making = self._ready[hash] = asyncio.create_task(self._make(hash), name="dspex-setup")
            making.add_done_callback(lambda done: self._made(hash, done))
        self._ready.move_to_end(hash)
        # One task that gives up must not take the instance from the others that wait for it.
        return await asyncio.shield(making)

    async def _make(self, hash: str) -> Program:
        instance = self._program.with_assignment(await self._assignments.find(hash))
        try:
            async with self._one:
                await asyncio.to_thread(instance.prepare)
        except Exception as error:
            logger.warning("%s could not be set up on values %s", self._program.name, hash[:8], exc_info=error)
            raise ProgramFailed(
                f"{type(self._program).__name__}.setup raised {type(error).__name__} on values {hash[:8]}"
            ) from error
        return instance

    def _made(self, hash: str, making: asyncio.Task[Program]) -> None:
        if making.cancelled() or making.exception() is not None:
            self._ready.pop(hash, None)
        ready = [name for name, task in self._ready.items() if task.done()]
        for name in ready[: max(0, len(ready) - MAX_INSTANCES)]:
            del self._ready[name]


def decode_proposal(body: bytes) -> tuple[dict[str, Any], str | None, str]:
    """Values, base and words of a proposal's body. Raises InvalidInput."""
    try:
        said = msgspec.json.decode(body, type=_Proposed)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        form = '{"values": {path: value}, "base": hash, "why": words}'
        raise InvalidInput(f"a proposal is {form}: {error}") from None
    return said.values, said.base, said.why


class _Proposed(msgspec.Struct, forbid_unknown_fields=True):
    values: dict[str, bool | int | float | str | None]
    base: str | None = None
    why: str = ""
