"""A fenced lease: one holder at a time, told apart from all before it by a number that only grows.

The lease is the newest message of one subject, taken and renewed under compare-and-set; its stream sequence is the
fencing token. Nobody's clock is compared with anybody else's: a contender takes over when the message has not changed
for the whole time to live as the contender itself measures it.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import secrets
from typing import Any

import msgspec

from dspex.bus.client import Client
from dspex.bus.streams import jetstream_api
from dspex.core import headers as h
from dspex.core.errors import ConnectionFailed, LogError
from dspex.core.subjects import Subjects

__all__ = ["Lease"]

logger = logging.getLogger("dspex.bus")

TTL = 3.0
RENEW = 1.0


class Lease:
    """The right to play a role. `holder` names who asks; the same name is let in at once, because whoever starts a
    holder again does so when the one before is dead or about to end. Should both live, the one before loses it."""

    def __init__(self, client: Client, subjects: Subjects, name: str, holder: str) -> None:
        self._client, self._stream = client, subjects.lease_stream
        self._subject, self._holder = subjects.lease(name), holder
        self._life = secrets.token_hex(8)
        self.token = 0

    async def acquire(self) -> None:
        """Wait until the lease is ours."""
        seen, since = -1, 0.0
        loop = asyncio.get_running_loop()
        while True:
            try:
                sequence, holder, _ = await self._current()
                if sequence != seen:
                    seen, since = sequence, loop.time()
                if sequence == 0 or holder in ("", self._holder) or loop.time() - since >= TTL:
                    taken = await self._put(sequence)
                    if taken:
                        self.token = taken
                        return
            except (ConnectionFailed, LogError, TimeoutError) as error:
                logger.debug("the lease %s cannot be read: %s", self._subject, error)
            await asyncio.sleep(0.2)

    async def keep(self) -> None:
        """Renew until somebody else has the lease, or until it may have run out; then return."""
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        while loop.time() - renewed < TTL - RENEW:
            await asyncio.sleep(RENEW)
            asked = loop.time()  # what the answer says was true then, and maybe no longer when it comes
            try:
                taken = await self._put(self.token)
                if not taken:
                    sequence, _, life = await self._current()
                    if life != self._life:
                        return
                    taken = sequence  # our own renewal, whose answer was lost
                self.token, renewed = taken, asked
            except (ConnectionFailed, LogError, TimeoutError) as error:
                logger.debug("the lease %s could not be renewed: %s", self._subject, error)

    async def release(self) -> None:
        """Give it back, so that the next holder need not wait until it has run out."""
        try:
            if self.token:
                await self._put(self.token, holder="")
        except (ConnectionFailed, LogError, TimeoutError) as error:
            logger.debug("the lease %s could not be given back: %s", self._subject, error)
        self.token = 0

    async def _current(self) -> tuple[int, str, str]:
        answer = await jetstream_api(
            self._client, f"STREAM.MSG.GET.{self._stream}", {"last_by_subj": self._subject}, timeout=1.0
        )
        message: dict[str, Any] | None = answer.get("message")
        if message is None:
            return 0, "", ""
        body = msgspec.json.decode(base64.b64decode(message.get("data", "")))
        return int(message["seq"]), str(body["holder"]), str(body.get("life", ""))

    async def _put(self, expected: int, holder: str | None = None) -> int:
        body = msgspec.json.encode({"holder": self._holder if holder is None else holder, "life": self._life})
        reply = await self._client.request(self._subject, body, headers={h.EXPECTED: str(expected)}, timeout=1.0)
        if reply.status:
            raise LogError("no stream holds the leases")
        answer = msgspec.json.decode(reply.data)
        return 0 if "error" in answer else int(answer["seq"])
