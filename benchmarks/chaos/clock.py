"""A wall clock that can be shifted for single processes while they run, where a C compiler is at hand.

The clock of the machine is left alone: others use it, and a time namespace shifts only the monotonic ones.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import subprocess
from pathlib import Path

__all__ = ["HOUR", "Clock"]

HOUR = 3600
PIDS = 1 << 22
TRUE_TIME = -(1 << 63)


class Clock:
    """`environment` is what a process has to be started with, so that `shift` works on it and on all that it forks."""

    def __init__(self, folder: Path) -> None:
        compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), "")
        if not compiler:
            raise FileNotFoundError("to shift a clock takes a C compiler (cc, gcc or clang), and there is none")
        shim, self._file = folder / "clock.so", folder / "clock"
        source = Path(__file__).with_suffix(".c")
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", shim, source, "-ldl"], check=True)
        with self._file.open("wb") as file:
            file.truncate(2 * PIDS * 8)
        self.environment = {"LD_PRELOAD": str(shim), "DSPEX_CHAOS_CLOCK": str(self._file)}
        with self._file.open("r+b") as file:
            self._offsets = mmap.mmap(file.fileno(), 2 * PIDS * 8)

    def shift(self, pid: int, seconds: int) -> None:
        """Let this process believe that it is so many seconds later, from now on."""
        struct.pack_into("q", self._offsets, pid % PIDS * 8, seconds)

    def shift_children(self, pid: int, seconds: int) -> None:
        """The same for all children of a process that have no shift of their own, those to come included."""
        struct.pack_into("q", self._offsets, (PIDS + pid % PIDS) * 8, seconds)

    def keep(self, pid: int) -> None:
        """Let this process have the right time, whatever its parent's other children have."""
        self.shift(pid, TRUE_TIME)

    def close(self) -> None:
        self._offsets.close()


