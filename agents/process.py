"""What every process on the bus does alike: heed signals and the supervisor's line, beat, connect, and end in order."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from dspex.agents.link import Link, beat
from dspex.agents.titles import be_called
from dspex.bus.client import Client
from dspex.core.errors import DspexError

__all__ = ["GRACE", "live", "work_until"]

logger = logging.getLogger("dspex.agents")

GRACE = 8.0
"""Seconds to end in when told to stop."""
ORPHANED = 0.5
"""The same when the supervisor is gone."""
TO_END = 2.0
"""Seconds that cancelled work gets to end."""
SYSTEM = ("registrar-", "archivist-", "log-")
PAUSE = 0.5
"""Seconds before a process that cannot serve ends, so that it does not spin."""


async def live(
    link: Link, name: str, url: str, credentials: str | None, *, stopping: asyncio.Event,
    stop: Callable[[str, float], None], hear: Callable[[list[dict[str, Any]]], None],
    serve: Callable[[Client], Awaitable[int]], speaks: bool = False, load: Callable[[], dict[str, int]] = dict,
) -> int:  # fmt: skip
    """Connect, then `serve` until it returns the exit status.

    `stop` is called with a reason and the seconds that are left when the process should end, and sets `stopping`;
    `hear` is given what the supervisor says. A connection that is closed for good ends the process: its supervisor
    knows how to begin again. `load` is told with every beat. One process of a system `speaks` for all of them when no
    server answers.
    """
    loop = asyncio.get_running_loop()
    be_called(name, "" if name.startswith(SYSTEM) else "agent")

    def heard() -> None:
        hear(link.receive())
        if not link.open:
            loop.remove_reader(link.fileno())
            stop("the supervisor is gone", ORPHANED)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, "told to stop", GRACE)
    loop.add_reader(link.fileno(), heard)
    client = await Client.connect_unless(stopping, url, name=name, credentials=credentials, silent=not speaks)
    if client is None:
        return 0
    client.on_closed.append(lambda: os._exit(1))
    beating = asyncio.create_task(beat(link, load), name="dspex-beat")
    try:
        return await serve(client)
    except DspexError as error:
        logger.error("%s cannot serve: %s", name, error)
        await asyncio.sleep(PAUSE)
        return 1
    finally:
        beating.cancel()
        await client.close()


async def work_until(stopping: asyncio.Event, *work: Coroutine[Any, Any, None]) -> None:
    """Do all of it at once, until `stopping` is set or the first of it ends. Raises what that raised."""
    tasks = [asyncio.create_task(each) for each in work]
    stop = asyncio.create_task(stopping.wait())
    try:
        await asyncio.wait([*tasks, stop], return_when=asyncio.FIRST_COMPLETED)
        ended = [task for task in tasks if task.done()]
    finally:
        for task in (*tasks, stop):
            task.cancel()
        await asyncio.wait([*tasks, stop], timeout=TO_END)
    for task in ended:
        task.result()
