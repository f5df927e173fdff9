"""What clients did and what they were told, with times: the history of one run, as Jepsen writes one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

__all__ = ["ENDED", "History", "Op", "Performance", "load"]

ENDED = {0, 303, 400, 404, 408, 409, 410, 500}
"""Codes that tell of an ending; 202, 429 and 503 tell of none."""


class Op(msgspec.Struct, omit_defaults=True):
    """One operation of a client. Times in seconds since the epoch.

    `ok`: the client was told something. `fail`: it was told that nothing was stored. `unknown`: it heard nothing, or
    nothing that says what became of it. `task` is the task it was told of, or that it named; `position` where its
    message was stored; `code` 0 for a reply without one.
    """

    client: str
    action: Literal["submit", "ask", "result", "cancel", "signal", "score"]
    began: float
    program: str = "chaos"
    body: Any = None
    key: str = ""
    task: int = 0
    position: int = 0
    ended: float = 0.0
    outcome: Literal["ok", "fail", "unknown"] = "unknown"
    code: int = 0
    answer: Any = None


class Performance(msgspec.Struct):
    """An effect that was really performed: under which idempotency key, by which attempt of which agent, and when."""

    key: str
    value: str
    agent: str
    attempt: str
    began: float
    at: float


class History:
    """The operations of one run, in the order in which they were begun."""

    def __init__(self, ops: Iterable[Op] = ()) -> None:
        self.ops = list(ops)

    def begin(self, client: str, action: Any, **said: Any) -> Op:
        """Write down what a client is about to do; until it is ended, nobody knows whether it was done."""
        op = Op(client, action, time.time(), **said)
        self.ops.append(op)
        return op

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def of(self, *actions: str) -> Iterator[Op]:
        """The operations of these kinds."""
        return (op for op in self.ops if op.action in actions)

    def submitted(self) -> Iterator[Op]:
        """The submissions and asks whose client knows that they are in the log."""
        return (op for op in self.of("submit", "ask") if op.outcome == "ok" and op.task)

    def save(self, file: Path) -> None:
        """Write it as lines of JSON."""
        encode = msgspec.json.encode
        file.write_bytes(b"".join(encode(op) + b"\n" for op in self.ops))


def load(file: Path) -> History:
    """A history that was saved."""
    return History(msgspec.json.decode(line, type=Op) for line in file.read_bytes().splitlines())
