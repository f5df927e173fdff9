"""Load goes to who is free, and one program's flood does not starve another. All of it is counted, none of it timed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.running import Running

CROWD = Path(__file__).with_name("crowd.py")
FLOOD, CALM = 20_000, 20


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DSPEX_TEST_PLACE", str(tmp_path))
    return tmp_path


async def test_a_slow_agent_holds_no_task_that_another_could_do(systems: Callable[..., Running], place: Path) -> None:
    with systems((f"{CROWD}:Uneven", 2)) as system:
        async with await system.plain() as plain:
            tasks = [await plain.submit("uneven", {"n": n}) for n in range(100)]
            story = await plain.until(lambda it: len(it.endings("uneven")) >= 98)
            (place / "release").touch()
            first = Counter(output["pid"] for output in story.outputs("uneven").values())
            assert list(first.values()) == [98], "the free one has done all but the two that the slow one can work on"
            story = await plain.until_ended("uneven", tasks)
            story.check_once("uneven", tasks)
            assert sorted(Counter(output["pid"] for output in story.outputs("uneven").values()).values()) == [2, 98]


async def test_what_a_blocked_agent_has_not_begun_is_done_by_another(
    systems: Callable[..., Running], place: Path
) -> None:
    with systems((f"{CROWD}:Blocking", 2)) as system:
        async with await system.plain() as plain:
            blocked = await plain.submit("blocking", {"do": "block"})
            tasks = [await plain.submit("blocking", {"n": n}) for n in range(100)]
            story = await plain.until_ended("blocking", tasks)
            assert blocked not in story.endings("blocking")
            assert len({output["pid"] for output in story.outputs("blocking").values()}) == 1
            (place / "release").touch()
            (await plain.until_ended("blocking", [blocked, *tasks])).check_once("blocking", [blocked, *tasks])


@pytest.mark.parametrize("log", ["jetstream", "sqlite"])
async def test_a_flood_of_one_program_does_not_starve_another(
    systems: Callable[..., Running], place: Path, log: str
) -> None:
    with systems((f"{CROWD}:Flood", 1), (f"{CROWD}:Calm", 1), log=log) as system:
        async with await system.plain() as plain:
            for start in range(0, FLOOD, 1000):  # of a thousand one is waited for: more would not be taken
                for n in range(start, start + 999):
                    await plain.nc.publish("dspex.task.flood", b'{"n": %d}' % n)
                await plain.submit("flood", {"n": start})
            tasks = [await plain.submit("calm", {"n": n}) for n in range(CALM)]
            asked = [await plain.ask("calm", {"n": n}) for n in range(CALM)]
            assert [reply.json["n"] for reply in asked] == list(range(CALM))
            for n, task in enumerate(tasks):
                assert (await plain.final("calm", task)).json["n"] == n
            story = await plain.story()
            left = len(story.submitted("flood")) - len(story.endings("flood"))
            assert left > 5000, f"{left} tasks of the flood are left, so nobody knows whether it would have starved"
            page = await plain.read(program="calm", limit=1000)  # the log's reader answers as well
            ended = [event for event in page["events"] if event["type"] == "TaskCompleted"]
            assert len(ended) == 2 * CALM, json.dumps(page)[:300]
