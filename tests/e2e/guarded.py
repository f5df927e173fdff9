"""Systems with access rules, and plain clients that connect to them as somebody."""

from __future__ import annotations

import json
import ssl
from pathlib import Path
from typing import Any

from tests.e2e.plain import Plain

from dspex.compose.secure import Secured


def identities(data: Path, *clients: str, programs: tuple[str, ...] = ()) -> Secured:
    """Make identities in a data folder before its system is started."""
    secured = Secured(data)
    secured.add(clients=clients, programs=programs)
    return secured


def options_of(context: str) -> dict[str, Any]:
    """What nats-py's `connect` takes, read from a context as any program would."""
    file = Path(context)
    said = json.loads(file.read_text())
    return {
        "nkeys_seed": str(file.parent / said["nkey"]), "tls": ssl.create_default_context(cafile=str(file.parent / said["ca"])),
        "inbox_prefix": said["inbox_prefix"].encode(),
    }  # fmt: skip


async def connect(url: str, context: str) -> Plain:
    """A plain client that is who the context says."""
    return await Plain.connect(url, **options_of(context))


def refusals(log: Path) -> list[str]:
    """What the server's log says of permissions and credentials that somebody lacked."""
    lines = log.read_text(errors="replace").splitlines()
    return [line for line in lines if "iolation" in line or "uthentication" in line or "uthorization" in line]
