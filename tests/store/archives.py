"""A log and an archive of it for tests, and a process that archives until it is killed."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from dspex.core.ports import Entry
from dspex.store.archive import Archive

EPOCH = "e1"


def entry(position: int, size: int = 120) -> Entry:
    """What stands at a position: always the same."""
    body = f"{position} ".encode() * (size // 6)
    headers = {"Dspex-Key": f"k{position}"} if position % 3 == 0 else {}
    return Entry(
        position=position, time=1_760_000_000 + position / 1000, subject=f"dspex.event.task.qabot.{position}",
        body=body, headers=headers,
    )  # fmt: skip


async def fill(file: Path, count: int, group: int = 50, missing: frozenset[int] = frozenset()) -> None:
    """An archive of `count` positions, of which `missing` are gaps."""
    archive = await Archive.open(file, epoch=EPOCH)
    entries = [entry(position) for position in range(1, count + 1) if position not in missing]
    for start in range(0, len(entries), group):
        await archive.add(entries[start : start + group])
    await archive.close()


async def _for_ever(file: Path) -> None:
    archive = await Archive.open(file, epoch=EPOCH)
    print("open", archive.position, flush=True)  # noqa: T201
    while True:
        await archive.add([entry(archive.position + number) for number in range(1, 40)])


if __name__ == "__main__":
    asyncio.run(_for_ever(Path(sys.argv[1])))
