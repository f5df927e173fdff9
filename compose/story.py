"""A task's past, wherever its log is: on the bus, or in a SQLite file on a machine that has no server.

A `Source` gives events as `dspex.log.read` does; a `Story` is all that one says about one task.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from dspex.agents.vault import Vault
from dspex.compose.caller import Caller
from dspex.compose.unsealing import brought_back, close_vault, vault_of_bus, vault_of_file, with_submission
from dspex.core.codec import decode_commit, encode_event, events_of
from dspex.core.errors import InvalidAssignment, InvalidInput, LogCorrupt, NotFound, TaskError
from dspex.core.events import EffectRecorded, Event, TaskSubmitted
from dspex.core.ports import Entry
from dspex.core.program import Program
from dspex.core.space import Assignment
from dspex.core.subjects import STORED_DOORS, Subjects, aggregate, parse_aggregate
from dspex.core.task import TaskState, fold

__all__ = ["BusSource", "FileSource", "Source", "Story", "instance_of", "shown", "stories", "story_of", "to_event"]


class Source(Protocol):
    """Where events come from."""

    def events(self, **query: Any) -> AsyncIterator[dict[str, Any]]:
        """CloudEvents with their positions, in order: of a `task`, an `aggregate`, a `program` or all, those behind
        `after`. Raises NotFound for a task that the log does not have."""

    def pages(self, **query: Any) -> AsyncIterator[list[Event]]:
        """The same events decoded, some at a time."""

    async def head(self) -> int:
        """The position of the newest entry."""

    async def values(self, program: str) -> dict[str, dict[str, Any]]:
        """The values that are known, by the hash of their assignment."""

    async def vault(self, program: str) -> Vault:
        """Where what is sealed or large of a program is brought back from."""

    async def close(self) -> None:
        """Give back what it holds open."""


class BusSource:
    """The log of a running system."""

    def __init__(self, caller: Caller, master: str = "") -> None:
        self.caller, self._master = caller, master

    async def vault(self, program: str) -> Vault:
        return vault_of_bus(*await self.caller.keeper(), program, self._master)

    def events(self, **query: Any) -> AsyncIterator[dict[str, Any]]:
        return self.caller.events(**query)

    def pages(self, **query: Any) -> AsyncIterator[list[Event]]:
        return self.caller.pages(**query)

    async def head(self) -> int:
        return int((await self.caller.read_log(limit=1))["head"])

    async def values(self, program: str) -> dict[str, dict[str, Any]]:
        found = await _proposed(self, program)
        with contextlib.suppress(TaskError):  # no agent serves it now: then what is in the log has to do
            now = await self.caller.variables(program)
            paths = now["space"]["variables"]
            found[now["assignment"]] = {path: value for path, value in now["values"].items() if path in paths}
        return found

    async def close(self) -> None:
        await self.caller.close()


class _Readable(Protocol):
    """What is asked of a file: the reading half of the `Log` port."""

    @property
    def epoch(self) -> str: ...
    async def read(self, aggregate: str) -> list[Entry]: ...
    async def entry(self, position: int) -> Entry | None: ...
    async def scan(self, after: int, limit: int = 1000, subject: str | None = None) -> list[Entry]: ...
    async def holding(self, subject: str, text: str) -> list[Entry]: ...
    async def head(self) -> int: ...
    async def close(self) -> None: ...


class FileSource:
    """A log, an export or an archive in a SQLite file, read without a server."""

    def __init__(self, log: _Readable, prefix: str = "dspex", vault: Vault | None = None) -> None:
        self.log, self.subjects = log, Subjects(prefix, tenants=True)
        self._vault = vault or vault_of_file(None)

    async def vault(self, program: str) -> Vault:
        return self._vault

    @classmethod
    async def open(cls, path: Path | str, prefix: str = "dspex", master: str = "") -> FileSource:
        """Open a file for reading only; `master` refers to the master key. Raises LogError when it is none of ours."""
        from dspex.store import Archive, SqliteLog
        from dspex.store.archive import is_archive

        vault, subjects = vault_of_file(Path(path), master), Subjects(prefix, tenants=True)
        if is_archive(Path(path)):
            return cls(await Archive.open(path, subjects=subjects, readonly=True), prefix, vault)
        return cls(await SqliteLog.open(path, subjects=subjects, readonly=True), prefix, vault)

    async def events(self, **query: Any) -> AsyncIterator[dict[str, Any]]:
        async for page in self.pages(**query):
            for event in page:
                yield shown(event)

    async def pages(self, **query: Any) -> AsyncIterator[list[Event]]:
        after = int(query.get("after", 0))
        if "task" in query:
            story = await self._of_task(str(query["task"]))
            yield [event for entry in story if entry.position > after for event in self._read(entry)]
            return
        if "aggregate" in query:
            commits = await self._of_aggregate(str(query["aggregate"]))
            yield [event for entry in commits if entry.position > after for event in self._read(entry)]
            return
        while page := await self.log.scan(after):
            events = [event for entry in page for event in self._read(entry)]
            if "program" in query:
                middle = f".{query['program']}."
                events = [event for event in events if middle in event.aggregate]
            yield events
            after = page[-1].position

    async def head(self) -> int:
        return await self.log.head()

    async def values(self, program: str) -> dict[str, dict[str, Any]]:
        return await _proposed(self, program)

    async def close(self) -> None:
        await self.log.close()
        await close_vault(self._vault)

    async def _of_task(self, task: str) -> list[Entry]:
        found = await self.log.entry(int(task)) if task.isdecimal() and len(task) < 19 else None
        door = self.subjects.door_of(found.subject) if found else None
        if found is None or door is None or door[0] != "task":
            raise NotFound(f"the log has no task {task[:40]}")
        about = [await self.log.read(aggregate(kind, door[1], task)) for kind in ("task", "privacy", "dlq")]
        story = [found, *(entry for entries in about for entry in entries)]
        for kind in ("outcome", "signal"):
            for subject in self.subjects.filters(kind, door[1]):
                holding = await self.log.holding(subject, task)
                story += [entry for entry in holding if _names(entry.body, task)]
        return sorted(story, key=lambda entry: entry.position)

    async def _of_aggregate(self, name: str) -> list[Entry]:
        try:
            kind, _, id = parse_aggregate(name)
        except ValueError as error:
            raise InvalidInput(str(error)) from None
        sent = await self.log.entry(int(id)) if kind in STORED_DOORS and id.isdecimal() and len(id) < 19 else None
        door = sent and self.subjects.door_of(sent.subject)
        own = [sent] if sent and door and f"{door[0]}.{door[1]}.{id}" == name else []
        return [*own, *await self.log.read(name)]

    def _read(self, entry: Entry) -> list[Event]:
        try:
            return events_of(entry, self.subjects)
        except LogCorrupt:
            return []


def shown(event: Event) -> dict[str, Any]:
    """An event as JSON has it, with its position."""
    return {"position": event.position, **msgspec.json.decode(encode_event(event))}


async def _proposed(source: Source, program: str) -> dict[str, dict[str, Any]]:
    """The values of every proposal."""
    found = {}
    with contextlib.suppress(TaskError):
        async for event in source.events(aggregate=f"variables.{program}.0"):
            if event["type"] == "AssignmentProposed":
                found[event["data"]["assignment"]] = event["data"]["values"]
    return found


def _names(body: bytes, task: str) -> bool:
    try:
        named = msgspec.json.decode(body).get("task")
    except (msgspec.DecodeError, UnicodeDecodeError, AttributeError):
        return False
    return str(named) == task


@dataclass(frozen=True)
class Story:
    """What the log has of one task: its own events, all that are about it, where its program was, and values by the
    hash of their assignment. `missing` says why what it holds cannot be brought back; "" when it is all there."""

    task: str
    program: str
    every: list[Event]
    events: list[Event]
    app: str
    known: dict[str, dict[str, Any]]
    missing: str = ""

    @property
    def shown(self) -> list[dict[str, Any]]:
        """All that are about it as JSON, each with its position."""
        return [shown(event) for event in self.every]

    @property
    def state(self) -> TaskState:
        """Where the task stands after the last event."""
        return fold(self.events)

    @property
    def versions(self) -> int:
        """The version of the last event; there is one state for each, and 0 is the submission."""
        return self.events[-1].version

    def at(self, version: int) -> list[Event]:
        """The events up to a version. Raises InvalidInput for one that the task does not have."""
        if not 0 <= version <= self.versions:
            raise InvalidInput(f"task {self.task} has versions 0 to {self.versions}, there is no {version}")
        return [event for event in self.events if event.version <= version]

    def before(self, time: str) -> list[Event]:
        """The events up to a time, RFC 3339 in UTC. Raises InvalidInput when the task came later."""
        found = [event for event in self.events if event.time <= time]
        if not found:
            raise InvalidInput(f"task {self.task} came in at {self.events[0].time}, which is later than {time}")
        return found

    @property
    def recorded_seconds(self) -> float:
        """How long the recorded effects took; for a task without any, how long the program ran."""
        records = (event.data for event in self.events if isinstance(event.data, EffectRecorded))
        return max(sum(record.seconds for record in records if record.name != "sleep"), self.state.seconds)


def to_event(shown: dict[str, Any]) -> Event:
    """An event from the CloudEvent that the log's door gave."""
    return decode_commit(msgspec.json.encode([shown]), shown["position"])[0]


async def story_of(source: Source, task: str) -> Story:
    """One task from a log. Raises NotFound, InvalidInput."""
    if not (task.isascii() and task.isdecimal()):
        raise InvalidInput(f"{task[:40]!r} is no task's id, which is a number; `dspex tasks` lists them")
    every = [event async for page in source.pages(task=task) for event in page]
    submitted = every[0].data if every else None
    if not isinstance(submitted, TaskSubmitted):
        raise NotFound(f"the log has no task {task}")
    app, known = await _about(source, submitted.program)
    return await brought_back(_story(task, submitted.program, every, app, known), source)


async def stories(source: Source, program: str) -> list[Story]:
    """Every task of a program, oldest first."""
    by_task: dict[str, list[Event]] = {}
    async for page in source.pages(program=program):
        for event in page:
            kind, _, task = event.aggregate.partition(f".{program}.")
            if kind == "task":
                by_task.setdefault(task, []).append(event)
    app, known = await _about(source, program)
    by_task = {task: with_submission(task, every) for task, every in by_task.items()}
    whole = {task: every for task, every in by_task.items() if isinstance(every[0].data, TaskSubmitted)}
    found = [_story(task, program, every, app, known) for task, every in whole.items()]
    return [await brought_back(story, source) for story in found]


async def _about(source: Source, program: str) -> tuple[str, dict[str, dict[str, Any]]]:
    app = ""
    with contextlib.suppress(TaskError):
        async for event in source.events(aggregate=f"program.{program}.0"):
            app = event["data"].get("app", app)
    return app, await source.values(program)


def _story(task: str, program: str, every: list[Event], app: str, known: dict[str, dict[str, Any]]) -> Story:
    name = f"task.{program}.{task}"
    return Story(task, program, every, [event for event in every if event.aggregate == name], app, known)


def instance_of(program: type[Program], story: Story, values: dict[str, Any] | None = None) -> Program | None:
    """The program on the values that the task ran on, or on these values on top of those; None when nobody knows what
    it ran on. Raises InvalidAssignment for values that cannot be."""
    wanted = story.state.assignment
    found: Program | None = None
    if not wanted or program.space().default().hash == wanted:
        found = program()
    elif wanted in story.known:
        with contextlib.suppress(InvalidAssignment):
            found = program(assignment=Assignment.from_json(story.known[wanted]))
            found = found if found.assignment.hash == wanted else None
    if not values:
        return found
    return program(assignment=program.space().assign(values, base=found.assignment if found else None))
