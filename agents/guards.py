"""Which programs are private, as their registrations say."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from dspex.bus.client import Client
from dspex.bus.objects import erase_message
from dspex.core import headers as h
from dspex.core.errors import ConnectionFailed, Unavailable
from dspex.core.ports import Log
from dspex.core.sealing import Guard, guard_of
from dspex.core.subjects import Subjects, valid_token
from dspex.store.jetstream import JetStreamLog
from dspex.store.served import ServedLog

__all__ = ["Guards", "Told", "can_erase", "erase_entry"]

PATIENCE = 5.0
"""Seconds to wait for a registrar."""
CLOSED_FOR = 5.0
"""Seconds after which it is worth trying a closed door again."""
MAX_KNOWN = 1000
"""Programs whose guards are remembered."""


def can_erase(log: Log) -> bool:
    """Whether a message can be taken out of a log. A file with a chain of checksums keeps every row; its process seals
    what is private before it writes it."""
    beneath = getattr(log, "beneath", log)
    return isinstance(beneath, JetStreamLog) or (isinstance(beneath, ServedLog) and beneath.erasable)


async def erase_entry(log: Log, client: Client, subjects: Subjects, position: int) -> None:
    """Take a message out of a log and overwrite its bytes; one that is gone already is fine. Raises LogError."""
    if isinstance(log, ServedLog):
        await log.erase(position)
    else:
        await erase_message(client, subjects.stream, position)


class Told(msgspec.Struct):
    """What the registrar says of a program: which fields are private, whether it takes secrets, and why its doors are
    closed ("" when they are not)."""

    known: bool = False
    input: list[str] = []
    output: list[str] = []
    secret: bool = False
    closed: str = ""

    def guard(self) -> Guard:
        return Guard(frozenset(self.input), frozenset(self.output), self.secret)

    @classmethod
    def of(cls, input_schema: dict[str, Any], output_schema: dict[str, Any]) -> Told:
        guard = guard_of(input_schema, output_schema)
        return cls(True, sorted(guard.input), sorted(guard.output), guard.secret)


class Guards:
    """Asks the registrar, once for each program; `patience` is how many seconds to wait for one."""

    def __init__(self, client: Client, subjects: Subjects, patience: float = PATIENCE) -> None:
        self._client, self._subjects, self._patience = client, subjects, patience
        self._known: dict[str, Guard] = {}

    async def of(self, program: str) -> Guard:
        """What a program guards; nothing when it is not registered. Raises Unavailable when nobody can say."""
        if program not in self._known:
            if not valid_token(program):
                return Guard()
            found = await self._ask(program)
            if found is None:
                return Guard()
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[program] = found
        return self._known[program]

    async def told(self, program: str) -> Told | None:
        """What the registrar says of a program now; None when it does not answer."""
        try:
            reply = await self._client.request(self._subjects.registry(f"guard.{program}"), b"", timeout=2.0)
        except (TimeoutError, ConnectionFailed):
            return None
        if reply.status == 503 or reply.headers.get(h.ERROR_CODE):
            return None
        return msgspec.json.decode(reply.data, type=Told)

    async def _ask(self, program: str) -> Guard | None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._patience
        while (said := await self.told(program)) is None:
            if loop.time() > until:
                what = f"nobody can say now whether {program} has private fields"
                raise Unavailable(f"{what}, so nothing was sent; try again")
            await asyncio.sleep(0.05)
        return said.guard() if said.known else None
