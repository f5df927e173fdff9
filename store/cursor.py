"""A place in a stream from which entries come in order: an ephemeral pull consumer that notices every loss.

The consumer numbers what it delivers. A number that is not the next one, a consumer that is gone or a silence
where heartbeats are due means that something was lost, and reading starts again behind the last entry that
was given out. A consumer, not a direct get: subject, position and time come from the protocol and not from
headers, which a message's sender can forge.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from contextlib import suppress

import msgspec

from dspex.core.errors import LogError
from dspex.core.headers import EXPECTED
from dspex.core.ports import Entry, Message, Subscription
from dspex.store.api import Answer, Api
from dspex.store.rules import SCAN_BYTES, microseconds

__all__ = ["Cursor"]

_AHEAD = 1000
"""How many entries are asked for ahead of their use, at most."""

_HEARTBEAT = 1.0
_SILENCE = 2.5
_PULL_EXPIRES = 30.0
_NANO = 1_000_000_000


class _Created(Answer):
    num_pending: int = 0


_decode_created = msgspec.json.Decoder(_Created).decode


class Cursor:
    """Entries of a stream behind `after`, in order, without gaps, each once. `position` is the last one given
    out."""

    def __init__(self, api: Api, after: int, subject: str | None, inbox: str) -> None:
        self._api, self._subject, self._inbox = api, subject, inbox
        self.position = max(after, 0)
        self._consumer = self._reply = ""
        self._subscription: Subscription | None = None
        self._ready: deque[Entry] = deque()
        self._delivered = self._asked = self._pending = 0
        self._lost = False
        self._silent = 0.0
        self._stirred = asyncio.Event()

    async def take(self, limit: int) -> list[Entry]:
        """The next entries, at least one if any comes before the next heartbeat, else an empty list.

        Raises LogError when the log cannot be reached.
        """
        if not self._ready:
            if self._lost or not self._consumer:
                await self.open()
            self._pull(limit)
            self._stirred.clear()
            try:
                async with asyncio.timeout(_SILENCE):
                    await self._stirred.wait()
            except TimeoutError:
                self._lost = True
                self._silent += _SILENCE
                if self._silent > self._api.patience:
                    raise LogError(
                        f"the log {self._api.stream} sent its reader nothing for {self._silent:.0f} s"
                    ) from None
        taken: list[Entry] = []
        while self._ready and len(taken) < limit:
            taken.append(self._ready.popleft())
        if taken:
            self.position = taken[-1].position
        return taken

    def wake(self) -> None:
        """Make a waiting `take` return."""
        self._stirred.set()

    def close(self) -> None:
        """Give the consumer back to the server."""
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None
        if self._consumer:
            with suppress(LogError):  # the server forgets an idle consumer by itself
                self._api.publish(f"CONSUMER.DELETE.{self._api.stream}.{self._consumer}", None)
            self._consumer = ""

    @property
    def exhausted(self) -> bool:
        """Whether the replica that serves this cursor had nothing more when it delivered the last entry."""
        return bool(self._consumer) and not self._lost and not self._ready and self._pending == 0

    async def open(self) -> None:
        """Begin, or begin again, behind the last entry that was given out. Raises LogError."""
        self.close()
        self._ready.clear()
        self._delivered = self._asked = 0
        self._lost = False
        name = f"cursor-{secrets.token_hex(8)}"
        config: dict[str, object] = {
            "name": name,
            "deliver_policy": "by_start_sequence",
            "opt_start_seq": self.position + 1,
            "ack_policy": "none",
            "mem_storage": True,
            "num_replicas": 1,
            "inactive_threshold": 60 * _NANO,
        }
        if self._subject is not None:
            config["filter_subject"] = self._subject
        request = {"stream_name": self._api.stream, "config": config, "action": ""}
        created = await self._api.request(f"CONSUMER.CREATE.{self._api.stream}.{name}", request, _decode_created)
        self._consumer, self._pending = name, created.num_pending
        # An inbox of its own: what is said of the consumer before must not be taken for news of this one.
        self._reply = f"{self._inbox}.{secrets.token_hex(11)}"
        self._subscription = self._api.connection.subscribe(self._reply, self._on_message)

    def _pull(self, limit: int) -> None:
        if self._asked > 0:
            return
        self._asked = min(limit, _AHEAD)
        what = {
            "batch": self._asked,
            "max_bytes": max(SCAN_BYTES, 2 * self._api.connection.max_payload),
            "expires": int(_PULL_EXPIRES * _NANO),
            "idle_heartbeat": int(_HEARTBEAT * _NANO),
        }
        self._api.publish(f"CONSUMER.MSG.NEXT.{self._api.stream}.{self._consumer}", what, self._reply)

    def _on_message(self, message: Message) -> None:
        self._silent = 0.0
        tokens = message.reply.split(".")
        if len(tokens) == 9 and tokens[1] == "ACK":
            if tokens[3] != self._consumer or self._lost:
                return
            number = int(tokens[6])
            if number != self._delivered + 1:
                self._lost = True
            else:
                self._delivered = number
                self._asked -= 1
                self._pending = int(tokens[8])
                time = microseconds(int(tokens[7]) // 1000)
                headers = {name: value for name, value in message.headers.items() if name != EXPECTED}
                position, subject = int(tokens[5]), message.subject
                self._ready.append(
                    Entry(position=position, time=time, subject=subject, body=message.data, headers=headers)
                )
        elif message.status in (404, 408):
            self._asked = 0  # this pull is over
        elif message.status == 100:
            if int(message.headers.get("Nats-Last-Consumer", 0)) > self._delivered:
                self._lost = True
        else:
            self._lost = True
        self._stirred.set()
