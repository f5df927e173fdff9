"""Sleeping tasks whose timers are gone are found in the archive's views, and woken."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from tests.e2e import lasting
from tests.e2e.running import Running
from tests.e2e.test_archivist import SUBJECTS, archived, log_of
from tests.e2e.test_durable import asleep

from dspex.agents.overdue import Overdue
from dspex.agents.pace import Pace
from dspex.agents.projecting import Projecting
from dspex.bus.streams import jetstream_api
from dspex.compose.caller import Caller
from dspex.store.archive import Archive

APP = f"{lasting.__file__}:Waits"


async def test_who_sleeps_past_his_time_is_woken(systems: Callable[..., Running], tmp_path: Path) -> None:
    book = tmp_path / "book"
    book.touch()
    made = {"book": str(book), "do": "sleep"}
    system = systems((APP, 1)).start()
    async with await system.plain() as plain, await Caller.connect(system.url) as caller:
        tasks = [await plain.submit("waits", made | {"task": f"t{n}", "seconds": 3}) for n in range(5)]
        later = await plain.submit("waits", made | {"task": "later", "seconds": 3600})
        await asleep(plain, "waits", *tasks, later)
        await jetstream_api(caller.client, f"STREAM.PURGE.{SUBJECTS.timer_stream}")
        log = await log_of(caller)
        await archived(caller, log)
        archive = await Archive.open(system.data / "archive.db", readonly=True)
        projecting = Projecting(tmp_path / "views.db", SUBJECTS, Pace())
        going = asyncio.create_task(projecting.go_on(archive))
        try:
            overdue = Overdue(projecting, caller.client, log, SUBJECTS, "/test")
            woken = 0
            async with asyncio.timeout(20):
                while woken < 5:
                    woken += await overdue.once(late=0.5)
                    await asyncio.sleep(0.1)
            story = await plain.until_ended("waits", tasks)
            assert later not in story.endings("waits")
            head = await log.head()
            await archived(caller, log)
            async with asyncio.timeout(20):  # the views know it, too, and then nobody is woken again
                while projecting.position < head:
                    await asyncio.sleep(0.1)
            assert await overdue.once(late=0.5) == 0
        finally:
            going.cancel()
            await asyncio.gather(going, return_exceptions=True)
            await archive.close()
