"""A disk that fills under a running system: refused or delayed, never half, and it goes on by itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

from tests.e2e.plain import WRONG, Plain, Story
from tests.e2e.running import Running
from tests.store.disks import fill

from dspex.store.verify import verify

SIZE = 40 << 20
FREE = 4 << 20
"""What is left of it before the tasks come."""


async def submit_until_full(plain: Plain) -> dict[int, str]:
    """Submit until the log takes nothing more; what it has acknowledged."""
    taken: dict[int, str] = {}
    for number in range(2000):
        text = f"{number} " + "x" * 20_000
        try:
            taken[await plain.submit("work", {"text": text}, timeout=1.0)] = text
        except WRONG:
            break
    assert number < 1999, "the disk did not fill"
    return taken


async def test_a_full_disk_delays_and_it_goes_on_by_itself(
    small_disk: Callable[[int], Path], systems: Callable[..., Running]
) -> None:
    disk = small_disk(SIZE)
    # Without doors that close before: a disk may fill by what others write, faster than anybody looks.
    marks = {"room": 0, "high_water": 1.0, "low_water": 0.99}
    system = systems(("Work", 2), folder=f"{disk.name}/data", marks=marks).start()
    async with await system.plain() as plain:
        ended = [await plain.submit("work", {"text": "before"}) for _ in range(20)]
        await plain.until_ended("work", ended)
        filler = fill(disk, leave=FREE)
        taken = await submit_until_full(plain)
        said = await asyncio.to_thread(system.event, "trouble")
        assert "Make room on the disk of" in said["reason"] and "no space left" in said["reason"]
        for task in ended:  # what was there can be read meanwhile
            assert (await plain.result("work", task)).json["text"]
        during = 0
        for _ in range(3):
            try:
                await plain.submit("work", {"text": "during"}, timeout=0.3)
                during += 1
            except WRONG:
                pass
        assert not during, "a disk without room took a task"
        filler.unlink()
        seen = len(system.events)
        await asyncio.to_thread(system.event, "better")
        late = await _submitted(plain)
        story = await plain.until_ended("work", [*ended, *taken, late])
        _whole(story, [*ended, *taken, late])
        outputs = story.outputs("work")
        assert {task: outputs[task]["text"] for task in taken} == taken
        assert not [e for e in system.events[seen:] if e["event"] == "crashed"]
    assert system.stop() == 0
    report = verify(system.data / "archive.db")
    assert (report.ok, report.gaps) == (True, [])


async def _submitted(plain: Plain) -> int:
    async with asyncio.timeout(30):
        while True:
            try:
                return await plain.submit("work", {"text": "after"}, timeout=1.0)
            except WRONG:
                await asyncio.sleep(0.1)


def _whole(story: Story, acknowledged: list[int]) -> None:
    story.check_once("work", acknowledged)
    for entry in story.entries:
        json.loads(entry.body)  # no half of anything
    assert {types[0] for types in story.endings("work").values()} == {"TaskCompleted"}
