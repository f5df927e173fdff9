"""A disk that is full, and then is not: a small one of its own, or where that cannot be, a limit on our files."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["WAYS", "Full", "fill", "full_disk"]

WAYS = ["mount", "limit"]
LIMIT = 150_000


class Full:
    """A folder in which little can be written until it is freed."""

    def __init__(self, folder: Path, how: str) -> None:
        self.folder, self._ballast = folder, folder / "ballast"
        if how == "mount":
            self._ballast.write_bytes(bytes(850_000))
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, resource.RLIM_INFINITY))

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextmanager
def full_disk(folder: Path, how: str) -> Iterator[Full]:
    folder = folder / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if how == "mount" and (os.geteuid() or subprocess.run(mount, check=False).returncode):
        pytest.skip("a small disk needs root; the limit on files does without")
    disk = Full(folder, how)
    try:
        yield disk
    finally:
        disk.free()
        if how == "mount":
            subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill a disk up to `leave` bytes; the file that does it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while shutil.disk_usage(disk).free > leave:
                file.write(bytes(min(4096, shutil.disk_usage(disk).free - leave)))
        except OSError:
            pass
    return filler
