"""Ending a task that nobody wants any more: one commit, and a word to whoever is at work on it.

A cancellation is a signal, so it is stored and waits for an agent like any other. Whoever takes it writes the end of
the task under compare-and-set: the attempt that runs meanwhile finds its next append refused and leaves no trace. The
hint that the program's agents get is only to stop that attempt sooner.
"""

from __future__ import annotations

import logging
from typing import Any

import msgspec

from dspex.agents.journal import events_for
from dspex.agents.results import answer_of
from dspex.bus.client import Client
from dspex.core import headers as h
from dspex.core.codec import NOT_JSON, decode_commit
from dspex.core.errors import ConnectionFailed, LogError
from dspex.core.events import InputSealed, TaskCancelled
from dspex.core.ports import Appended, Entry, Log
from dspex.core.subjects import Subjects, aggregate
from dspex.core.task import TaskState, fold

__all__ = ["CANCEL", "Cancelling", "cancelled_task"]

logger = logging.getLogger("dspex.agents")

CANCEL = "cancel"
"""The signal that ends a task."""
TRIES = 1000
"""Commits of the running attempt that a cancellation may come second to."""
MAX_REASON = 500
"""Characters of a reason that are kept."""


class Cancelling:
    """Cancels tasks of one program."""

    def __init__(self, client: Client, log: Log, subjects: Subjects, program: str, source: str) -> None:
        self._client, self._log, self._subjects = client, log, subjects
        self._program, self._source = program, source

    async def cancel(
        self, submission: Entry, reason: object, *, by: str, cause: int, kept: InputSealed | None = None
    ) -> None:
        """End the task unless it has ended, however often this is tried. `kept` is its private input when that came in
        the open: its events keep it, for its message is erased next. Raises LogError."""
        task = str(submission.position)
        name = aggregate("task", self._program, task)
        why = reason[:MAX_REASON] if isinstance(reason, str) else ""
        for _ in range(TRIES):
            entries = await self._log.read(name)
            known = [event for entry in entries for event in decode_commit(entry.body, entry.position)]
            state = fold(known)
            if state.ended:
                if state.status == "cancelled":  # by one of us that died before it gave the word
                    self._hint(submission.position)
                return
            first = [] if kept is None or any(isinstance(event.data, InputSealed) for event in known) else [kept]
            events = events_for(
                name, state.head, [*first, TaskCancelled(reason=why, by=by)], source=self._source, correlation=task,
                causation=str(cause),
            )  # fmt: skip
            if isinstance(await self._log.append(name, events, state.head), Appended):
                self._hint(submission.position)
                self._answer(submission, fold(events, state))
                return
        raise LogError(f"task {task} went on {TRIES:,} times while it was to be cancelled")

    def _hint(self, position: int) -> None:
        """A word to the agents of the program: one of them may be at work on the task."""
        self._publish(self._subjects.control(self._program, CANCEL), msgspec.json.encode({"task": position}), None)

    def _answer(self, submission: Entry, state: TaskState) -> None:
        """The caller of an ask waits no longer."""
        reply, answer = h.reply_of(submission.headers), answer_of(state, str(submission.position))
        if reply and answer:
            self._publish(reply, *answer)

    def _publish(self, subject: str, body: bytes, headers: dict[str, str] | None) -> None:
        try:
            self._client.publish(subject, body, headers=headers)
        except ConnectionFailed as error:
            logger.info("%s was not told of a cancellation: %s", subject, error)


def cancelled_task(body: bytes) -> int:
    """The position of the task that a hint names; 0 when it names none."""
    try:
        value: Any = msgspec.json.decode(body)
    except NOT_JSON:
        return 0
    task = value.get("task") if isinstance(value, dict) else None
    return task if isinstance(task, int) and 0 < task < 1 << 63 else 0
