"""A data folder: one system at a time, known by a short name, with a note of where it is reached."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import time
from pathlib import Path

from dspex.compose.settings import PLACE, Place
from dspex.core.errors import ConfigurationError
from dspex.core.masking import masked

__all__ = ["Folder"]

logger = logging.getLogger("dspex.compose")

LOG = "log"
"""The file that says what kind of log the folder has."""
PATIENCE = 10.0
"""Seconds that the processes of a system whose root was killed get to end."""
DYING = 0.25
"""Seconds that a process which was just killed takes until it is seen to be dead."""


class Folder:
    """`data` as ours while it is open: a lock that ends with the process, a name that stays."""

    def __init__(self, data: Path) -> None:
        self.path = data.absolute()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(
                f"the data folder {data} cannot be used ({error.strerror}); choose another (--data, in Python data=)"
            ) from None
        try:
            self._take_lock(data)
        except BaseException:
            os.close(self._lock)
            raise
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, str(os.getpid()).encode(), 0)
            self.name = self._own_name()
        except OSError as error:
            raise ConfigurationError(f"the data folder {data} cannot be written ({error.strerror})") from None

    def keep_to(self, log: str) -> None:
        """See that the folder's log is of this kind. Raises ConfigurationError when it has one of another."""
        file = self.path / LOG
        known = file.read_text(errors="replace").strip() if file.exists() else ""
        if not known and (self.path / "server" / "jetstream").is_dir():
            known = "jetstream"  # made before there was a choice
        if known and known != log:
            raise ConfigurationError(
                f"the data folder {self.path} has its log in {known}; start with --log {known} (in Python "
                f"log={known!r}), or choose another folder"
            )
        if not known:
            fresh = file.with_suffix(".new")
            fresh.write_text(log)
            fresh.replace(file)

    def announce(self, url: str, prefix: str) -> None:
        """Note where the system is reached, for the commands; whole or not at all."""
        note = self.path / f"{PLACE}.new"
        note.write_text(Place(nats=masked(url), pid=os.getpid(), prefix=prefix).model_dump_json())
        note.replace(self.path / PLACE)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            (self.path / PLACE).unlink()
        with contextlib.suppress(OSError):
            os.close(self._lock)

    def _take_lock(self, data: Path) -> None:
        """Lock the folder. The children of a system whose root was killed hold it until they end, within seconds."""
        started = time.monotonic()
        said = False
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                holder = os.pread(self._lock, 20, 0).decode("ascii", "replace").strip()
            waited = time.monotonic() - started
            if waited > (DYING if _runs(holder) else PATIENCE):
                raise ConfigurationError(
                    f"another dspex (process {holder or 'unknown'}) uses the data folder {data}; "
                    "stop it, or choose another (--data, in Python data=)"
                ) from None
            if not said and not _runs(holder):
                logger.warning("process %s, which used %s, was killed; waiting for what it left to end", holder, data)
                said = True
            time.sleep(0.05)

    def _own_name(self) -> str:
        """Four hex digits that tell this system's agents from those of others on the same server."""
        file = self.path / "name"
        if file.exists() and re.fullmatch(r"[0-9a-f]{4}", name := file.read_text(errors="replace").strip()):
            return name
        name = secrets.token_hex(2)
        file.write_text(name)
        return name


def _runs(pid: str) -> bool:
    """Whether a process lives; one that is dead and not yet reaped does not."""
    if not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not Path("/proc/self").exists()  # it has just ended, or this is no Linux
