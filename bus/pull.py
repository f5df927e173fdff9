"""Overlapping pulls from a durable consumer, never more than there are free slots to work in."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Protocol

from dspex.bus.client import Client, Message
from dspex.core.errors import ConnectionFailed
from dspex.core.headers import KNOWN, SUBJECT, TASK, TIME
from dspex.core.ports import Subscription

__all__ = ["Delivery", "Gate", "Puller", "Queued", "Slots"]

logger = logging.getLogger("dspex.bus")

EXPIRES = 20.0
RETRY = 0.25
SKEW = 1.0
"""Seconds that the server's clock may be ahead of ours."""
ACK, IN_PROGRESS, NAK, NEVER = b"+ACK", b"+WPI", b"-NAK", b"+TERM"


class Delivery:
    """A task message as a consumer delivered it. `position` is where it stands in the stream, `stored_at` when it
    got there (seconds since the epoch), `delivered` how often it has been delivered. `sequence` counts all deliveries
    of the consumer, and `pending` is how many messages wait behind this one."""

    __slots__ = ("_time", "delivered", "message", "pending", "position", "sequence")

    wake = 0
    """Of a task that was woken: the position of its wake."""

    def __init__(self, message: Message) -> None:
        # $JS.ACK.<stream>.<consumer>.<delivered>.<position>.<consumer seq>.<time>.<pending>, newer: 2 tokens more
        tokens = message.raw_reply.split(b".")
        start = 4 if len(tokens) == 9 else 6
        self.message = message
        self.delivered = int(tokens[start])
        self.position = int(tokens[start + 1])
        self.sequence = int(tokens[start + 2])
        self._time = tokens[start + 3]
        self.pending = int(tokens[start + 4])

    @property
    def stored_at(self) -> float:
        return int(self._time) // 1000 / 1e6  # as an entry of the log says it

    @property
    def subject(self) -> str:
        """Where it stands in the log, with its tenant."""
        return self.message.subject


class Queued(Delivery):
    """A task message from a log process's queue: where and when the log has it stands in its headers."""

    __slots__ = ()

    def __init__(self, message: Message) -> None:
        super().__init__(message)
        headers = message.headers
        self.position = int(headers[TASK])
        self.delivered += KNOWN in headers
        self._time = headers[TIME].encode()

    @property
    def stored_at(self) -> float:
        return int(self._time) / 1e6

    @property
    def subject(self) -> str:
        return self.message.headers.get(SUBJECT, "")


class Gate(Protocol):
    """What may be delivered now beyond what there are slots for."""

    @property
    def room(self) -> int:
        """How many deliveries may come."""

    def take(self) -> bool:
        """One came; False when it came too late, and is handed back."""

    def released(self) -> None:
        """One is done with."""


class Slots(Protocol):
    """Room for tasks."""

    @property
    def since(self) -> float:
        """What was stored before this time may have been delivered by somebody else before."""

    def release(self) -> None:
        """One delivery is done with."""


class Puller:
    """Keeps a consumer's deliveries coming, up to `slots` at a time; `release` gives a slot back.

    What was asked for and not yet delivered counts as taken, so an agent never holds more than it can work on.
    """

    def __init__(
        self, client: Client, stream: str, consumer: str, slots: int, handler: Callable[[Delivery], None],
        kind: type[Delivery] = Delivery,
    ) -> None:  # fmt: skip
        self._client, self._slots, self._handler, self._kind = client, slots, handler, kind
        self._subject = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._held = 0
        self._asked = 0
        self._horizon = 0.0
        self._running = self._begun = self._paused = False
        self.since = 0.0
        """What was stored before this time (seconds since the epoch) may have been delivered by a consumer that was
        deleted and made again: that it comes for the first time says nothing."""
        self.on_missing: Callable[[], None] | None = None
        """Called when nobody answers a pull: the consumer is gone, or its leader is for a moment."""
        self._retry: asyncio.TimerHandle | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.gate: Gate | None = None
        """Bounds what is asked for; None: nothing but the slots does."""
        self._newest = b""

    @property
    def held(self) -> int:
        return self._held

    @property
    def hungry(self) -> bool:
        """Whether we have asked for something that has not come."""
        return self._asked > 0

    @property
    def pending(self) -> int:
        """How many waited behind the newest delivery, when that came."""
        tokens = self._newest.split(b".")
        return int(tokens[8 if len(tokens) == 9 else 10]) if len(tokens) >= 9 else 0

    def nudge(self) -> None:
        """The gate has changed: ask for more, or take back what was asked for."""
        if not self._running or self._paused:
            return
        if self.gate is not None and self._asked > max(self.gate.room, 0):
            self._renew()
        else:
            self._ask()

    def start(self) -> None:
        self._running = True
        self._client.on_reconnect.append(self._begin)
        self._keeper = asyncio.create_task(self._keep(), name="dspex-pull-keeper")
        self._begin()

    def stop(self) -> None:
        """Ask for no more. What the server has sent and we have not read is delivered again, to somebody else."""
        if self._running:
            self._running = False
            self._client.on_reconnect.remove(self._begin)
            if self._keeper:
                self._keeper.cancel()
            if self._subscription:
                self._subscription.close()

    def pause(self) -> None:
        """Ask for no more until `resume`. What is under way already is delivered again, here or elsewhere."""
        self._paused = True
        if self._subscription:
            self._subscription.close()
            self._subscription = None
        self._asked = 0

    def resume(self) -> None:
        """Go on after `pause`."""
        self._paused = False
        if self._running:
            self._begin()

    def release(self) -> None:
        """One delivery is done with."""
        self._held -= 1
        if self.gate is not None:
            self.gate.released()
        if self._running:
            self._ask()

    def _begin(self) -> None:
        """Begin anew, when whatever was before may be lost."""
        if self._paused:
            return
        if self._begun:
            self.since = time.time() + SKEW
        self._begun = True
        self._renew()

    def _renew(self) -> None:
        """Go on with another inbox: pulls made through the old one can deliver nothing any more."""
        if self._subscription:
            self._subscription.close()
        self._asked = 0
        self._inbox = self._client.inbox()
        try:
            self._subscription = self._client.subscribe(self._inbox, self._take)
        except ConnectionFailed as error:
            logger.debug("no pulls for a moment: %s", error)
            self._subscription = None
            self._later()
            return
        self._ask()

    def _ask(self) -> None:
        free = self._slots - self._held - self._asked
        if self.gate is not None:
            free = min(free, self.gate.room - self._asked)
        if free <= 0 or (self._asked and free < max(1, self._slots // 4)) or self._subscription is None:
            return
        self._asked += free
        self._horizon = asyncio.get_running_loop().time() + EXPIRES + 5
        body = b'{"batch":%d,"expires":%d}' % (free, EXPIRES * 1e9)
        try:
            self._client.publish(self._subject, body, reply=self._inbox)
        except ConnectionFailed as error:  # closed, or too far behind; whoever gives a slot back must not fail by it
            self._asked -= free
            logger.debug("no pull: %s", error)

    def _take(self, message: Message) -> None:
        if not message.raw_reply.startswith(b"$JS.ACK."):
            self._status(message)
            return
        self._asked = max(0, self._asked - 1)
        try:
            delivery = self._kind(message)
        except (KeyError, ValueError):
            logger.warning("a message on %s is none of ours; it is thrown away", message.subject)
            self._client.acknowledge(message, NEVER)
            return
        self._newest = message.raw_reply
        if self.gate is not None and not self.gate.take():
            self._client.acknowledge(message, NAK)
            return
        self._held += 1
        try:
            self._handler(delivery)
        except Exception:
            logger.exception("a delivery could not be taken; it will come again")
            self._held -= 1
        if not self._asked and self._running:
            self._ask()

    def _status(self, message: Message) -> None:
        """A pull ended early: it expired, the server shuts down, the leader moved, the consumer is gone."""
        status = message.status
        if status == 100 or not self._running:
            return
        left = message.headers.get("Nats-Pending-Messages", "")
        if status in (404, 408) and left.isdecimal():
            self._asked = max(0, self._asked - int(left))
            self._ask()
            return
        logger.debug("a pull ended with %d", status)
        if status == 503 and self.on_missing:
            self.on_missing()
        self._later()

    def _later(self) -> None:
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(RETRY, self._again)

    def _again(self) -> None:
        self._retry = None
        if self._running:
            self._begin()

    async def _keep(self) -> None:
        """Begin anew when pulls were made and not even their end has been heard of."""
        while True:
            await asyncio.sleep(1.0)
            if self._asked and asyncio.get_running_loop().time() > self._horizon:
                self._begin()
            self._ask()
