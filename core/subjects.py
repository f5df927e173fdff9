"""Every subject and stream name, built and read in one place.

A subject is `<prefix>.<door>.<program>`; an aggregate `<kind>.<name>.<id>` lives at `<prefix>.event.<aggregate>`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["STORED_DOORS", "Aggregate", "Subjects", "aggregate", "parse_aggregate", "valid_token"]

STORED_DOORS = ("task", "outcome", "signal")
"""The doors whose messages the log keeps; every registered program has the three."""

_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,128}")
_AGGREGATE = re.compile(rf"({_TOKEN.pattern})\.({_TOKEN.pattern})\.({_TOKEN.pattern})")
_PREFIX = re.compile(r"[a-z][a-z0-9_]{0,31}")


class Aggregate(NamedTuple):
    """The three parts of an aggregate's name."""

    kind: str
    name: str
    id: str


def valid_token(text: str) -> bool:
    """Whether `text` may stand as one token of a subject: letters, digits, `_` and `-`, at most 128."""
    return _TOKEN.fullmatch(text) is not None


def aggregate(kind: str, name: str, id: object) -> str:
    """`kind.name.id`. Raises ValueError when a part cannot be a subject token."""
    parts = (kind, name, str(id))
    for part in parts:
        if not valid_token(part):
            raise ValueError(f"{part!r} cannot be part of a subject: letters, digits, _ and -, at most 128")
    return ".".join(parts)


def parse_aggregate(text: str) -> Aggregate:
    """The parts of `kind.name.id`. Raises ValueError when `text` is not one."""
    found = _AGGREGATE.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not an aggregate: kind.name.id, e.g. task.qabot.42")
    return Aggregate(*found.groups())


@dataclass(frozen=True, slots=True)
class Subjects:
    """All names of one installation; `prefix` keeps several apart on one server.

    `tenants` says that the server has access rules, and writes the account of whoever sends behind the program of a
    stored door: `dspex.task.qabot.CLIENT_alice`.
    """

    prefix: str = "dspex"
    tenants: bool = False

    def __post_init__(self) -> None:
        if not _PREFIX.fullmatch(self.prefix):
            raise ValueError(f"prefix {self.prefix!r}: a lower-case letter, then letters, digits or _, at most 32")

    @property
    def stream(self) -> str:
        """The log's stream."""
        return self.prefix.upper()

    @property
    def lease_stream(self) -> str:
        """The stream that holds the newest word on each lease, and nothing else."""
        return f"{self.stream}_LEASE"

    @property
    def timer_stream(self) -> str:
        """The stream of timers and wakes; written by agents only."""
        return f"{self.stream}_TIMER"

    def timers(self, program: str) -> str:
        """The stream of a program's timers and wakes. With access rules each has its own: whoever may write a schedule
        may wipe the stream that holds it."""
        return f"{self.timer_stream}_{program}" if self.tenants else self.timer_stream

    @property
    def queue_stream(self) -> str:
        """The disposable queue that a log process fills."""
        return f"{self.stream}_QUEUE"

    def queue(self, door: str, program: str, position: object) -> str:
        """Where a door message waits for an agent when a log process owns the log; `*` as position is a filter."""
        return f"{self.prefix}.queue.{door}.{program}.{position}"

    def timer(self, program: str, task: str) -> str:
        """Where the one timer of a task stands."""
        return f"{self.prefix}.timer.{program}.{task}"

    def wake(self, program: str) -> str:
        """What wakes sleeping tasks of a program."""
        return f"{self.prefix}.wake.{program}"

    @property
    def events(self) -> str:
        """Everything that happened, as a subject filter."""
        return f"{self.prefix}.event.>"

    def event(self, aggregate: str) -> str:
        return f"{self.prefix}.event.{aggregate}"

    def door(self, door: str, program: str) -> str:
        """`ask`, `submit`, `task`, `result`, `outcome` or `signal` of a program."""
        return f"{self.prefix}.{door}.{program}"

    def doors(self, program: str) -> tuple[str, ...]:
        """The stored doors of a program, as the stream names them."""
        return tuple(subject for door in STORED_DOORS for subject in self.filters(door, program))

    def filters(self, door: str, program: str) -> tuple[str, ...]:
        """What a door's messages are stored under: the door, and behind it any tenant."""
        subject = self.door(door, program)
        return (subject, f"{subject}.*") if self.tenants else (subject,)

    def tenant_of(self, subject: str) -> str:
        """The account that sent a stored door message, as the server says; "" when nobody knows."""
        parts = subject.split(".") if self.tenants else []
        return parts[3] if len(parts) == 4 and parts[1] in STORED_DOORS else ""

    def variables(self, program: str, verb: str) -> str:
        return f"{self.prefix}.variables.{program}.{verb}"

    def breakers(self, program: str, verb: str) -> str:
        """What is done to circuit breakers by hand."""
        return f"{self.prefix}.breakers.{program}.{verb}"

    def dlq(self, program: str, verb: str) -> str:
        """What is to be done about a dead letter: `retry` or `drop`."""
        return f"{self.prefix}.dlq.{program}.{verb}"

    def log(self, verb: str) -> str:
        return f"{self.prefix}.log.{verb}"

    def rows(self, program: str) -> str:
        """What the agents of a program may read of the log, on a system with access rules."""
        return f"{self.prefix}.rows.{program}"

    def archive(self, verb: str) -> str:
        """What the archivist is asked to do with its archive."""
        return f"{self.prefix}.archive.{verb}"

    @property
    def bucket(self) -> str:
        """The NATS object store of large values."""
        return self.prefix

    def bucket_of(self, program: str) -> str:
        """The one that a program uses: its own where there are access rules."""
        return f"{self.bucket}-{program}" if self.tenants else self.bucket

    @property
    def key_stream(self) -> str:
        """The stream of the keys that private values are sealed with; never archived."""
        return f"{self.stream}_KEYS"

    def key_stream_of(self, program: str) -> str:
        """The one that a program uses: its own where there are access rules."""
        return f"{self.key_stream}_{program}" if self.tenants else self.key_stream

    def keys(self, program: str) -> str:
        """Where the keys of that stream stand, as a subject filter."""
        return f"{self.prefix}.key.{program}.*" if self.tenants else f"{self.prefix}.key.>"

    def key(self, name: str) -> str:
        """Where a key stands. With access rules its name begins with the program: `qabot-…`."""
        return f"{self.prefix}.key.{self.owner(name)}.{name}" if self.tenants else f"{self.prefix}.key.{name}"

    def owner(self, name: str) -> str:
        """The program whose a key is, where there are access rules; "" where there are none."""
        return name.partition("-")[0] if self.tenants else ""

    def privacy(self, verb: str) -> str:
        """What is asked about private values: `forget`."""
        return f"{self.prefix}.privacy.{verb}"

    def limits(self, verb: str) -> str:
        """What is asked about limits: `ls`, `set`, `clear`, and by agents `lease.<program>`."""
        return f"{self.prefix}.limits.{verb}"

    def registry(self, verb: str) -> str:
        """How agents make their program known to the registrar."""
        return f"{self.prefix}.registry.{verb}"

    def control(self, agent: str, verb: str) -> str:
        return f"{self.prefix}.control.{agent}.{verb}"

    def lease(self, name: str) -> str:
        return f"{self.prefix}.lease.{name}"

    def aggregate_of(self, subject: str) -> str | None:
        """The aggregate whose commits `subject` carries, or None when it is not an event subject."""
        start = f"{self.prefix}.event."
        return subject[len(start) :] if subject.startswith(start) else None

    def program_of(self, subject: str) -> str:
        """The program that an entry of the log is about; "" for what is not in the log. In a filter, too."""
        parts = subject.split(".")
        if len(parts) == 5 and parts[0] == self.prefix and parts[1] == "event":
            return parts[3]
        door = self.door_of(subject)
        return door[1] if door else ""

    def door_of(self, subject: str) -> tuple[str, str] | None:
        """`(door, program)` of a stored door message, or None. A tenant token behind the program is left out."""
        parts = subject.split(".")
        if len(parts) >= 3 and parts[0] == self.prefix and parts[1] in STORED_DOORS:
            return parts[1], parts[2]
        return None
