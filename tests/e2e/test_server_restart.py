"""A server that is killed again while it starts again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from tests.e2e.plain import WRONG
from tests.e2e.running import Running


async def test_a_server_killed_while_it_starts_is_started_once_more(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 1)) as system:
        killed, until = [system.server()], time.monotonic() + 20
        os.kill(killed[0], signal.SIGKILL)
        while len(killed) < 3 and time.monotonic() < until:
            try:
                pid = system.server()
            except StopIteration:
                continue
            if pid not in killed:
                killed.append(pid)
                with suppress(ProcessLookupError):  # what was seen of it may be all there was
                    os.kill(pid, signal.SIGKILL)
        assert len(killed) == 3
        async with await system.plain() as plain:
            task = 0
            while not task and time.monotonic() < until:
                try:
                    task = await plain.submit("nap", {"n": 1}, timeout=1)
                except WRONG:
                    await asyncio.sleep(0.1)
            assert (await plain.final("nap", task)).json["n"] == 1
