"""Watches what waits for the programs of one supervisor, and asks it for more agents or fewer (`core.scaling`).

It runs in the supervisor's voice, which has a connection. How much waits it asks the server: the consumer that feeds a
program's agents says how many tasks it has not delivered yet, and the stream says since when the next of them waits.
What runs the agents tell with their beats. Agents of other supervisors share the queue; each supervisor scales its own.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dspex.bus import streams
from dspex.bus.client import Client
from dspex.core.errors import ConnectionFailed, LogError
from dspex.core.scaling import Load, Scale, Scaler
from dspex.core.subjects import Subjects

__all__ = ["Autoscale"]

logger = logging.getLogger("dspex.agents")

EVERY = 1.0
"""Seconds between two looks at a program."""
RECENT = 0.2
"""How much the newest look counts in what a task takes."""


@dataclass
class _Watched:
    scaler: Scaler
    running: float = 0.0
    rate: float = 0.0
    done: int | None = None
    looked: float = 0.0


class Autoscale:
    """`ask` gets what the supervisor is to be told; `held` says how many tasks of a program wait in the log process,
    which its queue has no room for."""

    def __init__(
        self, client: Client, subjects: Subjects, ask: Callable[[dict[str, Any]], object], *, queued: bool,
        held: Callable[[str], int] = lambda program: 0,
    ) -> None:  # fmt: skip
        self._client, self._subjects, self._ask, self._held = client, subjects, ask, held
        self._stream = subjects.queue_stream if queued else subjects.stream
        self._queued = queued
        self._fleet: Mapping[str, dict[str, Any]] = {}
        self._watched: dict[str, _Watched] = {}

    def hear(self, fleet: Mapping[str, dict[str, Any]]) -> None:
        """How things stand, as the supervisor says."""
        self._fleet = fleet

    async def work(self) -> None:
        """Look at every program that follows its load, once a second, until cancelled."""
        while True:
            await asyncio.sleep(EVERY)
            for program, stands in list(self._fleet.items()):
                scale = Scale(**stands["scale"])
                if not scale.automatic:
                    self._watched.pop(program, None)
                    continue
                try:
                    await self._look(program, scale, stands)
                except (LogError, ConnectionFailed, TimeoutError) as error:
                    logger.debug("nobody knows how much waits for %s: %s", program, error)

    async def _look(self, program: str, scale: Scale, stands: dict[str, Any]) -> None:
        it = self._watched.get(program)
        if it is None or it.scaler.scale != scale:
            it = self._watched[program] = _Watched(Scaler(scale))
        now = time.monotonic()
        seconds = _seconds(it, stands, now)
        waiting, oldest = await self._waiting(program)
        load = Load(waiting, oldest, stands["running"], max(stands["slots"], 1), seconds)
        if stands["rolling"] or stands["serving"] < stands["agents"]:
            return  # those who are coming will help; what there is now says nothing
        decision = it.scaler.decide(load, stands["agents"], now)
        if decision:
            self._ask({"scale_to": {"program": program, "agents": decision.agents, "why": decision.why}})

    async def _waiting(self, program: str) -> tuple[int, float]:
        """How many tasks wait, and for how many seconds the oldest has."""
        name = streams.consumer_name(program)
        info = await streams.jetstream_api(self._client, f"CONSUMER.INFO.{self._stream}.{name}", timeout=2.0)
        if "error" in info:
            raise LogError(f"there is no consumer {name}")
        waiting = int(info["num_pending"])
        if not waiting:
            return self._held(program), 0.0
        filters = (
            (self._subjects.queue("task", program, "*"),) if self._queued else self._subjects.filters("task", program)
        )
        oldest = 0.0
        for subject in filters:
            wanted = {"seq": int(info["delivered"]["stream_seq"]) + 1, "next_by_subj": subject}
            found = await streams.jetstream_api(self._client, f"STREAM.MSG.GET.{self._stream}", wanted, timeout=2.0)
            if "message" in found:
                stored = datetime.fromisoformat(found["message"]["time"]).timestamp()
                oldest = max(oldest, time.time() - stored)
        return waiting + self._held(program), oldest


def _seconds(it: _Watched, stands: dict[str, Any], now: float) -> float:
    """What a task takes, by Little's law: how many run at once, by how many end in a second. 0 when nobody knows."""
    ended = max(stands["done"] - it.done, 0) if it.done is not None else 0
    if it.done is not None and now > it.looked:
        it.rate += RECENT * (ended / (now - it.looked) - it.rate)
        it.running += RECENT * (stands["running"] - it.running)
    it.done, it.looked = stands["done"], now
    return it.running / it.rate if it.rate > 1e-3 else 0.0
