"""The standing of a log, kept beside it between the lives of its process."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from pathlib import Path

import msgspec

from dspex.core.ports import Log
from dspex.core.standing import Checkpoint, Standing
from dspex.core.subjects import Subjects

__all__ = ["EVERY", "Keeping"]

logger = logging.getLogger("dspex.agents")

EVERY = 10.0
"""Seconds between checkpoints: what came since is read again at the next start."""
ENOUGH = 1000
"""Rows below which a checkpoint is not worth it."""


class Keeping:
    """Recalls the standing of `log` from the checkpoint `file` and the rows behind it, and writes the next ones."""

    def __init__(self, log: Log, subjects: Subjects, file: Path) -> None:
        self._log, self._file = log, file
        self.standing = Standing(subjects)
        self._kept = 0

    async def recall(self) -> None:
        """Bring the standing to where the log is. Raises LogError."""
        kept, head = await asyncio.to_thread(self._read), await self._log.head()
        if kept is not None and kept.epoch == self._log.epoch and kept.position <= head:
            self.standing.resume(kept)
        self._kept = self.standing.position
        while entries := await self._log.scan(self.standing.position):
            for entry in entries:
                self.standing.row(entry.position, entry.subject, entry.body)
        if self.standing.position != self._kept or kept is None:
            await self.keep()

    async def work(self) -> None:
        """Keep it every few seconds, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            if self.standing.position - self._kept >= ENOUGH:
                await self.keep()

    async def keep(self) -> None:
        """Write a checkpoint. That it cannot be written costs the next start some time, and nothing else."""
        checkpoint = self.standing.checkpoint(self._log.epoch)
        self._kept = checkpoint.position
        await asyncio.to_thread(self._write, checkpoint)

    def _read(self) -> Checkpoint | None:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=Checkpoint)
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return None

    def _write(self, checkpoint: Checkpoint) -> None:
        fresh = self._file.with_name(f"{self._file.name}.new")
        with suppress(OSError):
            fresh.write_bytes(msgspec.json.encode(checkpoint))
            fresh.replace(self._file)
