"""The logs that a log process can own, by name: `sqlite`, and what other distributions add.

A distribution adds one with an entry point in the group `dspex.logs`: its name is what `--log` takes, its object a
`Factory`. See docs/backends.md.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Literal, Protocol

from dspex.core.errors import ConfigurationError, DspexError, LogError
from dspex.core.ports import Backend
from dspex.core.subjects import Subjects

__all__ = ["GROUP", "JETSTREAM", "LOG_FILE", "SQLITE", "Factory", "backend_names", "factory_of", "open_sqlite"]

GROUP = "dspex.logs"
JETSTREAM = "jetstream"
"""The log that needs no process: the server has it."""
SQLITE, LOG_FILE = "sqlite", "log.db"
"""Ours, and its file in the data folder: an archive's."""


class Factory(Protocol):
    """What an entry point names."""

    async def __call__(
        self, folder: Path, *, subjects: Subjects, durability: Literal["power", "process"], max_payload: int
    ) -> Backend:
        """Open the log in the data folder `folder`, made anew when none is there; this process alone owns it.

        "power" is durable through a loss of power, "process" through any crash of a process. No row is larger than
        `max_payload` bytes. Raises LogError when it cannot be opened.
        """


async def open_sqlite(
    folder: Path, *, subjects: Subjects, durability: Literal["power", "process"], max_payload: int
) -> Backend:
    """The log in `log.db`."""
    from dspex.store.sqlite import SqliteLog

    return await SqliteLog.open(
        folder / LOG_FILE, subjects=subjects, durability=durability, max_payload=max_payload
    )


_OURS: dict[str, Factory] = {SQLITE: open_sqlite}


def backend_names() -> list[str]:
    """What `--log` takes on this machine."""
    return [JETSTREAM, *_OURS, *sorted(set(_theirs()) - {JETSTREAM, *_OURS})]


def factory_of(name: str) -> Factory:
    """What opens the log of a name. Raises ConfigurationError when there is none, LogError when it cannot be loaded."""
    if name in _OURS:
        return _OURS[name]
    found = _theirs().get(name)
    if found is None:
        raise ConfigurationError(
            f"there is no log {name[:40]!r} here; there are {', '.join(backend_names())}, and whatever a distribution "
            f"adds under the entry point {GROUP}"
        )
    try:
        factory: Factory = found.load()
    except DspexError:
        raise
    except Exception as error:
        raise LogError(f"the log {name} ({found.value}) cannot be loaded: {error}") from error
    return factory


def _theirs() -> dict[str, EntryPoint]:
    return {found.name: found for found in entry_points(group=GROUP)}
