"""Any sequence of operations gives what a list would give."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspex.core.codec import encode_commit
from dspex.core.events import Head
from dspex.core.ports import Appended, Conflict, Log
from dspex.core.subjects import Subjects
from dspex.store import MemoryLog, SqliteLog
from dspex.store.contract import commit, positions
from dspex.store.rules import subject_filter

NAMES = ["task.a.1", "task.a.2", "agent.a.1"]
FILTERS = [None, ">", "dspex.event.task.>", "dspex.event.*.a.1", "dspex.task.a", "dspex.*.a"]

WHERE = ["head", "head", "start", "old", "again"]

append = st.tuples(
    st.just("append"),
    st.sampled_from(NAMES),
    st.integers(1, 3),
    st.sampled_from(WHERE),
    st.sampled_from("xyz"),
)
operation = st.one_of(
    append,
    append,
    st.tuples(st.just("store"), st.binary(max_size=5)),
    st.tuples(st.just("read"), st.sampled_from(NAMES)),
    st.tuples(st.just("scan"), st.integers(-1, 20), st.integers(0, 5), st.sampled_from(FILTERS)),
    st.tuples(st.just("reopen")),
)


@dataclass
class Model:
    """A log as a list of (subject, body), with what each aggregate's last append was."""

    entries: list[tuple[str, bytes]] = field(default_factory=list)
    heads: dict[str, list[Head]] = field(default_factory=lambda: {name: [Head()] for name in NAMES})
    last: dict[str, tuple[Head, bytes]] = field(default_factory=dict)

    def append(self, name: str, expected: Head, version: int, body: bytes) -> Appended | Conflict:
        if self.heads[name][-1] != expected:
            again = self.last.get(name) == (expected, body)
            return Appended(self.heads[name][-1]) if again else Conflict(self.heads[name][-1])
        self.entries.append((f"dspex.event.{name}", body))
        self.heads[name].append(Head(version, len(self.entries)))
        self.last[name] = (expected, body)
        return Appended(self.heads[name][-1])

    def numbered(self) -> list[tuple[int, str, bytes]]:
        return [(number, subject, body) for number, (subject, body) in enumerate(self.entries, 1)]


async def run(kind: Literal["memory", "sqlite"], operations: list[tuple[Any, ...]], path: Path) -> None:
    async def reopen(log: Log | None) -> Log:
        if log is not None:
            await log.close()
        if kind == "sqlite":
            return await SqliteLog.open(path, durability="process")
        return log.reopened() if isinstance(log, MemoryLog) else MemoryLog(Subjects())

    log, model = await reopen(None), Model()
    repeats: dict[str, tuple[Head, int, str]] = {}
    for what, *arguments in operations:
        if what == "append":
            name, count, where, mark = arguments
            expected = {"head": model.heads[name][-1], "start": Head(), "old": model.heads[name][-2:][0]}.get(where)
            if expected is None:
                expected, count, mark = repeats.get(name, (Head(), count, mark))
            repeats[name] = (expected, count, mark)
            events = commit(name, expected.version, count, mark)
            wanted = model.append(name, expected, expected.version + count, encode_commit(events))
            assert await log.append(name, events, expected) == wanted
        elif what == "store":
            model.entries.append(("dspex.task.a", arguments[0]))
            assert await log.store("dspex.task.a", arguments[0], {}) == len(model.entries)
        elif what == "read":
            found = [(entry.position, entry.subject, entry.body) for entry in await log.read(arguments[0])]
            assert found == [row for row in model.numbered() if row[1] == f"dspex.event.{arguments[0]}"]
            last = await log.last(arguments[0])
            assert (last.position if last else 0) == model.heads[arguments[0]][-1].position
        elif what == "scan":
            after, limit, pattern = arguments
            matches = subject_filter(pattern or ">")
            rows = [row for row in model.numbered() if row[0] > after and matches(row[1])]
            assert positions(await log.scan(after, limit, pattern)) == [row[0] for row in rows[:limit]]
        else:
            log = await reopen(log)
    assert await log.head() == len(model.entries)
    assert [(entry.subject, entry.body) for entry in await log.scan(0)] == model.entries
    await log.close()


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations=st.lists(operation, max_size=25))
def test_a_log_is_a_list(kind: Literal["memory", "sqlite"], operations: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(kind, operations, Path(folder) / "log.db"))
