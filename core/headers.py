"""The headers that travel with messages: their names, and how the ones with a meaning are read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime

from dspex.core.errors import InvalidInput

__all__ = [
    "ACTOR", "ASSIGNMENT", "CAUSATION", "CODE", "CORRELATION", "DEADLINE", "ERROR", "ERROR_CODE", "EXPECTED", "FORK",
    "KEY", "KNOWN", "PARENT", "REPLY", "REQUEST_INFO", "RETRY", "RETRY_AFTER", "SEALED", "STUDY", "SUBJECT", "TASK",
    "TIME", "WAIT",
    "deadline_of", "fork_of", "key_of", "ours", "reply_of", "retry_after_of", "sealed", "wait_of",
]  # fmt: skip

ACTOR = "Dspex-Actor"
KEY = "Dspex-Key"
DEADLINE = "Dspex-Deadline"
CORRELATION = "Dspex-Correlation"
CAUSATION = "Dspex-Causation"
PARENT = "Dspex-Parent"
ASSIGNMENT = "Dspex-Assignment"
STUDY = "Dspex-Study"
"""The study that the task is part of: its limits hold for it, too."""
FORK = "Dspex-Fork"
"""`<parent>@<version>`: the task shares what its parent had recorded up to that event."""
RETRY = "Dspex-Retry"
"""The task that this one is a retry of: as a fork of it, it does again what had failed there."""
CODE = "Dspex-Code"
"""The code version that the task must run on."""
TASK = "Dspex-Task"
WAIT = "Dspex-Wait"
REPLY = "Dspex-Reply"
"""Where the answer of an ask goes; an agent adds it when it stores the submission."""

SEALED = "Dspex-Sealed"
"""The name of the key that a stored body is sealed with; such a body is `{"open": {…}, "sealed": "…"}`."""
TIME = "Dspex-Time"
"""On a task in a log process's queue: when the log stored it, in microseconds since the epoch."""
SUBJECT = "Dspex-Subject"
"""Where a submission came in, tenant and all, on what stands for it: in a log process's queue, or with a private input
whose message was erased."""
KNOWN = "Dspex-Known"
"""On a task in a log process's queue: it may have been delivered before."""

RETRY_AFTER = "Dspex-Retry-After"
"""On a refusal that passes: seconds after which it is worth trying again."""

EXPECTED = "Nats-Expected-Last-Subject-Sequence"
REQUEST_INFO = "Nats-Request-Info"
"""Which account a request is from: the server says it of every request from another account."""
ERROR_CODE = "Nats-Service-Error-Code"
ERROR = "Nats-Service-Error"

MAX_KEY = 256
DEFAULT_WAIT = 25.0
MAX_REPLY = 2000
_OURS = re.compile(r"(?i)dspex-|traceparent$|tracestate$|nats-msg-id$")
_INBOX = re.compile(r"(?:_INBOX|_R_)(?:\.[^\s.*>]+)+")


def ours(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that mean something here. A private program's others are not kept: they may hold anything."""
    return {name: value for name, value in headers.items() if _OURS.match(name)}


def sealed(headers: Mapping[str, str]) -> str | None:
    """The name of the key that a stored body is sealed with, however the header is written; None when it is open."""
    if not headers:
        return None
    return next((value for name, value in headers.items() if name.lower() == "dspex-sealed"), None)


def key_of(headers: Mapping[str, str]) -> str | None:
    """The idempotency key, 1 to 256 characters, or None. Raises InvalidInput."""
    key = headers.get(KEY)
    if key is None:
        return None
    if not 1 <= len(key) <= MAX_KEY:
        raise InvalidInput(f"{KEY} has {len(key)} characters; 1 to {MAX_KEY} are allowed")
    return key


def deadline_of(headers: Mapping[str, str], stored_at: float) -> float | None:
    """When the task must be done, in seconds since the epoch, or None.

    The header is either seconds after the message was stored (`2.5`) or an RFC 3339 time (`2026-11-23T10:00:00Z`).
    Raises InvalidInput.
    """
    text = headers.get(DEADLINE)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            when = datetime.fromisoformat(text.replace("Z", "+00:00"))
        except ValueError:
            raise InvalidInput(
                f"{DEADLINE} is {text[:40]!r}; seconds (2.5) or a time (2026-11-23T10:00:00Z) are due"
            ) from None
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    if not 0 <= seconds < 1e9:
        raise InvalidInput(f"{DEADLINE} is {text[:40]!r}; 0 to 1,000,000,000 seconds are allowed")
    return stored_at + seconds


def fork_of(headers: Mapping[str, str]) -> tuple[str, int] | None:
    """The parent of a fork and the version of its last shared event, or None. Raises InvalidInput."""
    text = headers.get(FORK)
    if text is None:
        return None
    parent, _, at = text.partition("@")
    if not (_is_number(parent) and _is_number(at)):
        raise InvalidInput(f"{FORK} is {text[:40]!r}; a task and one of its versions are due: 42@7")
    return parent, int(at)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 19


def reply_of(headers: Mapping[str, str]) -> str:
    """Where the caller waits for the answer; "" when nobody does. Only an inbox counts: a stranger's submission must
    not make us publish anywhere else."""
    reply = headers.get(REPLY, "")
    return reply if len(reply) < MAX_REPLY and _INBOX.fullmatch(reply) else ""


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Seconds after which a refused request is worth trying again; None when the refusal does not say."""
    try:
        seconds = float(headers.get(RETRY_AFTER, ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < 1e9 else None


def wait_of(headers: Mapping[str, str]) -> float:
    """How long a result request may wait, in seconds: 25 unless told, at most 25. Raises InvalidInput."""
    text = headers.get(WAIT)
    if text is None:
        return DEFAULT_WAIT
    try:
        seconds = float(text.removesuffix("s"))
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise InvalidInput(f"{WAIT} is {text[:40]!r}; a number of seconds is due, 25 at most")
    return min(seconds, DEFAULT_WAIT)
