"""nats-py's client with a direct path in and out: messages of a tapped subject go from the parser to their handler with
nothing in between, commands of one turn of the event loop leave in one write.

nats-py still connects, authenticates, pings, reconnects and subscribes anew. What is ours is what its traps are in:
bytes that are not UTF-8, and a reading loop that can end while the client looks connected.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from nats.aio.client import Client as NatsClient
from nats.aio.subscription import Subscription as NatsSubscription
from nats.errors import Error as NatsError
from nats.errors import ProtocolError
from nats.protocol.parser import Parser as NatsParser

from dspex.core.errors import ConnectionFailed

__all__ = ["Handler", "Message", "Tap", "Wire"]

logger = logging.getLogger("dspex.bus")

MAX_BUFFERED = 8 << 20
"""Bytes that may wait to be sent while the server is away or does not read."""
MAX_UNSENT = 1 << 20
"""Bytes that may wait in the socket's buffer before we stop pushing into it."""
READ_SIZE = 1 << 18
"""Bytes that are read at once."""
MAX_CONTROL_LINE = 1 << 16


class Message:
    """A message as it came off the wire; text is decoded when it is asked for."""

    __slots__ = ("_headers", "_raw", "data", "raw_reply", "raw_subject")

    def __init__(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        self.raw_subject, self.raw_reply, self.data, self._raw = subject, reply, data, headers
        self._headers: dict[str, str] | None = None

    @property
    def subject(self) -> str:
        return self.raw_subject.decode("utf-8", "backslashreplace")

    @property
    def reply(self) -> str:
        return self.raw_reply.decode("utf-8", "backslashreplace")

    @property
    def headers(self) -> dict[str, str]:
        if self._headers is None:
            self._headers = dict(_header_fields(self._raw)) if self._raw else {}
        return self._headers

    @property
    def status(self) -> int:
        raw = self._raw
        code = raw[9:12] if raw else b""
        return int(code) if code.isdigit() else 0

    @property
    def has_headers(self) -> bool:
        return self._raw is not None

    def __repr__(self) -> str:
        return f"<Message {self.subject} {len(self.data)} bytes>"


Handler = Callable[[Message], None]


def _header_fields(raw: bytes) -> Iterator[tuple[str, str]]:
    for line in raw.split(b"\r\n")[1:]:
        name, colon, value = line.partition(b":")
        if colon:
            text = name.strip().decode("ascii", "backslashreplace")
            if text[:6].lower() == "dspex-":
                text = text.title()  # some clients change the case of header names
            yield text, value.strip().decode("utf-8", "backslashreplace")


class Tap:
    """Interest in a subject whose messages go straight to a handler."""

    def __init__(self, wire: Wire, sid: int, subject: str) -> None:
        self._wire, self._sid, self.subject = wire, sid, subject

    def leave(self) -> None:
        """Ask for no more. What is on its way already still comes, until `close`; after a flush nothing is."""
        self._wire.leave(self._sid)

    def close(self) -> None:
        self._wire.untap(self._sid)


class _Parser(NatsParser):
    """Takes messages out of what was read, a whole read at a time; all other lines are left to nats-py's parser."""

    nc: Wire

    def __init__(self, wire: Wire) -> None:
        self._parts: list[bytes] = []
        self._have = self._need = self._lives = 0
        super().__init__(wire)

    def reset(self) -> None:
        super().reset()
        self._parts = []
        self._have = self._need = 0
        self._lives += 1

    async def parse(self, data: bytes = b"") -> None:
        self._parts.append(data)
        self._have += len(data)
        if self._have < self._need:
            return  # a large message is still on its way: collect, and join once
        data = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        life = self._lives
        position = await self._messages(data)
        if life != self._lives:
            return  # a line ended the connection: what is left belongs to no other
        rest = data[position:]
        self._parts = [rest] if rest else []
        self._have = len(rest)

    async def _messages(self, data: bytes) -> int:
        """Handle the complete messages and lines in `data`; return where the first incomplete one begins."""
        taps, life = self.nc.taps, self._lives
        find = data.find
        position, end = 0, len(data)
        self._need = 0
        while position < end:
            line_end = find(b"\r\n", position)
            if line_end < 0:
                if end - position > MAX_CONTROL_LINE:
                    raise ProtocolError("nats: a control line without end")
                break
            first = data[position]
            head = 0
            if first == 77:  # M, of MSG
                fields = data[position:line_end].split(b" ")
            elif first == 72:  # H, of HMSG
                fields = data[position:line_end].split(b" ")
                head = int(fields.pop(-2))
            else:
                await super().parse(data[position : line_end + 2])
                position = line_end + 2
                if life != self._lives or self.nc.is_closed:
                    break
                continue
            begin = line_end + 2
            stop = begin + int(fields[-1])
            if stop + 2 > end:
                self._need = stop + 2 - position
                break
            body = data[begin + head : stop]
            handler = taps.get(fields[2])
            reply = fields[3] if len(fields) == 5 else b""
            if handler is not None:
                try:
                    handler(Message(fields[1], reply, body, data[begin : begin + head] if head else None))
                except Exception:
                    logger.exception("a handler failed on a message of %d bytes", len(body))
            else:
                headers = data[begin : begin + head]
                await self.nc._process_msg(int(fields[2]), fields[1], reply, body, headers)
            position = stop + 2
        return position


class Wire(NatsClient):
    """nats-py's client with a direct path in (`tap`) and out (`send`)."""

    def __init__(self) -> None:
        super().__init__()
        self._ps = _Parser(self)
        self.taps: dict[bytes, Handler] = {}
        self._out: list[bytes] = []
        self._loop = asyncio.get_running_loop()  # asking for it costs a system call each time in Python 3.11

    def tap(self, subject: str, queue: str, handler: Handler) -> Tap:
        self._sid += 1
        sid = self._sid
        # The library's own record of the subscription, so that it is made again after a reconnect.
        self._subs[sid] = NatsSubscription(self, sid, subject, queue=queue, pending_msgs_limit=1)
        self.taps[b"%d" % sid] = handler
        try:
            self.send(f"SUB {subject} {queue} {sid}\r\n".encode())
        except ConnectionFailed:
            del self._subs[sid], self.taps[b"%d" % sid]
            raise
        return Tap(self, sid, subject)

    def leave(self, sid: int) -> None:
        if self._subs.pop(sid, None) is not None and not self.is_closed:
            with suppress(ConnectionFailed):
                self.send(f"UNSUB {sid}\r\n".encode())

    def untap(self, sid: int) -> None:
        if self.taps.pop(b"%d" % sid, None) is not None:  # what still comes for it is dropped
            self.leave(sid)

    def send(self, command: bytes) -> None:
        """Send with everything else of this turn of the loop. Raises ConnectionFailed when closed or too far behind."""
        out = self._out
        if not out:
            self._check(len(command))
            self._loop.call_soon(self.push)
        out.append(command)

    def _check(self, size: int) -> None:
        if self._status == NatsClient.CLOSED:
            raise ConnectionFailed("the connection to NATS is closed")
        if self._pending_data_size and self._pending_data_size + size > MAX_BUFFERED:
            raise ConnectionFailed(f"NATS takes nothing: {MAX_BUFFERED >> 20} MiB wait to be sent")

    def push(self) -> None:
        """Give what was sent in this turn to the socket; to the library's buffer while there is none."""
        out, self._out = self._out, []
        if not out:
            return
        writer: Any = getattr(self._transport, "_io_writer", None)
        # Between the death of a server and the library's notice of it the transport is closed, and raises RuntimeError.
        closed = writer is None or writer.transport.is_closing()
        ready = self._status == NatsClient.CONNECTED and not self._pending and not closed
        if ready and writer.transport.get_write_buffer_size() < MAX_UNSENT:
            writer.write(out[0] if len(out) == 1 else b"".join(out))
            return
        self._pending += out
        self._pending_data_size += sum(map(len, out))
        queue = self._flush_queue
        if self._status == NatsClient.CONNECTED and not closed and queue is not None and queue.empty():
            queue.put_nowait(self._loop.create_future())

    def abandon(self) -> None:
        """Close the socket of an attempt to connect that failed; the library leaves it open."""
        transport: Any = self._transport
        if transport is not None:
            transport.close()

    def cut(self) -> None:
        """Break the connection. This one is for another thread, while ours does not run."""
        writer = getattr(self._transport, "_io_writer", None)
        link = writer.transport.get_extra_info("socket") if writer is not None else None
        with suppress(OSError, ValueError):
            if link is not None and link.fileno() >= 0:
                with socket.socket(fileno=os.dup(link.fileno())) as twin:
                    twin.shutdown(socket.SHUT_RDWR)

    def _build_message(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: Any) -> Any:
        return self.msg_class(
            subject=subject.decode("utf-8", "backslashreplace"), reply=reply.decode("utf-8", "backslashreplace"),
            data=data, headers=headers, _client=self, _sid=sid,
        )  # fmt: skip

    def _connect_command(self) -> bytes:
        """Log in, but not in the clear where TLS was asked for: whoever is in between may have taken the offer away."""
        writer = getattr(self._transport, "_io_writer", None)
        if self.options.get("tls") is not None and (
            writer is None or writer.transport.get_extra_info("ssl_object") is None
        ):
            raise NatsError("nats: the server offers no TLS, and it was asked for")
        if self._nkeys_seed is not None:
            # The library signs with the seed that the file has now, and names the key that it had at first.
            with suppress(OSError, ValueError):  # it is being replaced this moment, or gone: the server will refuse us
                self._setup_nkeys_seed_connect()
        return super()._connect_command()

    async def _process_err(self, err_msg: str) -> None:
        """The server said -ERR and hangs up. The library takes most of these for the end; we connect again."""
        if self.is_connected and "permissions violation" not in err_msg.lower():
            error = NatsError(f"nats: {err_msg.strip(chr(39))}")
            await self._error_cb(error)
            await self._process_op_err(error)
        else:
            await super()._process_err(err_msg)

    async def _read_loop(self) -> None:
        """Read, parse, and reconnect on whatever goes wrong.

        The library's own loop ends for good on an error it does not expect and leaves the client looking connected. And
        it reads little at a time: what is read together is answered with one write, and writes are what costs.
        """
        transport: Any = self._transport
        reader = getattr(transport, "_io_reader", None)
        writer = getattr(transport, "_io_writer", None)
        if reader is not None:
            reader._limit = READ_SIZE
        if writer is not None and writer.transport.get_extra_info("ssl_object") is not None:
            # The library upgrades to TLS behind asyncio's back, which then warns of a half-closed connection.
            writer.transport.get_protocol()._over_ssl = True
        try:
            while not (self.is_closed or self.is_reconnecting):
                if transport.at_eof():
                    raise NatsError("nats: the server closed the connection")
                data = await transport.read(READ_SIZE)
                if getattr(transport, "_io_reader", None) is not reader:
                    # A reconnect that failed half-way and began again has left us behind: this is another connection's.
                    if writer is not None:
                        writer.close()
                    return
                await self._ps.parse(data)
        except asyncio.CancelledError:
            return
        except Exception as error:
            if getattr(transport, "_io_reader", None) is not reader:
                return
            logger.debug("the connection is broken: %r", error)
            await self._error_cb(error)
            await self._process_op_err(error)
