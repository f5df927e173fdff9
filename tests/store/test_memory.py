"""The log in memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator

import pytest

from dspex.core.ports import Log
from dspex.core.subjects import Subjects
from dspex.store import MemoryLog
from dspex.store.contract import LogContract


class Memory:
    """A log in memory lives as long as its object: reopening gives the same one, closed or not."""

    def __init__(self) -> None:
        self.subjects = Subjects()
        self._kept = MemoryLog(self.subjects)

    async def open(self) -> Log:
        self._kept = self._kept.reopened()
        return self._kept

    async def another(self) -> Log:
        return MemoryLog(self.subjects)

    async def close(self) -> None:
        await self._kept.close()


class TestMemoryLog(LogContract):
    @pytest.fixture
    async def place(self) -> AsyncIterator[Memory]:
        place = Memory()
        yield place
        await place.close()


def test_importing_the_room_imports_no_driver() -> None:
    code = "import sys, dspex.store; print([m for m in ('aiosqlite', 'sqlite3', 'nats') if m in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"
