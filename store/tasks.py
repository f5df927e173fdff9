"""The projections that tasks are found by: one row a task, the outcomes and signals that name it, and full text."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Raw, Struct

from dspex.core import headers as h
from dspex.core.codec import NOT_JSON
from dspex.core.events import (
    AttemptDied,
    EffectRecorded,
    Event,
    OutcomeReported,
    SignalSent,
    TaskCancelled,
    TaskClaimed,
    TaskCompleted,
    TaskDeadLettered,
    TaskDropped,
    TaskDuplicate,
    TaskFailed,
    TaskResubmitted,
    TaskRetried,
    TaskSleeping,
    TaskSubmitted,
)

__all__ = ["BODIES", "MAX_WORDS", "TASKS", "TEXT"]

MAX_WORDS = 8192
"""Characters of an input or an output that can be found by their words; the rest is not looked at."""


class _Row(Struct):
    """A task as its row has it, in the order of the columns."""

    id: int
    program: str
    state: str = "submitted"
    submitted: str = ""
    ended: str | None = None
    key: str | None = None
    agent: str | None = None
    assignment: str | None = None
    code: str | None = None
    version: int = 0
    attempts: int = 0
    retries: int = 0
    deaths: int = 0
    effects: int = 0
    score: float | None = None
    scores: int = 0
    error_code: int | None = None
    error: str | None = None
    message: str | None = None
    of: str | None = None
    parent: str | None = None
    forked: str | None = None
    retried: str | None = None
    dropped: str | None = None
    seconds: float | None = None
    waits: str | None = None
    last: int = 0


COLUMNS = _Row.__struct_fields__
_PUT = f"INSERT OR REPLACE INTO tasks VALUES ({', '.join('?' * len(COLUMNS))})"
_GET = "SELECT * FROM tasks WHERE id IN (SELECT value FROM json_each(?))"

_SCORES = (
    "SELECT position, mentions.score FROM mentions, tasks WHERE id = :task AND mentions.program = tasks.program"
    " AND mentions.task = :task AND mentions.score IS NOT NULL"
    " UNION ALL SELECT position, mentions.score FROM mentions, tasks WHERE id = :task AND of IS NULL"
    " AND mentions.program = tasks.program AND mentions.key = tasks.key AND mentions.score IS NOT NULL"
)
_SCORE = (
    f"UPDATE tasks SET score = (SELECT s FROM (SELECT position p, score s FROM ({_SCORES})) ORDER BY p DESC LIMIT 1),"
    f" scores = (SELECT COUNT(*) FROM ({_SCORES})) WHERE id = :task"
)


class Tasks:
    """One row a task, and one for each outcome and signal that names a task."""

    name, version = "tasks", 3
    tables: Mapping[str, Sequence[str]] = {
        "tasks": (
            "CREATE TABLE tasks (id INTEGER PRIMARY KEY, program TEXT NOT NULL, state TEXT NOT NULL,"
            " submitted TEXT NOT NULL, ended TEXT, key TEXT, agent TEXT, assignment TEXT, code TEXT,"
            " version INTEGER NOT NULL, attempts INTEGER NOT NULL, retries INTEGER NOT NULL,"
            " deaths INTEGER NOT NULL,"
            " effects INTEGER NOT NULL, score REAL, scores INTEGER NOT NULL, error_code INTEGER, error TEXT,"
            " message TEXT, of TEXT, parent TEXT, forked TEXT, retried TEXT, dropped TEXT, seconds REAL, waits TEXT,"
            " last INTEGER NOT NULL)",
            "CREATE INDEX tasks_state ON tasks (program, state, id)",
            "CREATE INDEX tasks_submitted ON tasks (submitted)",
            "CREATE INDEX tasks_key ON tasks (key) WHERE key IS NOT NULL",
            "CREATE INDEX tasks_score ON tasks (score) WHERE score IS NOT NULL",
            "CREATE INDEX tasks_parent ON tasks (parent) WHERE parent IS NOT NULL",
        ),
        "mentions": (
            "CREATE TABLE mentions (position INTEGER PRIMARY KEY, program TEXT NOT NULL, task INTEGER, key TEXT,"
            " score REAL)",
            "CREATE INDEX mentions_task ON mentions (task, program) WHERE task IS NOT NULL",
            "CREATE INDEX mentions_key ON mentions (key, program) WHERE key IS NOT NULL",
        ),
    }

    def apply(self, run: sqlite3.Connection, events: Sequence[Event]) -> None:
        concerned = [(task, event) for event in events if (task := _task_of(event)) is not None]
        known = json.dumps(list({task for task, _ in concerned}))
        rows = {row[0]: _Row(*row) for row in run.execute(_GET, (known,))}
        mentions = [_mention(event) for event in events if isinstance(event.data, (OutcomeReported, SignalSent))]
        for task, event in concerned:
            row = rows.get(task)
            if row is None:
                row = rows[task] = _Row(task, event.aggregate.split(".")[1], submitted=event.time)
            _evolve(row, event)
        run.executemany(_PUT, [msgspec.structs.astuple(row) for row in rows.values()])
        if mentions:
            run.executemany("INSERT INTO mentions VALUES (?, ?, ?, ?, ?)", mentions)
        begun = {task for task, event in concerned if isinstance(event.data, (TaskSubmitted, TaskDuplicate))}
        changed = {task for task in begun if rows[task].key}
        self._score(run, mentions, changed)

    def _score(self, run: sqlite3.Connection, mentions: Sequence[tuple[Any, ...]], changed: set[int]) -> None:
        """Bring the scores of those tasks up to date that were named, or whose key, or right to it, is new.

        A score counts for the task that it names, or that has the key which it names and is nobody's duplicate; so it
        does not matter which came first, or what came in the same group.
        """
        scored = [mention for mention in mentions if mention[4] is not None]
        tasks = {task for _, _, task, _, _ in scored if task is not None} | changed
        keys = {(key, program) for _, program, _, key, _ in scored if key is not None}
        for key, program in keys:
            found = run.execute("SELECT id FROM tasks WHERE key = ? AND program = ?", (key, program))
            tasks |= {task for (task,) in found}
        run.executemany(_SCORE, [{"task": task} for task in tasks])


def _task_of(event: Event) -> int | None:
    """The task whose row an event changes."""
    kind, _, id = event.aggregate.split(".") if event.aggregate.startswith(("task.", "dlq.")) else ("", "", "")
    return int(id) if kind and id.isdecimal() and len(id) < 19 else None


def _mention(event: Event) -> tuple[object, ...]:
    """An outcome or a signal: where it stands, and the task that it names, by id or by key."""
    data = event.data
    assert isinstance(data, (OutcomeReported, SignalSent))
    body = _json(data.outcome if isinstance(data, OutcomeReported) else data.signal)
    named, score = (body.get("task"), body.get("score")) if isinstance(body, dict) else (None, None)
    if isinstance(named, bool) or not isinstance(named, (int, str)) or len(str(named)) > h.MAX_KEY:
        named = ""
    text = str(named)
    task = int(text) if text.isdecimal() and text.isascii() and len(text) < 19 else None
    key = text if task is None and text else None
    return event.position, data.program, task, key, _number(score)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def _evolve(row: _Row, event: Event) -> None:
    """What an event changes in its task's row; the states are those of `core.task`."""
    if event.aggregate.startswith("task."):
        row.version = max(row.version, event.version)
        if event.version:
            row.last = event.position
    match event.data:
        case AttemptDied():
            row.deaths += 1
        case TaskResubmitted(successor=successor):
            row.retried = successor
        case TaskDropped(actor=actor, why=why):
            row.dropped = f"{actor}: {why}" if actor else why
        case EffectRecorded():
            row.effects += 1
        case TaskSubmitted(headers=headers):
            row.submitted = event.time
            row.key, row.parent, row.forked = headers.get(h.KEY), headers.get(h.PARENT), headers.get(h.FORK)
            row.code = headers.get(h.CODE)
        case TaskClaimed(attempt=attempt, agent=agent, assignment=assignment, code=code):
            row.state, row.attempts = "running", attempt
            row.agent, row.assignment, row.code, row.waits = agent, assignment, code or None, None
        case TaskCompleted(seconds=seconds):
            row.state, row.ended, row.seconds = "completed", event.time, seconds
        case TaskSleeping(signal=signal):
            row.state = "sleeping"
            row.waits = json.dumps(sorted({*json.loads(row.waits or "[]"), *([signal] if signal else ())}))
        case TaskRetried(retry=retry):
            row.state, row.retries = "sleeping", retry
        case TaskFailed(code=code, type=kind, message=message, seconds=seconds):
            row.state, row.ended, row.seconds = "failed", event.time, seconds
            row.error_code, row.error, row.message = code, kind, message
        case TaskDuplicate(of=of):
            row.state, row.ended, row.of = "duplicate", event.time, of
        case TaskDeadLettered(reason=reason):
            row.state, row.ended = "dead", event.time
            row.error_code, row.error, row.message = 500, "TaskDeadLettered", reason
        case TaskCancelled(reason=reason):
            row.state, row.ended = "cancelled", event.time
            row.error_code, row.error = 409, "TaskCancelled"
            row.message = f"the task was cancelled: {reason}" if reason else "the task was cancelled"


class Text:
    """The words of inputs (at twice a task's id) and of outputs or errors (at the number behind it)."""

    name, version = "text", 1
    tables: Mapping[str, Sequence[str]] = {
        "texts": ("CREATE VIRTUAL TABLE texts USING fts5(words, content='', columnsize=0)",)
    }

    def apply(self, run: sqlite3.Connection, events: Sequence[Event]) -> None:
        rows: list[tuple[int, str]] = []
        for event in events:
            task = _task_of(event)
            if task is None:
                continue
            match event.data:
                case TaskSubmitted(input=input):
                    rows.append((2 * task, words_of(_json(input))))
                case TaskCompleted(output=output):
                    rows.append((2 * task + 1, words_of(_json(output))))
                case TaskFailed(type=kind, message=message):
                    rows.append((2 * task + 1, f"{kind} {message}"[:MAX_WORDS]))
        run.executemany("INSERT INTO texts (rowid, words) VALUES (?, ?)", rows)


class Bodies:
    """Inputs and outputs, for a source from which they cannot be fetched one by one."""

    name, version = "bodies", 1
    tables: Mapping[str, Sequence[str]] = {
        "bodies": ("CREATE TABLE bodies (id INTEGER PRIMARY KEY, input BLOB, output BLOB)",)
    }

    def apply(self, run: sqlite3.Connection, events: Sequence[Event]) -> None:
        inputs, outputs = [], []
        for event in events:
            task = _task_of(event)
            if task is not None and isinstance(event.data, TaskSubmitted):
                inputs.append((task, bytes(event.data.input)))
            elif task is not None and isinstance(event.data, TaskCompleted):
                outputs.append((task, bytes(event.data.output)))
        put = "INSERT INTO bodies (id, {0}) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET {0} = excluded.{0}"
        run.executemany(put.format("input"), inputs)
        run.executemany(put.format("output"), outputs)


def words_of(value: Any) -> str:
    """The strings and numbers in a JSON value, in order, up to `MAX_WORDS` characters."""
    found: list[str] = []
    room = MAX_WORDS
    left = [value]
    while left and room > 0:
        one = left.pop()
        if isinstance(one, dict):
            left.extend(reversed(one.values()))
        elif isinstance(one, list):
            left.extend(reversed(one[:room]))
        elif isinstance(one, str) or _number(one) is not None:
            found.append(str(one)[:room])
            room -= len(found[-1]) + 1
    return " ".join(found)


def _json(raw: Raw) -> Any:
    try:
        return msgspec.json.decode(raw)
    except NOT_JSON:
        return None


TASKS, TEXT, BODIES = Tasks(), Text(), Bodies()
