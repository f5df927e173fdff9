"""Which tasks of a log have not ended: a projection, fed with every row in order, kept between lives as a checkpoint.

It holds what a log process has to put into its queue again after a crash: tasks that wait or run, tasks that sleep, and
signals that are in no inbox yet. It can be dropped at any time: the log makes it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec
from msgspec import Raw, Struct

from dspex.core.codec import NOT_JSON
from dspex.core.errors import LogCorrupt
from dspex.core.subjects import Subjects

__all__ = ["Brief", "Checkpoint", "Standing", "briefs"]

_ENDS = frozenset({"TaskCompleted", "TaskFailed", "TaskDuplicate", "TaskDeadLettered", "TaskCancelled"})
_RESTS = frozenset({"TaskSleeping", "TaskRetried"})


class Brief(Struct):
    """What has to be known of an event to see what becomes of its task."""

    type: str
    aggregate: str
    data: Raw = Raw()


class _Signal(Struct):
    position: int = 0


class _About(Struct):
    task: int | str | None = None


class Checkpoint(Struct, omit_defaults=True):
    """A standing as it is kept: up to `position` of the log `epoch`. Tasks by program; signals by position."""

    epoch: str
    position: int
    awake: dict[str, list[int]] = {}
    asleep: dict[str, list[int]] = {}
    signals: dict[int, tuple[str, int]] = {}


_decode_briefs = msgspec.json.Decoder(list[Brief]).decode
_decode_signal = msgspec.json.Decoder(_Signal).decode
_decode_about = msgspec.json.Decoder(_About).decode


def briefs(body: bytes) -> list[Brief]:
    """The events of a commit, no deeper than is needed. Raises LogCorrupt when the bytes are no commit."""
    try:
        found = _decode_briefs(body)
    except (*NOT_JSON, msgspec.ValidationError) as error:
        raise LogCorrupt(f"this is no commit: {error}") from None
    if not found:
        raise LogCorrupt("this is no commit: it holds no event")
    return found


class Standing:
    """`position` is how far the log has been folded; `awake` and `asleep` give each open task's program."""

    def __init__(self, subjects: Subjects) -> None:
        self._subjects = subjects
        self.position = 0
        self.awake: dict[int, str] = {}
        self.asleep: dict[int, str] = {}
        self.waiting: Counter[str] = Counter()
        """How many tasks of each program wait or run."""
        self.signals: dict[int, tuple[str, int]] = {}
        """By position: the program, and the task that the signal is for."""
        self._of: dict[int, list[int]] = {}

    def is_open(self, task: int) -> bool:
        return task in self.awake or task in self.asleep

    def door(self, position: int, door: str, program: str, body: bytes) -> bool:
        """A door message was stored; whether an agent has to see it."""
        self.position = position
        if door == "task":
            self.awake[position] = program
            self.waiting[program] += 1
            return True
        task = _task_of(body) if door == "signal" else None
        if task is None or not self.is_open(task):
            return False
        self.signals[position] = program, task
        self._of.setdefault(task, []).append(position)
        return True

    def commit(self, position: int, events: Sequence[Brief]) -> list[int]:
        """A commit was stored; the tasks and signals that are not for agents any more."""
        self.position = position
        kind, _, rest = events[0].aggregate.partition(".")
        left: list[int] = []
        if kind == "task":
            program, _, name = rest.partition(".")
            if name.isdecimal():
                for event in events:
                    left += self._evolve(int(name), program, event.type)
        elif kind == "inbox":
            for event in events:
                if event.type == "SignalReceived":
                    signal = _decode_signal(event.data).position
                    self.signals.pop(signal, None)
                    left.append(signal)
        return left

    def row(self, position: int, subject: str, body: bytes) -> None:
        """A row of the log, whatever it is; what is none of ours is passed over."""
        door = self._subjects.door_of(subject)
        if door is not None:
            self.door(position, *door, body)
            return
        try:
            self.commit(position, briefs(body))
        except (LogCorrupt, msgspec.MsgspecError):
            self.position = position

    def _evolve(self, task: int, program: str, kind: str) -> list[int]:
        """What becomes of a task by an event; what is not for agents any more."""
        if kind in _ENDS:
            self._rest(task)
            self.asleep.pop(task, None)
            signals = self._of.pop(task, [])
            for signal in signals:
                self.signals.pop(signal, None)
            return [task, *signals]
        if kind in _RESTS:
            if self._rest(task):
                self.asleep[task] = program
            return [task]
        if kind == "TaskClaimed" and self.asleep.pop(task, None) is not None:
            self.awake[task] = program
            self.waiting[program] += 1
        return []

    def _rest(self, task: int) -> bool:
        """A task neither waits nor runs any more; whether it did."""
        program = self.awake.pop(task, None)
        if program is None:
            return False
        self.waiting[program] -= 1
        return True

    # -- kept between lives

    def checkpoint(self, epoch: str) -> Checkpoint:
        """What can be kept, and resumed from."""
        kept = Checkpoint(epoch, self.position, {}, {}, dict(self.signals))
        for tasks, into in ((self.awake, kept.awake), (self.asleep, kept.asleep)):
            for task, program in tasks.items():
                into.setdefault(program, []).append(task)
        return kept

    def resume(self, kept: Checkpoint) -> None:
        """Go on from a checkpoint."""
        self.position, self.signals = kept.position, dict(kept.signals)
        self.awake = {task: program for program, tasks in kept.awake.items() for task in tasks}
        self.waiting = Counter({program: len(tasks) for program, tasks in kept.awake.items()})
        self.asleep = {task: program for program, tasks in kept.asleep.items() for task in tasks}
        for position, (_, task) in self.signals.items():
            self._of.setdefault(task, []).append(position)


def _task_of(body: bytes) -> int | None:
    try:
        task = str(_decode_about(body).task)
    except (*NOT_JSON, msgspec.ValidationError):
        return None
    return int(task) if task.isdecimal() and task.isascii() and len(task) < 19 else None
