"""The projection of costs: what the effects of each task have cost, by model and day. Nothing counts but the log."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence

from msgspec import UNSET

from dspex.core.costs import CostQuery, CostRow, Costs
from dspex.core.errors import Unavailable
from dspex.core.events import EffectRecorded, EffectRetried, Event
from dspex.core.subjects import parse_aggregate
from dspex.store.projections import DROPPED, Views

__all__ = ["COSTS", "MAX_ROWS", "costs_of"]

MAX_ROWS = 5000
"""Rows of one answer."""
_ADD = (
    "INSERT INTO costs VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (task, model, day) DO UPDATE SET"
    " calls = calls + excluded.calls, tokens = tokens + excluded.tokens, usd = usd + excluded.usd"
)
_COLUMNS = {"program": "program", "model": "model", "day": "day", "task": "task"}


class CostTable:
    """One row for each task, model and day."""

    name, version = "costs", 1
    tables: Mapping[str, Sequence[str]] = {
        "costs": (
            "CREATE TABLE costs (task INTEGER NOT NULL, model TEXT NOT NULL, day TEXT NOT NULL, program TEXT NOT NULL,"
            " calls INTEGER NOT NULL, tokens INTEGER NOT NULL, usd REAL NOT NULL,"
            " PRIMARY KEY (task, model, day)) WITHOUT ROWID",
            "CREATE INDEX costs_program ON costs (program, day)",
        )
    }

    def apply(self, run: sqlite3.Connection, events: Sequence[Event]) -> None:
        for event in events:
            if not isinstance(event.data, (EffectRecorded, EffectRetried)) or event.data.usage is UNSET:
                continue
            usage = event.data.usage
            _, program, task = parse_aggregate(event.aggregate)
            model = "" if usage.model is UNSET else usage.model
            run.execute(
                _ADD, (int(task), model, event.time[:10], program, usage.calls, usage.tokens, usage.usd)
            )


COSTS = CostTable()


def costs_of(views: Views, query: CostQuery) -> Costs:
    """What was asked. Raises InvalidInput, Unavailable when the view is not there."""
    query.check()
    if views.at(COSTS.name) == DROPPED:
        raise Unavailable(f"the view {COSTS.name} was dropped; `dspex views rebuild {COSTS.name}` makes it again")
    columns = [_COLUMNS[name] for name in dict.fromkeys(query.by)]
    where, given = ["1"], list[object]()
    for column, value in (("program", query.program), ("task", int(query.task) if query.task else None)):
        if value:
            where.append(f"{column} = ?")
            given.append(value)
    group = f"GROUP BY {', '.join(columns)} ORDER BY {', '.join(columns)}" if columns else ""
    sums = "SUM(calls), SUM(tokens), SUM(usd)"
    sql = f"SELECT {', '.join([*columns, sums])} FROM costs WHERE {' AND '.join(where)} {group} LIMIT {MAX_ROWS + 1}"
    try:
        found = views.run.execute(sql, given).fetchall()
    except sqlite3.OperationalError as error:
        raise Unavailable(f"the views cannot be read: {error}") from None
    rows = [
        CostRow(
            calls=calls, tokens=tokens, usd=round(usd, 9),
            **{name: str(value) for name, value in zip(columns, names, strict=True)},
        )
        for *names, calls, tokens, usd in found
        if calls is not None
    ]  # fmt: skip
    return Costs(rows[:MAX_ROWS], views.at(COSTS.name), len(rows) > MAX_ROWS)
