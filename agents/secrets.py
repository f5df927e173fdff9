"""What a reference to a secret leads to: the environment, a file, or a resolver that another distribution adds.

A secret is read when it is used and kept nowhere. What is said about one that cannot be read names the reference, and
never what was found there. A distribution adds a scheme with the entry point group `dspex.secrets`: the name is the
scheme, the object a function from what stands behind the colon to the secret.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from dspex.core.errors import ConfigurationError
from dspex.core.types import SCHEMES, Secret

__all__ = ["GROUP", "MAX_SECRET", "Secret", "reveal"]

GROUP = "dspex.secrets"
MAX_SECRET = 64 << 10
"""Bytes of a secret."""
MOUNTED = ("/run/secrets/", "/var/run/secrets/")
"""Where containers mount secrets: nobody else is in there, and the files are often open to all."""

# With this module comes `dspex.Secret`, so whoever can write a reference can write one of an added scheme.
SCHEMES.update(point.name for point in entry_points(group=GROUP) if point.name.isidentifier())


def reveal(reference: str) -> str:
    """The secret behind a reference. Raises ConfigurationError with a sentence that does not show what was found."""
    try:
        known = Secret(reference)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
    match known.scheme:
        case "env":
            found = os.environ.get(known.target)
            if found is None:
                raise ConfigurationError(f"there is no secret at {known}: the variable is not set")
        case "file":
            found = _in_file(known)
        case _:
            found = _resolved(known)
    if not found or len(found) > MAX_SECRET:
        what = "nothing" if not found else f"more than {MAX_SECRET:,} characters"
        raise ConfigurationError(f"there is no secret at {known}: it holds {what}")
    return found


def _in_file(reference: Secret) -> str:
    path = reference.target
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise ConfigurationError(f"there is no secret at {reference}: it is no file")
            _check(reference, str(Path(path).absolute()), about.st_mode)
            return file.read(MAX_SECRET + 1).decode().strip()
    except OSError as error:
        raise ConfigurationError(f"there is no secret at {reference}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"there is no secret at {reference}: it is not text") from None


def _check(reference: Secret, path: str, mode: int) -> None:
    if mode & 0o022 or (mode & 0o044 and not path.startswith(MOUNTED)):
        what = "change" if mode & 0o022 else "read"
        raise ConfigurationError(
            f"the file of {reference} has mode {stat.S_IMODE(mode):04o}, so others may {what} it: chmod 600 {path}"
        )


def _resolved(reference: Secret) -> str:
    points = list(entry_points(group=GROUP, name=reference.scheme))
    if not points:
        raise ConfigurationError(f"nobody resolves {reference}: no distribution here has {GROUP}:{reference.scheme}")
    try:
        resolve: Callable[[str], object] = points[0].load()
        found = resolve(reference.target)
    except Exception as error:  # its words may hold anything
        kind = type(error).__name__
        raise ConfigurationError(f"there is no secret at {reference}: its resolver raised {kind}") from None
    if not isinstance(found, str):
        raise ConfigurationError(f"there is no secret at {reference}: its resolver gave a {type(found).__name__}")
    return found
