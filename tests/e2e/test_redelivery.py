"""A consumer that was deleted and made again delivers all that was ever submitted: nothing of it is run again."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.plain import Plain
from tests.e2e.running import Running

SOURCE = """
from pathlib import Path
from dspex import Program, Schema

class Noted(Program):
    class Input(Schema):
        n: int

    class Output(Schema):
        n: int

    async def predict(self, input: Input) -> Output:
        with Path({book!r}).open("a") as file:
            file.write(f"{{input.n}}\\n")
        return self.Output(n=input.n)
"""


async def delivered_all(plain: Plain) -> None:
    """Wait until the consumer of tasks has been made again, and has nothing more to deliver."""
    js = plain.nc.jetstream()
    async with asyncio.timeout(20):
        while True:
            try:
                info = await js.consumer_info("DSPEX", "task-noted")
                if info.num_pending == info.num_ack_pending == 0:
                    return
            except Exception as error:
                assert "not found" in str(error)
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("how", ["deleted", "made again by somebody", "while the agents were dead"])
async def test_what_has_ended_is_not_run_again(systems: Callable[..., Running], tmp_path: Path, how: str) -> None:
    book, app = tmp_path / "book", tmp_path / "noted.py"
    app.write_text(SOURCE.format(book=str(book)))
    system = systems((f"{app}:Noted", 2)).start()
    async with await system.plain() as plain:
        tasks = [await plain.submit("noted", {"n": n}) for n in range(30)]
        await plain.until_ended("noted", tasks)
        agents = list((await system.agents(plain, "noted")).values())
        js = plain.nc.jetstream()
        config = (await js.consumer_info("DSPEX", "task-noted")).config
        if how == "while the agents were dead":
            for pid in agents:
                os.kill(pid, signal.SIGSTOP)
        await js.delete_consumer("DSPEX", "task-noted")
        if how != "deleted":
            await js.add_consumer("DSPEX", config)
        if how == "while the agents were dead":
            for pid in agents:
                os.kill(pid, signal.SIGKILL)
        late = await plain.submit("noted", {"n": 30})
        story = await plain.until_ended("noted", [*tasks, late])
        await delivered_all(plain)
        story = await plain.story(story)
        story.check_once("noted", [*tasks, late])
    assert sorted(map(int, book.read_text().split())) == list(range(31))
