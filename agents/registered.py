"""Where the log and a program's tasks are: what an agent learns when it registers, what everybody else finds out."""

from __future__ import annotations

import asyncio

import msgspec
from msgspec import Struct

from dspex.bus import streams
from dspex.bus.client import Client
from dspex.bus.pull import Delivery, Queued
from dspex.core.ports import Connection
from dspex.core.subjects import Subjects
from dspex.store.jetstream import JetStreamLog
from dspex.store.served import ServedLog

__all__ = ["Registered", "log_of", "served_log"]

LOOK = 0.1
"""Seconds between two questions while no log process answers."""


class Registered(Struct, frozen=True, kw_only=True):
    """The registrar's answer. `stream` holds the program's `consumer` of tasks; `served` says that a log process owns
    the log, so that `stream` is its queue. Up to the position `restored` the log came from an archive; `since` is when
    the consumer was made, in seconds since the epoch."""

    epoch: str
    stream: str
    consumer: str
    restored: int = 0
    since: float = 0.0
    served: bool = False

    def log(
        self, connection: Connection, subjects: Subjects, program: str, *, patience: float = 30.0
    ) -> JetStreamLog | ServedLog:
        """The log as an agent of `program` has it, through this connection."""
        if subjects.tenants:
            door, erasable = subjects.rows(program), not self.served
            return ServedLog(connection, subjects, self.epoch, patience=patience, door=door, erasable=erasable)
        kind = ServedLog if self.served else JetStreamLog
        return kind(connection, subjects, self.epoch, patience=patience)

    @property
    def delivery(self) -> type[Delivery]:
        """How a delivered task is read."""
        return Queued if self.served else Delivery


async def served_log(client: Client, subjects: Subjects) -> ServedLog:
    """The log that a log process owns, as soon as that answers."""
    while True:
        reply = await client.request(subjects.log("head"), b"")
        if not reply.status:
            return ServedLog(client, subjects, msgspec.json.decode(reply.data)["epoch"])
        await asyncio.sleep(LOOK)


async def log_of(
    client: Client, subjects: Subjects, *, replicas: int = 1, known: streams.Known | None = None
) -> JetStreamLog | ServedLog:
    """The log of an installation, wherever it is; made in JetStream when there is none. Raises LogError, and LogCorrupt
    when the log that is `known` is gone."""
    if await streams.has_stream(client, subjects.queue_stream):
        return await served_log(client, subjects)
    epoch = await streams.ensure_log(client, subjects, replicas=replicas, known=known)
    return JetStreamLog(client, subjects, epoch)
