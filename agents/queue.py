"""The queue that a log process fills: what waits for an agent, as a disposable JetStream stream.

The log is the truth. The queue holds at most one message for each task or signal, so putting everything into it again
after a crash changes nothing about what is still there and in the hands of an agent. When it is full or away, positions
wait here and are read from the log when there is room. Programs share the room and take turns: a flood of one program's
tasks waits, and leaves room for the others (`core.sharing`).
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Mapping

import msgspec

from dspex.bus import streams
from dspex.bus.client import Client, Message
from dspex.core import headers as h
from dspex.core.errors import ConnectionFailed, LogError
from dspex.core.ports import Entry, Log
from dspex.core.sharing import Room, Turns
from dspex.core.standing import Standing
from dspex.core.subjects import Subjects

__all__ = ["Queue"]

logger = logging.getLogger("dspex.agents")

IN_FLIGHT = 4096
"""Messages on their way to the server at once; more wait with the rest."""
CHUNK = 256
RETRY = 0.1
THERE = 10071
_TRAVELS = re.compile(r"Dspex-[A-Za-z-]{1,64}|traceparent|tracestate")


class _Answer(msgspec.Struct):
    error: dict[str, object] | None = None


_decode = msgspec.json.Decoder(_Answer).decode


class Queue:
    """Fills the queue of one log. `standing` says what is still open."""

    def __init__(self, client: Client, log: Log, subjects: Subjects, standing: Standing) -> None:
        self._client, self._log, self._subjects, self._standing = client, log, subjects, standing
        self._waiting: Turns[tuple[str, int, bool]] = Turns()
        """By program: door, position, and whether it may have been delivered before."""
        self._room = Room(streams.MAX_QUEUED, streams.MAX_QUEUED_BYTES)
        self._flying = 0
        self._stirred = asyncio.Event()
        self._missing = self._full = False
        self._chunk = CHUNK

    @property
    def waiting(self) -> int:
        """How many wait here because the queue does not take them."""
        return len(self._waiting)

    def waiting_for(self, program: str) -> int:
        """How many of a program do."""
        return self._waiting.of(program)

    def add(self, door: str, program: str, entry: Entry) -> None:
        """Something new was stored. It waits behind the rest only while the queue takes nothing, or nothing more of its
        program: what is put in again after a crash must not hold up what comes."""
        if self._full or self._flying >= IN_FLIGHT or not self._room.takes(program, len(entry.body)):
            self._waiting.add(program, (door, entry.position, False))
            self._stirred.set()
        else:
            self._send(door, program, entry, known=False)

    def left(self, position: int) -> None:
        """A task or a signal is not for agents any more: there is room for another."""
        if self._room.leave(position) and self._waiting:
            self._stirred.set()

    def fill(self) -> None:
        """Put in everything that is open and awake; what is there already stays as it is."""
        self._waiting.clear()
        self._room.clear()
        for task, program in sorted(self._standing.awake.items()):
            self._waiting.add(program, ("task", task, True))
        for signal, (program, _) in sorted(self._standing.signals.items()):
            self._waiting.add(program, ("signal", signal, True))
        self._stirred.set()

    async def work(self) -> None:
        """Feed what waits, as the queue has room, until cancelled."""
        while True:
            await self._stirred.wait()
            if not self._waiting.any(self._room.takes):
                self._stirred.clear()
                continue
            try:
                if self._missing:
                    await streams.ensure_queue(self._client, self._subjects, self._log.epoch)
                    self._missing = False
                failed = await self._feed()
            except (LogError, ConnectionFailed, TimeoutError) as error:
                logger.debug("the queue is not filled: %s", error)
                failed = True
            self._full = failed and bool(self._waiting)
            self._chunk = 1 if failed else min(2 * self._chunk, CHUNK)  # while it is full, only knock
            if failed:
                await asyncio.sleep(RETRY)

    async def _feed(self) -> bool:
        """Send the next that wait; whether some have to be sent again."""
        sent: list[asyncio.Future[bool]] = []
        for _ in range(self._chunk):
            found = self._waiting.take(self._room.takes)
            if found is None:
                break
            owner, (door, position, known) = found
            try:
                program = self._program_of(door, position)
                entry = await self._log.entry(position) if program else None
            except BaseException:
                self._waiting.put_back(owner, (door, position, known))
                raise
            if program and entry:
                sent.append(self._send(door, program, entry, known=known))
        taken = [await each for each in sent]
        return not all(taken)

    def _program_of(self, door: str, position: int) -> str | None:
        if door == "task":
            return self._standing.awake.get(position)
        about = self._standing.signals.get(position)
        return about[0] if about else None

    def _send(self, door: str, program: str, entry: Entry, *, known: bool) -> asyncio.Future[bool]:
        """Put one message in, unless it is there; the future says whether it is there then."""
        position = entry.position
        headers = {
            h.EXPECTED: "0", h.TASK: str(position), h.TIME: str(round(entry.time * 1e6)),
            h.SUBJECT: entry.subject, **_forwarded(entry.headers),
        }  # fmt: skip
        if known:
            headers[h.KNOWN] = "1"
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._flying += 1
        self._room.take(position, program, len(entry.body))
        try:
            call = self._client.call(self._subjects.queue(door, program, position), entry.body, headers=headers)
        except ConnectionFailed:
            self._flying -= 1
            self._again(door, program, position, known)
            done.set_result(False)
            return done
        call.add_done_callback(lambda it: self._sent(it, door, program, position, known, done))
        return done

    def _sent(
        self, call: asyncio.Future[Message], door: str, program: str, position: int, known: bool,
        done: asyncio.Future[bool],
    ) -> None:  # fmt: skip
        self._flying -= 1
        if call.cancelled() or call.exception() is not None:
            taken, known = False, True  # it may be there
        else:
            reply = call.result()
            self._missing = self._missing or reply.status == 503
            answer = _decode(reply.data) if not reply.status else _Answer({"err_code": 0})
            taken = answer.error is None or answer.error.get("err_code") == THERE
        if not taken:
            self._again(door, program, position, known)
        if not done.done():
            done.set_result(taken)

    def _again(self, door: str, program: str, position: int, known: bool) -> None:
        self._room.leave(position)
        self._waiting.add(program, (door, position, known))
        self._stirred.set()


def _forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that an agent has to see; those of the log's own stay behind."""
    if not headers:
        return {}
    return {
        name: value for name, value in headers.items()
        if _TRAVELS.fullmatch(name) and name not in (h.TASK, h.TIME, h.KNOWN, h.SUBJECT)
    }  # fmt: skip
