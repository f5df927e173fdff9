"""What a server says of itself before anybody has logged in, and whether it can be reached from afar."""

from __future__ import annotations

import ipaddress
import json
import socket
from typing import Any
from urllib.parse import urlsplit

__all__ = ["is_loopback", "probe"]

PORT = 4222
MAX_LINE = 64 << 10


def probe(url: str, timeout: float = 2.0) -> dict[str, Any] | None:
    """The INFO of the first server in `url`; None when it says nothing of the kind within `timeout` seconds."""
    place = urlsplit(_with_scheme(url))
    try:
        with socket.create_connection((place.hostname or "", place.port or PORT), timeout=timeout) as link:
            link.settimeout(timeout)
            line = link.makefile("rb").readline(MAX_LINE)
        said = json.loads(line.removeprefix(b"INFO "))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None


def is_loopback(url: str) -> bool:
    """Whether an address is this machine's own, by its name alone: what a name server says is not asked."""
    host = urlsplit(_with_scheme(url)).hostname or ""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _with_scheme(url: str) -> str:
    first = url.split(",")[0].strip()
    return first if "://" in first else f"nats://{first}"
