"""Running a task again from its events: every effect is looked up, none performed, and the first difference is named.

The same bytes come out, or the report says where today's code and the record part: an effect that was not recorded
("added"), one that was recorded and not asked for ("removed"), other arguments, another order, another output. A task
that has not ended is run up to where its record stops.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from msgspec import Struct

from dspex.core import effects
from dspex.core.compare import ABSENT, changes
from dspex.core.errors import InvalidInput, ProgramFailed, TaskError
from dspex.core.events import EffectRecorded, Event, TaskCompleted, TaskFailed, TaskForked, TaskRetried
from dspex.core.lookup import Answers, Difference, Lookup, Parted, Stopped, Traced, Watch
from dspex.core.program import Program
from dspex.core.task import TaskState, fold

__all__ = ["Difference", "Report", "Rerun", "Watch", "difference_of", "replay", "rerun", "run_on"]

NOT_AGAIN = {
    "CodeUnavailable": "it ended because no agent had the code that it needs",
    "DeadlineExceeded": "it ended by its deadline, and time is not replayed",
    "Diverged": "its code changed while it was under way, and it ended by that",
}
"""Failures that no program raises, so that no program can give them again."""
PATIENCE = 1.0
"""Seconds that a run which was cancelled has to end."""


class Report(Struct, frozen=True):
    """What a replay found. `performed` is 0, always: it is there to be checked. `same` is None when the task was not
    run, and `why` says why; `stopped` is the place at which the record of a task that has not ended stops."""

    task: str
    same: bool | None
    effects: int
    performed: int
    difference: Difference | None = None
    stopped: str | None = None
    why: str = ""
    seconds: float = 0.0


class Rerun:
    """A report, with what only this process can hold: the exception that ended the run, and its traceback."""

    def __init__(self, report: Report, error: BaseException | None = None) -> None:
        self.report, self.error = report, error


async def replay(program: Program, events: Iterable[Event], task: str) -> Report:
    """Run `program` again on the input and the records in a task's events. Raises InvalidInput when they hold no
    submission, and nothing that the program raises: that is compared with how the task ended."""
    return (await rerun(program, events, task)).report


async def rerun(
    program: Program, events: Iterable[Event], task: str, *, watch: Watch | None = None, strict: bool = False
) -> Rerun:
    """Like `replay`, for a debugger: `watch` sees every effect when it is asked for. `strict` ends the run at the first
    difference, where otherwise it goes on with guesses for a while to find out what kind of difference it is."""
    story = list(events)
    state = fold(story)
    if state.input is None:
        raise InvalidInput(f"task {task} has no submission among its events")
    why = _not_run(state)
    if why:
        return Rerun(Report(task, None, 0, 0, why=why))
    past = _past(story)
    lookup = Lookup(
        list(past.records.values()), past.seed or task, past.life, past.old, past.shared,
        ended=state.status in ("completed", "failed"), strict=strict, watch=watch,
    )  # fmt: skip
    started = time.perf_counter()
    body, error = await run_on(program, bytes(state.input), lookup)
    seconds = time.perf_counter() - started
    ended = None if lookup.stopped else _compare(body, error, story)
    difference = lookup.difference() or ended or lookup.unasked()
    why = f"the task is {state.status}, and its record stops at {lookup.stopped}" if lookup.stopped else ""
    report = Report(
        task, difference is None, lookup.asked, 0, difference, None if difference else lookup.stopped or None,
        "" if difference else why, round(seconds, 6),
    )  # fmt: skip
    return Rerun(report, lookup.parted or error)


def _not_run(state: TaskState) -> str:
    """Why a task is not run again; "" when it is."""
    if state.status == "duplicate":
        return f"the task is a duplicate: task {state.of} has its output"
    return NOT_AGAIN.get(state.error, "") if state.status == "failed" else ""


@dataclass
class _Past:
    """The records that the last attempt could see, how often a retry started clean, and whose random numbers it drew.
    `old` are the keys that it need not have asked for: of earlier attempts, and of a fork's parent; the latter,
    `shared`, it may have asked for otherwise."""

    records: dict[str, EffectRecorded] = field(default_factory=dict)
    life: int = 0
    seed: str = ""
    old: set[str] = field(default_factory=set)
    shared: set[str] = field(default_factory=set)
    missing: int = 0

    def add(self, record: EffectRecorded) -> None:
        self.records[record.key] = record
        self.old.discard(record.key)
        if self.missing:
            self.missing -= 1
            self.old.add(record.key)
            self.shared.add(record.key)


def _past(story: list[Event]) -> _Past:
    past = _Past()
    for event in story:
        match event.data:
            case EffectRecorded() as record:
                past.add(record)
            case TaskForked(seed=seed, life=life, records=missing):
                past = _Past(life=life, seed=seed, missing=missing)
            case TaskRetried(clean=True):
                past = _Past(life=past.life + 1, seed=past.seed)
            case TaskRetried():
                past.old = set(past.records)
    return past


async def run_on(program: Program, body: bytes, answers: Answers) -> tuple[bytes | None, BaseException | None]:
    """The output, or what ended the run; neither when it was stopped.

    In a task of its own, so that nothing is left behind in the caller's context; every task that it starts is a branch,
    as it was when it was recorded."""
    loop = asyncio.get_running_loop()
    factory = loop.get_task_factory()

    async def work() -> bytes:
        effects.begin(Traced(program.name, lambda: answers))
        try:
            taken = program.decode(body)
            await asyncio.to_thread(program.prepare)
            if program.is_async:
                answers.begins()
                value = await program.predict(taken)
            else:
                value = await asyncio.to_thread(in_thread, taken)
            output: bytes = program.check_output(value).encode()
        except (SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            raise ProgramFailed(str(error), type=type(error).__name__) from error
        return output

    def in_thread(input: Any) -> Any:
        answers.begins()
        return program.predict(input)

    # A task factory sees tasks of others, too; outside of a run it makes them as ever.
    loop.set_task_factory(effects.branching)
    main = asyncio.Task(work(), loop=loop, name="dspex-replay")
    answers.main = main
    try:
        await asyncio.wait({main})
    finally:
        loop.set_task_factory(factory)
        main.cancel()
        answers.close()
    if main.cancelled():
        return None, None
    error = main.exception()
    if error is None:
        return main.result(), None
    if isinstance(error, (Parted, Stopped)) or answers.stopped:
        return None, None
    if not isinstance(error, Exception):
        raise error
    return None, error


def _compare(body: bytes | None, error: BaseException | None, story: list[Event]) -> Difference | None:
    """How today's end differs from the recorded one; None when it does not, or when none is recorded yet."""
    where = _where(error)
    kind = error.type if isinstance(error, TaskError) else type(error).__name__
    for event in story:
        match event.data:
            case TaskCompleted(output=output):
                if body is None:
                    return Difference("error", "output", msgspec.json.decode(output), f"{kind}: {error}", where)
                return difference_of(msgspec.json.decode(output), msgspec.json.decode(body), "output")
            case TaskFailed(type=expected):
                if body is not None:
                    return Difference("output", "output", expected, msgspec.json.decode(body))
                return None if kind == expected else Difference("error", "error", expected, f"{kind}: {error}", where)
    return None


def _where(error: BaseException | None) -> str:
    """The innermost line of the program in a traceback."""
    found, step = "", error.__traceback__ if error else None
    while step is not None:
        if not str(step.tb_frame.f_globals.get("__name__", "")).startswith(("dspex.core", "asyncio", "concurrent")):
            code = step.tb_frame.f_code
            found = f"{code.co_filename}:{step.tb_lineno} in {code.co_name}"
        step = step.tb_next
    return found


def difference_of(expected: Any, found: Any, path: str = "") -> Difference | None:
    """The first place, by path, at which two JSON values differ."""
    for change in changes(expected, found, path):
        one, other = (None if value is ABSENT else value for value in change[1:])
        return Difference("output", change.path, one, other)
    return None
