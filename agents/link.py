"""The line between a supervisor and a child: JSON lines over a socket pair. When it breaks, the other side is dead."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

__all__ = ["Link", "beat", "link_pair"]

MAX_LINE = 1 << 20


class Link:
    """One end. Never blocks: a line that the other side does not take is dropped, and `send` says so."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._buffer = b""
        self._unsent = b""
        self._sending = threading.Lock()
        self.open = True

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: dict[str, Any]) -> bool:
        """Send one message; False when the line is broken or the other side is too far behind."""
        with self._sending:  # a watch speaks for a loop that does not
            if not self.open or len(self._unsent) > MAX_LINE:
                return False
            self._unsent += msgspec.json.encode(message) + b"\n"
            return self._flush()

    def flush(self) -> bool:
        """Send what waits, as far as it goes."""
        with self._sending:
            return self._flush()

    def _flush(self) -> bool:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            return True
        except OSError:
            self.open = False
        return self.open

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come. `open` is False afterwards when the other side is gone."""
        try:
            while True:
                data = self._socket.recv(65536)
                if not data:
                    self.open = False
                    break
                self._buffer += data
        except BlockingIOError:
            pass
        except OSError:
            self.open = False
        *lines, self._buffer = self._buffer.split(b"\n")
        if len(self._buffer) > MAX_LINE:
            self._buffer = b""
        return [message for line in lines if line and (message := _read(line)) is not None]

    @contextlib.contextmanager
    def release(self) -> Iterator[socket.socket]:
        """Our end as a socket, to hand it to another process; closed here afterwards."""
        try:
            yield self._socket
        finally:
            self.close()

    def close(self) -> None:
        self.open = False
        with contextlib.suppress(OSError):
            self._socket.close()


def _read(line: bytes) -> dict[str, Any] | None:
    """A line as a message; None for what is left of one that was too long to keep."""
    try:
        message = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return message if isinstance(message, dict) else None


async def beat(link: Link, load: Callable[[], dict[str, int]] = dict) -> None:
    """Show the supervisor, once a second, that the event loop turns, and how much there is to do."""
    while link.open:
        link.send({"beat": True, "load": load()})
        await asyncio.sleep(1.0)


def link_pair() -> tuple[Link, Link]:
    """Two connected ends: the parent's and the child's."""
    parent, child = socket.socketpair()
    return Link(parent), Link(child)
