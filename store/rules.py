"""What every log checks before it writes and compares afterwards, whatever it is built on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from dspex.core.codec import decode_commit, encode_commit
from dspex.core.errors import LogError
from dspex.core.events import Event, Head
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects, parse_aggregate

__all__ = [
    "MAX_PAYLOAD",
    "SCAN_BYTES",
    "commit_body",
    "door_size",
    "first_version",
    "head_of",
    "microseconds",
    "refuse_size",
    "subject_filter",
]

MAX_PAYLOAD = 8 * 1024 * 1024
"""The largest entry, headers included; the same as the embedded server's."""

SCAN_BYTES = 32 * 1024 * 1024
"""A scan gives no more than about so many bytes at once, however many entries were asked for."""


def commit_body(aggregate: str, events: Sequence[Event], expected: Head, limit: int) -> bytes:
    """The bytes of a commit that may stand behind `expected`.

    Raises ValueError when the events are none, of another aggregate, or misnumbered; LogError when they are
    too large.
    """
    if not events:
        raise ValueError(f"a commit to {aggregate} needs at least one event")
    version = expected.version
    for event in events:
        version += 1
        if event.version != version or event.aggregate != aggregate:
            parse_aggregate(aggregate)
            raise ValueError(f"{event.id} cannot be version {version} of {aggregate}, whose head is {expected.version}")
    if expected.version == 0:
        parse_aggregate(aggregate)
    body = encode_commit(events)
    if len(body) > limit:
        raise refuse_size(len(body), limit)
    return body


def door_size(subjects: Subjects, subject: str, body: bytes, headers: Mapping[str, str], limit: int) -> None:
    """Raises ValueError when `subject` is no stored door or a header cannot travel; LogError when it is too
    large."""
    if subjects.door_of(subject) is None or not subject.isascii() or any(c in subject for c in " \t\r\n*>"):
        raise ValueError(f"{subject!r} is not a stored door such as {subjects.door('task', 'qabot')}")
    size = len(body)
    if headers:
        size += 12
        for name, value in headers.items():
            if not name or ":" in name or not name.isprintable() or "\r" in value or "\n" in value:
                raise ValueError(f"the header {name!r}: {value!r} cannot travel; no line breaks, no colon in the name")
            size += len(name.encode()) + len(value.encode()) + 4
    if size > limit:
        raise refuse_size(size, limit)


def refuse_size(size: int, limit: int) -> LogError:
    return LogError(f"the message has {size:,} bytes and the log takes {limit:,}; nothing was written")


def head_of(body: bytes, position: int) -> Head:
    """The head of an aggregate whose last commit is `body` at `position`."""
    return Head(decode_commit(body, position)[-1].version, position)


def first_version(entry: Entry) -> int:
    """The version of the first event of a commit."""
    return decode_commit(entry.body, entry.position)[0].version


def microseconds(value: int) -> float:
    """Seconds since the epoch. One rounding for every way an entry is read, so that its time is always the
    same."""
    return value / 1_000_000


def subject_filter(pattern: str) -> Callable[[str], bool]:
    """Whether a subject matches a NATS filter: `*` is one token, a last `>` is one token or more. ValueError
    if none."""
    want = pattern.split(".")
    if not all(want) or any(c.isspace() for c in pattern) or ">" in want[:-1]:
        raise ValueError(f"{pattern!r} is not a subject filter: tokens with dots between, * for one, > for the rest")
    rest = want[-1] == ">"
    if not rest and "*" not in want:
        return pattern.__eq__
    fixed = [(i, token) for i, token in enumerate(want) if token not in ("*", ">")]
    count = len(want)

    def matches(subject: str) -> bool:
        have = subject.split(".")
        if len(have) < count or (len(have) > count and not rest):
            return False
        return all(have[i] == token for i, token in fixed)

    return matches
