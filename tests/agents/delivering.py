"""Agents without a server: deliveries as a consumer would make them, a log that takes its time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from dspex import Program
from dspex.agents.registered import Registered
from dspex.agents.vault import Vault
from dspex.agents.worker import Worker
from dspex.bus.identity import Identity
from dspex.bus.pull import Delivery
from dspex.bus.wire import Message
from dspex.core.events import Event, Head
from dspex.core.ports import Appended, Conflict, Entry
from dspex.core.sealing import Guard
from dspex.core.subjects import Subjects
from dspex.store.aside import MemoryKeys, MemoryObjects
from dspex.store.memory import MemoryLog


class SlowLog(MemoryLog):
    """A log that takes some turns of the loop to answer, and to be reached."""

    def __init__(self, turns: Sequence[int]) -> None:
        super().__init__()
        self._turns, self._asked = list(turns) or [0], 0

    async def _wait(self) -> None:
        self._asked += 1
        for _ in range(self._turns[self._asked % len(self._turns)]):
            await asyncio.sleep(0)

    async def append(self, aggregate: str, events: Sequence[Event], expected: Head) -> Appended | Conflict:
        await self._wait()
        result = await super().append(aggregate, events, expected)
        await self._wait()
        return result

    async def read(self, aggregate: str) -> list[Entry]:
        await self._wait()
        return await super().read(aggregate)

    def known(self, aggregate: str) -> list[Entry]:
        return list(self._of.get(f"dspex.event.{aggregate}", ()))


class Client:
    """Keeps what an agent says: its words to the consumer, and its requests, which are all granted."""

    max_payload = 1 << 20
    identity = Identity()

    def __init__(self) -> None:
        self.said: list[bytes] = []
        self.requests: list[tuple[str, dict[str, str]]] = []

    def acknowledge(self, message: Message, word: bytes) -> None:
        self.said.append(word)

    async def request(self, subject: str, body: bytes, headers: dict[str, str] | None = None) -> Message:
        self.requests.append((subject, headers or {}))
        return Message(b"", b"", b'{"stream": "S", "seq": 1}', None)


def nothing_private() -> tuple[Vault, Guard]:
    """For programs without secrets."""
    return Vault(MemoryKeys(), MemoryObjects()), Guard()


class Slots:
    since = 0.0

    def release(self) -> None:
        pass


def agent(program: Program, log: SlowLog, name: str = "one") -> Worker:
    client: Any = Client()
    place = Registered(epoch=log.epoch, stream="DSPEX", consumer=f"task-{program.name}")
    return Worker(
        program, agent=name, code="", client=client, log=log, subjects=Subjects(), on_worn=lambda why: None, place=place
    )


def deliver(worker: Worker, position: int, body: bytes, times: int) -> None:
    """Deliver a task for the `times`-th time."""
    slots: Any = Slots()
    subject = f"dspex.task.{worker.name}".encode()
    reply = b"$JS.ACK.DSPEX.task-x.%d.%d.1.1700000000000000000.0" % (times, position)
    worker.take(Delivery(Message(subject, reply, body, None)), slots)


async def idle(*workers: Worker) -> None:
    async with asyncio.timeout(20):
        while any(worker.running for worker in workers):
            await asyncio.sleep(0)
