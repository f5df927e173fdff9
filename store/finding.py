"""Tasks found in the views: a query as SQL, and its rows."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from typing import Any

from msgspec import Raw

from dspex.core.errors import Unavailable
from dspex.core.find import Found, TaskQuery, TaskRow
from dspex.store.projections import DROPPED, Views
from dspex.store.tasks import COLUMNS

__all__ = ["PATIENCE", "find", "mentions_of"]

PATIENCE = 5.0
"""Seconds that one search may take."""
MAX_MENTIONS = 10_000
"""Outcomes and signals of one task that are told; more are not in its story."""
STEPS = 20_000
"""Instructions of SQLite between looks at the clock."""

Bodies = Callable[[int, int], tuple[Raw | None, Raw | None]]
"""The input and the output of a task, by its id and where its last commit stands."""


def find(views: Views, query: TaskQuery, bodies: Bodies | None = None) -> Found:
    """The tasks that a query names, in the order in which they came; without `bodies` those that the views keep.

    Raises InvalidInput for a query that makes no sense, Unavailable when a view that it needs is not there, or when it
    takes too long.
    """
    query.check()
    needed = ["tasks", "text"] if query.text else ["tasks"]
    for name in needed:
        if views.at(name) == DROPPED:
            raise Unavailable(f"the view {name} was dropped; `dspex views rebuild {name}` makes it again")
    where, parameters = _where(query)
    order = "ASC" if query.after is not None else "DESC"
    sql = f"SELECT {', '.join(COLUMNS)} FROM tasks WHERE {where} ORDER BY id {order} LIMIT ?"
    rows = _rows(views, sql, [*parameters, query.limit + 1])
    more = len(rows) > query.limit
    rows = rows[: query.limit]
    if query.after is None:
        rows.reverse()
    found = [_task(row) for row in rows]
    if not query.brief:
        for task in found:
            task.input, task.output = (bodies or _kept(views))(int(task.task), task.last)
            if task.state != "completed":
                task.output = None
    return Found(tasks=found, more=more, position=min(views.at(name) for name in needed))


def mentions_of(views: Views, program: str, task: int) -> tuple[list[int], int]:
    """Where the outcomes and signals stand that name a task by its id, and up to where that is known."""
    if views.at("tasks") == DROPPED:
        return [], 0
    sql = "SELECT position FROM mentions WHERE task = ? AND program = ? ORDER BY position LIMIT ?"
    rows = _rows(views, sql, [task, program, MAX_MENTIONS])
    return [position for (position,) in rows], views.at("tasks")


def _where(query: TaskQuery) -> tuple[str, list[object]]:
    """The condition, and what it is about."""
    parts, parameters = ["1"], list[object]()

    def also(part: str, *values: object) -> None:
        parts.append(part)
        parameters.extend(values)

    if query.program:
        also("program = ?", query.program)
    if query.state:
        also(f"state IN ({', '.join('?' * len(query.state))})", *query.state)
    if query.letters:
        also("(state = 'dead' OR (? AND state = 'failed' AND retries > 0))", query.letters == "failed")
        if not query.dropped:
            also("dropped IS NULL")
    when = "ended" if query.letters else "submitted"
    if query.since:
        also(f"{when} >= ?", query.since)
    if query.until:
        also(f"{when} < ?", query.until)
    if query.key:
        also("key = ?", query.key)
    if query.parent:
        also("parent = ?", query.parent)
    if query.after is not None:
        also("id > ?", query.after)
    if query.before is not None:
        also("id < ?", query.before)
    condition = query.condition
    if condition:
        also(f"score {condition.sign} ?", condition.number)
    for word in query.words:  # each in the input or the output
        also("id IN (SELECT rowid / 2 FROM texts WHERE texts MATCH ?)", word)
    return " AND ".join(parts), parameters


def _rows(views: Views, sql: str, parameters: list[object]) -> list[tuple[Any, ...]]:
    until = time.monotonic() + PATIENCE
    views.run.set_progress_handler(lambda: time.monotonic() > until, STEPS)
    try:
        return views.run.execute(sql, parameters).fetchall()
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
            raise Unavailable(
                f"the search took longer than {PATIENCE:g} s; ask for one program, or a shorter time"
            ) from None
        raise Unavailable(f"the views cannot be read: {error}") from None
    finally:
        views.run.set_progress_handler(None, 0)


def _task(row: tuple[Any, ...]) -> TaskRow:
    fields = dict(zip(COLUMNS, row, strict=True))
    code, kind, message = (fields.pop(name) for name in ("error_code", "error", "message"))
    error = {"code": code, "type": kind, "message": message} if kind else None
    waits = fields.pop("waits")
    sleeping = json.loads(waits or "[]") if fields["state"] == "sleeping" else None
    return TaskRow(task=str(fields.pop("id")), error=error, waits=sleeping, **fields)


def _kept(views: Views) -> Bodies:
    def fetch(task: int, _: int) -> tuple[Raw | None, Raw | None]:
        row = views.run.execute("SELECT input, output FROM bodies WHERE id = ?", (task,)).fetchone()
        input, output = row or (None, None)
        return Raw(input) if input else None, Raw(output) if output else None

    return fetch
