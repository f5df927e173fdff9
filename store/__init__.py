"""Where the log lives: in memory, in a SQLite file, or in JetStream.

All three satisfy the `Log` port of `dspex.core.ports` and pass the same suite
(`store/contract.py`), so nothing above this room knows which one it has. A store never decides:
it appends what it is given if the aggregate still stands where the writer thought, says Appended or Conflict,
and gives back what it holds, in order and without gaps. Names are loaded when they are asked for: importing
this room imports no driver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dspex.store.archive import Archive
    from dspex.store.jetstream import JetStreamLog
    from dspex.store.memory import MemoryLog
    from dspex.store.sqlite import SqliteLog

__all__ = ["Archive", "JetStreamLog", "MemoryLog", "SqliteLog"]

_HOME = {"Archive": "archive", "JetStreamLog": "jetstream", "MemoryLog": "memory", "SqliteLog": "sqlite"}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
