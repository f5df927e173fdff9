"""What an agent learns when it registers its program: where the log and its tasks are."""

from __future__ import annotations

from msgspec import Struct

from dspex.bus.pull import Delivery, Queued
from dspex.core.ports import Connection
from dspex.core.subjects import Subjects
from dspex.store.jetstream import JetStreamLog
from dspex.store.served import ServedLog

__all__ = ["Registered"]


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
        self, connection: Connection, subjects: Subjects, *, patience: float = 30.0
    ) -> JetStreamLog | ServedLog:
        """The log, through this connection."""
        kind = ServedLog if self.served else JetStreamLog
        return kind(connection, subjects, self.epoch, patience=patience)

    @property
    def delivery(self) -> type[Delivery]:
        """How a delivered task is read."""
        return Queued if self.served else Delivery
