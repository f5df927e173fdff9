"""What ails a server that runs: a full disk froze its streams, and only a new start thaws them.

nats-server stops writing to a stream for good at the first write that fails. It goes on serving what it has, publishers
get no answer, and `/healthz` says why.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dspex.bus.server import Server

__all__ = ["ROOM", "Health", "end_of_stream", "has_room", "trouble"]

ROOM = 16 << 20
"""Bytes that must be free before a frozen server is started again: two of the largest messages."""
LOOK = 1.0
"""Seconds between looks at a server."""
PATIENCE = 0.3
"""Seconds that a look may take: whoever looks has other things to do, and a frozen process answers nothing."""
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0
"""Seconds after a new start until the next one, twice as long each time while it is frozen again and again."""
MAX_PAGE = 16 << 20
MARKS = ("write error", "no space left", "JetStream is not enabled", "JetStream has been disabled")


def trouble(server: Server) -> str:
    """Why the server writes nothing, in its own words; "" when it does, or does not say."""
    said = _ask(server, "/healthz").get("error", "")
    return str(said)[:500] if any(mark in str(said) for mark in MARKS) else ""


def end_of_stream(server: Server, stream: str) -> int | None:
    """The last position that the server has given in a stream; None when it has none or does not say."""
    said = _ask(server, "/jsz?streams=true&limit=1024", patience=5.0)
    for account in said.get("account_details", ()):
        for found in account.get("stream_detail", ()):
            if found.get("name") == stream:
                return int(found["state"]["last_seq"])
    return None


def _ask(server: Server, path: str, patience: float = PATIENCE) -> dict[str, Any]:
    """One page of the server's monitoring; empty when it does not answer in time."""
    host, _, port = server.monitor.removeprefix("http://").rpartition(":")
    if not port.isdecimal():
        return {}
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=patience) as link:
            link.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            answer = link.makefile("rb").read(MAX_PAGE)
        said = json.loads(answer.partition(b"\r\n\r\n")[2])
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def has_room(folder: Path) -> bool:
    """Whether `ROOM` bytes can be had, quotas included: by taking them for a moment."""
    try:
        if not hasattr(os, "posix_fallocate"):
            return shutil.disk_usage(folder).free >= ROOM
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, ROOM)
    except OSError:
        return False
    return True


class Health:
    """Looks after one server: says when it writes nothing, and ends it when a new start will help."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._looked = self._not_before = 0.0
        self._pause = FIRST_PAUSE
        self.trouble = ""
        self.ended = False
        """The server that ends now ends because we told it to."""

    def look(self) -> str | None:
        """A sentence when something has changed, else None. Takes at most `PATIENCE`, and looks once in `LOOK`."""
        now = time.monotonic()
        if now - self._looked < LOOK or not self._server.pid:
            return None
        self._looked = now
        said, before = trouble(self._server), self.trouble
        self.trouble = said
        if said and now >= self._not_before and has_room(self._server.data):
            self._not_before, self._pause = now + self._pause, min(self._pause * 2, LONGEST_PAUSE)
            self.trouble, self.ended = "", True
            with suppress(ProcessLookupError):
                self._server.end()
            return "the disk has room again: nats-server is started anew and writes on"
        if said and not before:
            return (
                f"nats-server stores nothing more ({said}). Make room on the disk of {self._server.data}: "
                "submissions get no answer until then, what was acknowledged is safe, and it goes on by itself"
            )
        if not said and now >= self._not_before:
            self._pause = FIRST_PAUSE
        return None
