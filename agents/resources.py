"""What an agent may use of its machine, kept without any rights: a limit of the kernel's on what it allocates, a watch
over what it holds, and a choice of processors.

A limit on address space says nothing about memory that is used, and there is no kernel limit on resident memory
outside a control group. So the watch (`agents.watch`, five times a second) ends an agent that holds more than its
`memory`, and `RLIMIT_DATA` (private writable memory) makes one huge allocation fail with MemoryError before that: the
task fails, and the agent goes on. An agent never holds more than its `memory`, what it was born with, and `SLACK`.
"""

from __future__ import annotations

import math
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

from dspex.core.upkeep import Upkeep

__all__ = ["SLACK", "confine", "in_force", "resident", "spoken"]

SLACK = 256 << 20
"""Bytes that an agent may allocate beyond its `memory`: threads reserve 8 MiB each for a stack that they hardly use."""


def resident() -> int:
    """Bytes of memory that this process holds now (elsewhere than on Linux: the most it has held)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024


def confine(upkeep: Upkeep, number: int) -> None:
    """Keep this process to what it may use. `number` tells equal agents apart, so that they do not share processors."""
    if upkeep.memory and sys.platform == "linux":
        most = _allocated() + upkeep.memory + SLACK
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        with suppress(ValueError, OSError):
            soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    if upkeep.cpu and hasattr(os, "sched_setaffinity"):
        have = sorted(os.sched_getaffinity(0))
        count = min(math.ceil(upkeep.cpu), len(have))
        os.sched_setaffinity(0, {have[(number * count + i) % len(have)] for i in range(count)})


def in_force(upkeep: Upkeep) -> str:
    """In words what keeps an agent to its limits; "" when it has none."""
    words = []
    if upkeep.memory:
        words.append(f"memory {spoken(upkeep.memory)} by a watch and RLIMIT_DATA")
    if upkeep.cpu:
        have = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        words.append(f"cpu {upkeep.cpu:g} by {min(math.ceil(upkeep.cpu), have)} of {have} processors")
    return ", ".join(words)


def spoken(size: int) -> str:
    """Bytes in words: `512MiB`."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.4g}{name}"
    return f"{size}B"


def _allocated() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) * 1024
    return 0
