"""Who a process is to the server: a seed in a file that only its owner reads, and a context that names it.

A context is the file that the `nats` command line knows: `url`, `nkey` (the seed's file), `ca`, `inbox_prefix`. Ours
say in `dspex` what is beyond that. A credentials file (`.creds`) is taken as it is.
"""

from __future__ import annotations

import json
import os
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dspex.core.errors import ConfigurationError
from dspex.core.subjects import Subjects

__all__ = ["INBOX", "Identity", "make_seed", "public_key", "subjects_of", "write_private"]

INBOX = "_INBOX"
PRIVATE = 0o600


@dataclass(frozen=True, slots=True)
class Identity:
    """How to connect. `account` is "" where there are no access rules of ours; `api` stands for `$JS.API.` there, ""
    when that is to be used as it is. Never holds a secret, only where it is."""

    creds: str | None = None
    seed: str | None = None
    ca: str | None = None
    inbox: str = INBOX
    account: str = ""
    api: str = ""

    @classmethod
    def load(cls, path: str | None) -> Identity:
        """The identity in a file: a context when its name ends in `.json`, else credentials. None: nobody.

        Raises ConfigurationError when the file cannot be read, says nothing, or others may read its seed."""
        if not path or not path.endswith(".json"):
            return cls(creds=path)
        file = Path(path)
        try:
            said: dict[str, Any] = json.loads(file.read_text())
            ours = said.get("dspex") or {}
            seed = str(_beside(file, said["nkey"])) if said.get("nkey") else None
            ca = str(_beside(file, said["ca"])) if said.get("ca") else None
            identity = cls(
                creds=said.get("creds") or None, seed=seed, ca=ca, inbox=said.get("inbox_prefix") or INBOX,
                account=ours.get("account", ""), api=ours.get("api", ""),
            )  # fmt: skip
        except OSError as error:
            raise ConfigurationError(f"the context {path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, AttributeError):
            raise ConfigurationError(f"{path} is no context: a JSON object with url, nkey and ca is due") from None
        if identity.seed:
            _check_private(Path(identity.seed))
        return identity

    @property
    def secured(self) -> bool:
        """Whether it is one of ours, so that the server keeps the accounts apart."""
        return bool(self.account)

    def options(self) -> dict[str, Any]:
        """What nats-py's `connect` is given."""
        options: dict[str, Any] = {}
        if self.creds:
            options["user_credentials"] = self.creds
        if self.seed:
            options["nkeys_seed"] = self.seed
        if self.ca:
            try:
                options["tls"] = ssl.create_default_context(cafile=self.ca)
            except (OSError, ssl.SSLError) as error:
                raise ConfigurationError(f"the certificates in {self.ca} cannot be used: {error}") from None
        return options


def subjects_of(prefix: str, credentials: str | None) -> Subjects:
    """The names as whoever has these credentials uses them. Raises ConfigurationError."""
    return Subjects(prefix, tenants=Identity.load(credentials).secured)


def make_seed(file: Path, *, anew: bool = False) -> str:
    """Make a new seed in `file`, unless there is one or it is to be `anew`, and return the public key. Raises
    ConfigurationError."""
    if anew or not file.exists():
        import nkeys

        write_private(file, bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)))
    return public_key(file)


def public_key(file: Path) -> str:
    """The public key of a seed. Raises ConfigurationError, which never quotes what the file holds."""
    import nkeys

    _check_private(file)
    try:
        pair = nkeys.from_seed(bytearray(file.read_bytes().strip()))
        try:
            return str(pair.public_key.decode())
        finally:
            pair.wipe()
    except (nkeys.NkeysError, ValueError):
        raise ConfigurationError(f"{file} holds no seed; remove it, and `dspex secure init` makes a new one") from None


def write_private(file: Path, data: bytes) -> None:
    """Write a file that only its owner may read; whole or not at all."""
    new = file.with_name(f"{file.name}.new")
    with suppress(FileNotFoundError):
        new.unlink()
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, PRIVATE)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    new.replace(file)


def _beside(context: Path, name: str) -> Path:
    """A file that a context names; one without a leading slash is beside it, so that a folder may be moved whole."""
    return context.parent / Path(name).expanduser()


def _check_private(file: Path) -> None:
    try:
        mode = file.stat().st_mode & 0o777
    except OSError as error:
        raise ConfigurationError(f"the seed {file} cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigurationError(f"the seed {file} has mode {mode:04o}, so others may read it: chmod 600 {file}")
