"""Never two of one identity: a lock that a process holds as long as it lives, whatever becomes of its supervisor.

It is a POSIX record lock: it belongs to the process, is not inherited by what the process forks, ends with it and not
before (a stopped process keeps it), and the kernel says who holds it. So a new supervisor can wait for a process that
its predecessor left behind, and can end exactly that one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["end_holder", "holder_of", "take_identity"]

_FLOCK = "hhqqi4x"
"""`struct flock` of 64-bit Linux: type, whence, start, length, pid."""
_held: list[int] = []
"""The descriptors of our own locks: closing one would give the lock up."""


def take_identity(file: Path) -> bool:
    """Lock the identity for as long as this process lives; False when another process has it. On a full disk, or one
    that knows no locks, it is better to serve without."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return True
    _held.append(descriptor)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def holder_of(file: Path) -> int:
    """The process that has the identity; 0 when nobody has it, -1 when the kernel does not say who."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        if sys.platform != "linux":
            return _locked_by_somebody(descriptor)
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    except OSError:
        return 0
    finally:
        os.close(descriptor)
    return 0 if kind == fcntl.F_UNLCK else pid if pid > 0 else -1


def _locked_by_somebody(descriptor: int) -> int:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # given back when the descriptor is closed
    except OSError:
        return -1
    return 0


def end_holder(file: Path) -> None:
    """Kill the process that has the identity, and never another one that got its number meanwhile."""
    pid = holder_of(file)
    if pid <= 0 or sys.platform != "linux":
        return
    with suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            if holder_of(file) == pid:  # so the handle is of the process that we mean
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        finally:
            os.close(handle)
