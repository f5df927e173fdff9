"""How tasks are asked for, and what is said of each: the same words on the bus, on the command line and in a file."""

from __future__ import annotations

import re
from typing import Any

from msgspec import Struct

from dspex.core.errors import InvalidInput
from dspex.core.task import STATES

__all__ = ["MAX_FOUND", "MAX_TEXT", "Condition", "Found", "TaskQuery", "TaskRow"]

MAX_FOUND = 200
"""Tasks in one answer; the next ones are behind its last."""
MAX_TEXT = 256
"""Characters of a text that is looked for."""
_SCORE = re.compile(r"\s*(<=|>=|<|>|=|)\s*(-?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)\s*")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z?")


class Condition(Struct, frozen=True):
    """A comparison of a score with a number."""

    sign: str
    number: float


class TaskQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which tasks are wanted; whatever is not given does not matter.

    `since` and `until` are RFC 3339 in UTC and are about when a task came in; `text` is words, all of which are in the
    input or the output, `"…"` for words in a row and `…*` for the beginning of one. With `after` they are the first
    tasks behind that id, otherwise the newest, before the id `before`; always in the order in which they came.
    `position` is up to where in the log an answer has to know. `brief` leaves inputs and outputs out.
    `letters` asks for dead letters only: "dead", or "failed" with those whose retries are used up beside them. `since`
    and `until` are then about when they ended, and those that were dropped come only with `dropped`.
    """

    program: str = ""
    state: list[str] = []
    since: str = ""
    until: str = ""
    key: str = ""
    score: str = ""
    text: str = ""
    parent: str = ""
    limit: int = 50
    after: int | None = None
    before: int | None = None
    position: int = 0
    brief: bool = False
    letters: str = ""
    dropped: bool = False

    def check(self) -> None:
        """Raises InvalidInput with what is wrong in it."""
        for state in self.state:
            if state not in STATES:
                raise InvalidInput(f"{state[:40]!r} is no state of a task; they are {', '.join(STATES)}")
        for time in (self.since, self.until):
            if time and not _TIME.fullmatch(time):
                raise InvalidInput(f"{time[:40]!r} is no time; write it as 2026-11-23T10:00:00Z")
        if self.letters not in ("", "dead", "failed"):
            raise InvalidInput(f"letters is {self.letters[:40]!r}; dead or failed is due")
        if not 1 <= self.limit <= MAX_FOUND:
            raise InvalidInput(f"limit {self.limit}: 1 to {MAX_FOUND} tasks fit into an answer; go on with `after`")
        if len(self.text) > MAX_TEXT:
            raise InvalidInput(f"the text has {len(self.text):,} characters, and at most {MAX_TEXT} are looked for")
        if self.text and not self.words:
            raise InvalidInput(f"{self.text[:40]!r} has no word in it; words are of letters and digits")
        _ = self.condition

    @property
    def condition(self) -> Condition | None:
        """What the score must be. Raises InvalidInput."""
        if not self.score:
            return None
        found = _SCORE.fullmatch(self.score)
        if found is None:
            raise InvalidInput(f"{self.score[:40]!r} is no condition on a score; write >=0.8, <0.5 or =1")
        return Condition(found[1] or "=", float(found[2]))

    @property
    def words(self) -> list[str]:
        """The words and phrases of `text`, each quoted as full-text search in SQLite wants it."""
        found = []
        for phrase, word in re.findall(r'"([^"]*)"|([^\s"]+)', self.text):
            plain = (phrase or word).strip("*")
            if any(character.isalnum() for character in plain):
                found.append(f'"{plain}"' + ("*" if not phrase and word.endswith("*") else ""))
        return found


class TaskRow(Struct, kw_only=True):
    """What is known of one task without reading its events. Times are RFC 3339 in UTC; `score` is the newest one of
    `scores`; `waits` are the signals that a sleeping task waits for, none of them when it waits for a time; `last` is
    where its last commit stands in the log; `forked` is the task and version that it is a fork of, `42@7`; `code` is
    the version of the code that claimed it last, or the only one that may; `deaths` are attempts that died; `retried`
    is the task it was submitted again as, `dropped` who dropped it and why."""

    task: str
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
    input: Any = None
    output: Any = None
    error: dict[str, Any] | None = None
    of: str | None = None
    parent: str | None = None
    forked: str | None = None
    retried: str | None = None
    dropped: str | None = None
    seconds: float | None = None
    waits: list[str] | None = None
    last: int = 0


class Found(Struct, kw_only=True):
    """One answer: tasks, whether there are more of them (behind the last, or before the first), and up to which
    position of the log it knows."""

    tasks: list[TaskRow]
    more: bool = False
    position: int = 0
