"""What effects have cost, summed up from a log: by whatever is asked, and the same however the log is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw
from tests.store.histories import apply, commit, door

from dspex.core.costs import CostQuery, CostRow
from dspex.core.errors import InvalidInput, Unavailable
from dspex.core.events import EffectRecorded, TaskClaimed, Usage
from dspex.core.ports import Entry
from dspex.store.costs import COSTS, costs_of
from dspex.store.projections import Views

CLAIM = TaskClaimed(attempt=1, agent="a", assignment="x")


def paid(usd: float, tokens: int = 10, model: str = "") -> EffectRecorded:
    usage = Usage(usd, tokens, 1, model) if model else Usage(usd, tokens, 1)
    return EffectRecorded(key="k", name="e", digest="", result=Raw(b"1"), usage=usage)


LOG = [
    door(1, "task", "qabot", {}), commit(2, "task.qabot.1", 0, CLAIM, paid(0.1), paid(0.2, model="small")),
    door(3, "task", "qabot", {}), commit(4, "task.qabot.3", 0, CLAIM, paid(0.3, 5, "small")),
    commit(5, "task.qabot.1", 3, paid(0.4, 0, "small"), EffectRecorded(key="f", name="free", digest="")),
    door(6, "task", "other", {}), commit(7, "task.other.6", 0, CLAIM, paid(1.0, model="large")),
]  # fmt: skip


def made(entries: list[Entry], group: int = 100) -> Views:
    views = Views(None, [COSTS], epoch="e")
    apply(views, entries, group)
    return views


def rows(views: Views, **query: object) -> list[CostRow]:
    return costs_of(views, CostQuery(**query)).rows  # type: ignore[arg-type]


def test_costs_are_summed_up_by_what_is_asked_for() -> None:
    with made(LOG) as views:
        assert rows(views) == [
            CostRow(program="other", model="large", calls=1, tokens=10, usd=1.0),
            CostRow(program="qabot", model="", calls=1, tokens=10, usd=0.1),
            CostRow(program="qabot", model="small", calls=3, tokens=15, usd=0.9),
        ]
        assert rows(views, program="qabot", by=["task"]) == [
            CostRow(task="1", calls=3, tokens=20, usd=0.7), CostRow(task="3", calls=1, tokens=5, usd=0.3),
        ]  # fmt: skip
        assert rows(views, task="3", by=[]) == [CostRow(calls=1, tokens=5, usd=0.3)]
        assert [row.day for row in rows(views, by=["day"])] == ["2025-10-09"]
        assert rows(views, program="nobody", by=[]) == []


@settings(deadline=None, max_examples=20)
@given(group=st.integers(1, 8))
def test_where_the_log_is_cut_makes_no_difference(group: int) -> None:
    with made(LOG) as whole, made(LOG, group) as cut:
        assert rows(whole, by=["program", "model", "day", "task"]) == rows(cut, by=["program", "model", "day", "task"])


def test_another_question_is_refused() -> None:
    with made(LOG) as views:
        for wrong in ({"by": ["weather"]}, {"task": "x"}):
            with pytest.raises(InvalidInput):
                rows(views, **wrong)
        views.drop("costs")
        with pytest.raises(Unavailable, match="was dropped"):
            rows(views)
