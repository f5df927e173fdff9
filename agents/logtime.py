"""What time it is by the log's clock, which is the one that times in the log are compared with.

The clock of an agent's machine may be wrong, or be set while it runs. So an agent goes by its monotonic clock from its
start, corrected by what it knows of the log's: an entry that it wrote itself was stored between sending and hearing of
it, and whatever is delivered was stored before. A clock that is right stays as it is.
"""

from __future__ import annotations

import time

__all__ = ["at_least", "begin", "between", "now"]

_offset: float | None = None
"""Seconds from the monotonic clock to the log's; None in a process that goes by its own wall clock."""


def now() -> float:
    """Seconds since the epoch, by the log's clock as far as this process knows it."""
    return time.time() if _offset is None else time.monotonic() + _offset


def begin() -> None:
    """Go by the monotonic clock from now on, beginning with what the wall clock says."""
    global _offset  # a process has one clock
    _offset = time.time() - time.monotonic()


def at_least(stored: float) -> None:
    """The log stored something at this time, by its own clock, before now."""
    global _offset
    if _offset is not None:
        _offset = max(_offset, stored - time.monotonic())


def between(stored: float, began: float, ended: float) -> None:
    """The log stored something at this time, between two readings of our monotonic clock."""
    global _offset
    if _offset is not None:
        _offset = min(max(_offset, stored - ended), stored - began)
