"""What the archivist is asked: which tasks there are, what state an aggregate had, how far the views are.

The subjects are `dspex.archive.tasks`, `.state`, `.mentions`, `.costs` and `.views`; bodies and replies are JSON.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import TypeVar

import msgspec
from msgspec import Raw, Struct

from dspex.agents.projecting import Projecting
from dspex.bus.service import Endpoint, Request, Service
from dspex.core.codec import NOT_JSON, events_of
from dspex.core.costs import CostQuery
from dspex.core.errors import InvalidInput, LogCorrupt, LogError, Unavailable
from dspex.core.events import TaskCompleted, TaskSubmitted
from dspex.core.find import Found, TaskQuery
from dspex.core.subjects import Subjects
from dspex.store.chain import Row, entry_of
from dspex.store.costs import costs_of
from dspex.store.finding import find, mentions_of
from dspex.store.projections import View, Views
from dspex.store.reading import SELECT
from dspex.store.snapshots import fold_of, state_of

__all__ = ["Finding"]

MAX_REPLY = 768 << 10
Q = TypeVar("Q")


class _Wanted(Struct, forbid_unknown_fields=True):
    """A state: of an aggregate after version `to`, at the time `at`, or now."""

    aggregate: str
    to: int | None = None
    at: str = ""
    position: int = 0


class _Named(Struct, forbid_unknown_fields=True):
    program: str
    task: int


class _Change(Struct, forbid_unknown_fields=True):
    rebuild: str = ""
    drop: str = ""


class _Listed(Struct):
    views: list[View]
    position: int
    file: str
    trouble: str


class Finding:
    """Answers from the views."""

    def __init__(self, projecting: Projecting, subjects: Subjects, position: Callable[[], int]) -> None:
        self._projecting, self._subjects, self._position = projecting, subjects, position

    def serve(self, service: Service) -> None:
        for verb, handler in (
            ("tasks", self.tasks), ("state", self.state), ("mentions", self.mentions), ("views", self.views),
            ("costs", self.costs),
        ):  # fmt: skip
            service.serve(Endpoint(f"archive-{verb}", self._subjects.archive(verb), handler))

    async def tasks(self, request: Request) -> None:
        query = _read(request.data, TaskQuery)
        query.check()

        def work(views: Views, rows: sqlite3.Connection) -> bytes:
            return _fitted(find(views, query, lambda task, last: self._bodies(rows, task, last)), query)

        request.respond(await self._projecting.with_views(work, query.position))

    async def state(self, request: Request) -> None:
        wanted = _read(request.data, _Wanted)
        fold = fold_of(wanted.aggregate)

        def work(views: Views, rows: sqlite3.Connection) -> bytes:
            folded = state_of(views, rows, self._subjects, wanted.aggregate, wanted.to, wanted.at)
            return msgspec.json.encode(
                {
                    "aggregate": folded.aggregate, "version": folded.head.version, "position": folded.head.position,
                    "time": folded.time, "fold": fold.version, "state": Raw(fold.dump(folded.state)),
                    "known": views.position,
                }
            )  # fmt: skip

        request.respond(await self._projecting.with_views(work, wanted.position))

    async def mentions(self, request: Request) -> None:
        named = _read(request.data, _Named)
        positions, position = await self._projecting.with_views(
            lambda views, rows: mentions_of(views, named.program, named.task)
        )
        request.respond(msgspec.json.encode({"positions": positions, "position": position}))

    async def costs(self, request: Request) -> None:
        query = _read(request.data, CostQuery)
        found = await self._projecting.with_views(lambda views, rows: costs_of(views, query), query.position)
        request.respond(msgspec.json.encode(found))

    async def views(self, request: Request) -> None:
        change = _read(request.data, _Change)

        def work(views: Views, rows: sqlite3.Connection) -> list[View]:
            try:
                if change.drop:
                    views.drop(change.drop)
                if change.rebuild:
                    views.rebuild(change.rebuild)
            except sqlite3.Error as error:
                raise LogError(f"the views cannot be written: {error}") from None
            return views.described()

        try:
            listed = await self._projecting.with_views(work)
        except LogError as error:
            raise Unavailable(str(error)) from None
        projecting = self._projecting
        said = _Listed(listed, self._position(), str(projecting.file), projecting.trouble)
        request.respond(msgspec.json.encode(said))

    def _bodies(self, rows: sqlite3.Connection, task: int, last: int) -> tuple[Raw | None, Raw | None]:
        """A task's input and output, from the archive."""
        input = output = None
        for values in rows.execute(f"{SELECT} WHERE position IN (?, ?)", (task, last)):
            try:
                events = events_of(entry_of(Row._make(values)), self._subjects)
            except LogCorrupt:
                continue
            for event in events:
                match event.data:
                    case TaskSubmitted(input=raw):
                        input = raw
                    case TaskCompleted(output=raw):
                        output = raw
        return input, output


def _fitted(found: Found, query: TaskQuery) -> bytes:
    """An answer that fits into a reply: what is cut off is asked for next, behind or before what is there."""
    size, kept = 0, 0
    tasks = found.tasks if query.after is not None else list(reversed(found.tasks))
    for task in tasks:
        size += len(task.input or b"") + len(task.output or b"") + 1024
        if kept and size > MAX_REPLY:
            found.more = True
            break
        kept += 1
    found.tasks = tasks[:kept] if query.after is not None else list(reversed(tasks[:kept]))
    return msgspec.json.encode(found)


def _read(body: bytes, kind: type[Q]) -> Q:
    try:
        return msgspec.json.decode(body or b"{}", type=kind)
    except NOT_JSON as error:
        raise InvalidInput(f"the request is not understood: {error}") from None
