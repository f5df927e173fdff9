"""Finding tasks: in the views beside the archive of a running system, or in a file, or by reading the log."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from dspex.compose.replays import opened, wait_for
from dspex.compose.story import BusSource, Source
from dspex.core.errors import TaskError
from dspex.core.find import MAX_FOUND, Found, TaskQuery, TaskRow

__all__ = ["Finder", "afind_tasks", "find_tasks"]


def find_tasks(
    program: str = "", *, state: str | Sequence[str] = (), since: str = "", until: str = "", key: str = "",
    score: str = "", text: str = "", parent: str = "", after: int | None = None, limit: int = 50,
    log: str | Path | None = None, url: str | None = None,
) -> list[TaskRow]:  # fmt: skip
    """The tasks that fit all that is given, in the order in which they came: the newest `limit`, or with `after` the
    first behind that id; `limit` 0 is all.

    `since` and `until` are RFC 3339 in UTC, `score` is a condition such as `>=0.8`, `text` is words in the input or the
    output. `log` is an archive, an export or another SQLite log; otherwise a running system is asked. Raises
    InvalidInput, LogError, ConnectionFailed, Unavailable.
    """
    return wait_for(
        afind_tasks(
            program, state=state, since=since, until=until, key=key, score=score, text=text, parent=parent,
            after=after, limit=limit, log=log, url=url,
        )
    )  # fmt: skip


async def afind_tasks(
    program: str = "", *, state: str | Sequence[str] = (), since: str = "", until: str = "", key: str = "",
    score: str = "", text: str = "", parent: str = "", after: int | None = None, limit: int = 50,
    log: str | Path | None = None, url: str | None = None,
) -> list[TaskRow]:  # fmt: skip
    """Like `find_tasks`, to be awaited."""
    states = [state] if isinstance(state, str) and state else list(state)
    query = TaskQuery(
        program=program, state=states, since=since, until=until, key=key, score=score, text=text, parent=parent,
        after=after,
    )  # fmt: skip
    async with opened(log, url) as source, Finder(source) as finder:
        return [row async for row in finder.rows(query, limit)]


class Finder:
    """Answers queries from one source, page by page. `known` is up to where in the log the last answer knew."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._views: Any = None
        self._asked = False
        self.known = self.head = 0

    async def __aenter__(self) -> Finder:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._views is not None:
            self._views.close()

    async def rows(self, query: TaskQuery, limit: int = 50) -> AsyncIterator[TaskRow]:
        """At most `limit` tasks, 0 being all, in the order in which they came. Raises InvalidInput, Unavailable."""
        query.check()
        self.head = await self._source.head()
        query = msgspec.structs.replace(query, position=self.head)
        if limit and query.after is None:
            for row in await self._newest(query, limit):
                yield row
            return
        after, left = query.after or 0, limit
        while True:
            wanted = min(left, MAX_FOUND) if limit else MAX_FOUND
            found = await self.page(msgspec.structs.replace(query, after=after, limit=wanted))
            for row in found.tasks:
                yield row
            left -= len(found.tasks)
            if not found.more or not found.tasks or (limit and left <= 0):
                return
            after = int(found.tasks[-1].task)

    async def _newest(self, query: TaskQuery, limit: int) -> list[TaskRow]:
        rows: list[TaskRow] = []
        while len(rows) < limit:
            before = int(rows[0].task) if rows else query.before
            wanted = min(limit - len(rows), MAX_FOUND)
            found = await self.page(msgspec.structs.replace(query, before=before, limit=wanted))
            rows = found.tasks + rows
            if not found.more or not found.tasks:
                break
        return rows

    async def page(self, query: TaskQuery) -> Found:
        """One answer: of the archivist when there is one, else from views made for the purpose."""
        if self._views is None and isinstance(self._source, BusSource):
            body: bytes | None = None
            try:
                body = await self._source.caller.archive("tasks", query)
            except TaskError as error:
                if self._asked or error.code != 503 or "nobody serves" not in error.message:
                    raise
            if body is not None:
                self._asked = True
                found = msgspec.json.decode(body, type=Found)
                self.known = found.position
                return found
        if self._views is None:
            self._views = await self._made(query)
        return self._local(query)

    def _local(self, query: TaskQuery) -> Found:
        from dspex.store.finding import find

        found = find(self._views, query)
        for row in found.tasks:
            for name in ("input", "output"):
                raw = getattr(row, name)
                setattr(row, name, None if raw is None else msgspec.json.decode(raw))
        self.known = found.position
        return found

    async def _made(self, query: TaskQuery) -> Any:
        """Views of the whole log, in a file without a name that goes with this process."""
        from dspex.store.projections import Views
        from dspex.store.tasks import BODIES, TASKS, TEXT

        views = Views(None, [TASKS, TEXT, BODIES] if query.text else [TASKS, BODIES], epoch="here")
        narrowed = {"program": query.program} if query.program and isinstance(self._source, BusSource) else {}
        position = 0
        async for page in self._source.pages(**narrowed):
            if page:
                position = max(position, page[-1].position)
                views.advance(page, position, "")
        views.advance([], max(position, self.head), "")
        return views
