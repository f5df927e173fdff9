"""The `secure` folder of a system: who may connect, their seeds, the certificates, and the server's configuration.

    <data>/secure/identities.json     who there is: role, name, public key
                  <name>.nk           a seed, mode 0600
                  <name>.json         a context: how to connect as this identity
                  ca.pem server.pem … the certificates
                  access.conf         accounts and TLS, as nats-server reads them
                  in-force            which of them a running system has taken in
                  lock                held while any of it is changed

Only `identities.json` and the seeds are to be kept; the rest is made from them again at each start.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dspex.bus.access import MAX_PROGRAMS, User, accounts_text
from dspex.bus.identity import INBOX, make_seed, public_key, write_private
from dspex.compose.settings import SECURE
from dspex.core.access import Role, account_of, api_prefix, valid_name
from dspex.core.errors import ConfigurationError
from dspex.core.subjects import Subjects

__all__ = ["Secured", "adopt_log", "is_secured", "operator_of"]

FOLDER, IDENTITIES, ACCESS = SECURE, "identities.json", "access.conf"
IN_FORCE, LOCK = "in-force", "lock"
ALONE = (Role.REGISTRAR, Role.ARCHIVIST, Role.OPERATOR, Role.CONSOLE)
"""The roles that a system has one identity of."""
MAX_CLIENTS = 1000
RENEW = 30 * 86_400
"""So many seconds before it ends a certificate is made anew."""


def is_secured(data: Path) -> bool:
    """Whether a data folder has identities."""
    return (data / FOLDER / IDENTITIES).is_file()


@dataclass(frozen=True)
class _Known:
    prefix: str
    users: tuple[User, ...] = ()
    hosts: tuple[str, ...] = ()
    until: float = 0.0


class Secured:
    """The identities of one data folder. `add` makes what is missing, and may be called again and again."""

    def __init__(self, data: Path, prefix: str = "dspex") -> None:
        self.folder = data.absolute() / FOLDER
        self.subjects = Subjects(prefix, tenants=True)
        self._known = self._load()
        if self._known.prefix != prefix:
            raise ConfigurationError(
                f"the identities in {self.folder} are for the prefix {self._known.prefix}, not {prefix}"
            )

    @property
    def access(self) -> Path:
        """The file that the server's configuration takes in."""
        return self.folder / ACCESS

    @property
    def users(self) -> tuple[User, ...]:
        return self._known.users

    @property
    def until(self) -> datetime | None:
        """When the server's certificate ends; None when there is none."""
        return datetime.fromtimestamp(self._known.until, UTC) if self._known.until else None

    def has(self, role: Role, name: str = "") -> bool:
        return any(user.role is role and user.name == (name or role.value) for user in self.users)

    def context(self, role: Role, name: str = "") -> str:
        """The path of an identity's context, whether or not it is there."""
        return str(self.folder / f"{_stem(role, name)}.json")

    def add(
        self, *, programs: Iterable[str] = (), clients: Iterable[str] = (), hosts: Iterable[str] = ()
    ) -> list[str]:
        """Make the identities that are missing, and write what the server and the commands read; the new ones' names.

        Whoever dies in between leaves a seed that nobody knows yet; the next call takes it. Raises ConfigurationError.
        """
        wanted = [(role, role.value) for role in ALONE]
        wanted += [(Role.AGENT, name) for name in programs] + [(Role.CLIENT, name) for name in clients]
        for role, name in wanted:
            if role is Role.CLIENT and not valid_name(name):
                raise ConfigurationError(
                    f"{name[:80]!r} cannot be a client's name: lower-case letters, digits, _ and -, at most 32"
                )
        with self._changing():
            missing = [(role, name) for role, name in dict.fromkeys(wanted) if not self.has(role, name)]
            self._check_bounds(missing)
            made = [_made(self.folder, role, name) for role, name in missing]
            users = (*(self._as_its_seed_says(user) for user in self.users), *made)
            known = replace(self._known, users=users, hosts=tuple(dict.fromkeys((*self._known.hosts, *hosts))))
            self._certify(known)
            self._write()
        return [_stem(user.role, user.name) for user in made]

    def remove(self, role: Role, name: str) -> None:
        """Take an identity away: a running server ends its connections and refuses it. Raises ConfigurationError."""
        with self._changing():
            self._check_known(role, name)
            left = tuple(user for user in self.users if (user.role, user.name) != (role, name))
            self._known = replace(self._known, users=left)
            self._write()
            for ending in ("json", "nk"):
                (self.folder / f"{_stem(role, name)}.{ending}").unlink(missing_ok=True)

    def rotate(self, role: Role, name: str) -> None:
        """Give an identity another seed: a running server ends the connections made with the old one. Whoever dies in
        between leaves a new seed that the server does not know; the next `add` takes it. Raises ConfigurationError."""
        with self._changing():
            self._check_known(role, name)
            seed = self.folder / f"{_stem(role, name)}.nk"
            public = make_seed(seed, anew=True)
            users = tuple(
                replace(user, public=public) if (user.role, user.name) == (role, name) else user for user in self.users
            )
            self._known = replace(self._known, users=users)
            self._write()

    def identity(self, stem: str) -> tuple[Role, str] | None:
        """The identity that the list calls so; a client's name alone will do."""
        found = {_stem(user.role, user.name): (user.role, user.name) for user in self.users}
        return found.get(stem) or found.get(f"{Role.CLIENT}-{stem}")

    @property
    def in_force(self) -> bool:
        """Whether a running system has taken in what stands here now."""
        try:
            return (self.folder / IN_FORCE).read_text() == _digest(self.access)
        except (OSError, UnicodeDecodeError):
            return False

    def note_in_force(self) -> None:
        """Say that the server runs with what stands here now."""
        with suppress(OSError):
            write_private(self.folder / IN_FORCE, _digest(self.access).encode())

    def announce(self, url: str) -> None:
        """Say in every context where the system is reached. Raises ConfigurationError."""
        with self._changing():
            for user in self.users:
                _write_changed(self.folder / f"{_stem(user.role, user.name)}.json", self._context(user, url))

    # -- inside

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change what the folder says, alone. Raises ConfigurationError."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            lock = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._known = self._load()
                yield
            finally:
                os.close(lock)
        except OSError as error:
            raise ConfigurationError(f"{error.filename or self.folder} cannot be written: {error.strerror}") from None

    def _check_known(self, role: Role, name: str) -> None:
        if not self.has(role, name):
            raise ConfigurationError(f"there is no {role} {name} in {self.folder}")

    def _as_its_seed_says(self, user: User) -> User:
        seed = self.folder / f"{_stem(user.role, user.name)}.nk"
        public = public_key(seed) if seed.is_file() else user.public
        return user if public == user.public else replace(user, public=public)

    def _check_bounds(self, missing: list[tuple[Role, str]]) -> None:
        for role, most in ((Role.AGENT, MAX_PROGRAMS), (Role.CLIENT, MAX_CLIENTS)):
            count = sum(user.role is role for user in self.users) + sum(one is role for one, _ in missing)
            if count > most:
                what = "programs" if role is Role.AGENT else "clients"
                raise ConfigurationError(f"{count:,} {what} are more than the {most:,} that a secured system may have")

    def _load(self) -> _Known:
        file = self.folder / IDENTITIES
        try:
            said: dict[str, Any] = json.loads(file.read_text())
            users = tuple(
                User(Role(each["role"]), each["name"], each["public"], _inbox(Role(each["role"]), each["name"]))
                for each in said["identities"]
            )
            return _Known(said["prefix"], users, tuple(said["hosts"]), float(said["certificate_until"]))
        except FileNotFoundError:
            return _Known(self.subjects.prefix)
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise ConfigurationError(f"{file} is damaged; take it from a backup, or remove {self.folder}") from None

    def _certify(self, known: _Known) -> None:
        """Certificates that name every host and do not end soon; looked at closely only when that may be needed."""
        now = datetime.now(UTC).timestamp()
        there = all((self.folder / name).is_file() for name in ("ca.pem", "server.pem", "server-key.pem"))
        if known.hosts != self._known.hosts or not there or known.until < now + RENEW:
            from dspex.bus.certificates import make_certificates

            known = replace(known, until=make_certificates(self.folder, known.hosts).timestamp())
        self._known = known

    def _write(self) -> None:
        known = self._known
        identities = [{"role": user.role, "name": user.name, "public": user.public} for user in known.users]
        said = {
            "prefix": known.prefix, "hosts": known.hosts, "certificate_until": known.until, "identities": identities
        }  # fmt: skip
        _write_changed(self.folder / IDENTITIES, json.dumps(said, indent=1))
        _write_changed(self.access, self._server_text())
        for user in known.users:
            context = self.folder / f"{_stem(user.role, user.name)}.json"
            _write_changed(context, self._context(user, _url_of(context)))

    def _server_text(self) -> str:
        certificate, key = (
            json.dumps(str(self.folder / name), ensure_ascii=False) for name in ("server.pem", "server-key.pem")
        )
        tls = f'tls {{\n  cert_file: {certificate}\n  key_file: {key}\n  min_version: "1.2"\n  timeout: 5\n}}\n'
        return tls + accounts_text(self.users, self.subjects)

    def _context(self, user: User, url: str) -> str:
        ours: dict[str, str] = {"account": user.account}
        if user.account != account_of(Role.OPERATOR):
            ours["api"] = api_prefix(self.subjects)
        said = {
            "description": f"dspex {_stem(user.role, user.name)}", "url": url,
            "nkey": f"{_stem(user.role, user.name)}.nk", "ca": "ca.pem", "inbox_prefix": user.inbox, "dspex": ours,
        }  # fmt: skip
        if "api" in ours:
            said["jetstream_api_prefix"] = ours["api"].rstrip(".")
        return json.dumps(said, indent=1)


def operator_of(data: Path) -> tuple[Path | None, str | None]:
    """The access rules and the operator's context of a folder whose system does not run; nothing for an open one."""
    if not is_secured(data):
        return None, None
    folder = data.absolute() / FOLDER
    return folder / ACCESS, str(folder / f"{Role.OPERATOR}.json")


def adopt_log(server: Path, account: str, stream: str) -> bool:
    """Move the streams that a server of ours keeps for everybody to the account that has them from now on, if it has
    none yet; whether it was done. The server must not run. Raises ConfigurationError."""
    accounts = server / "jetstream" / "jetstream"
    everybody, ours = accounts / "$G", accounts / account
    streams = everybody / "streams"
    if ours.exists() or not (streams / stream).is_dir():
        return False
    if (streams / f"{stream}_KEYS").is_dir() or any(streams.glob("OBJ_*")):
        raise ConfigurationError(
            f"the log in {server} has private or large values from before it had access rules, and under them no agent "
            "could read those; run it without --secure, or begin with another folder (--data)"
        )
    try:
        everybody.rename(ours)
    except OSError as error:
        raise ConfigurationError(f"{everybody} cannot be renamed to {ours}: {error.strerror}") from None
    return True


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _stem(role: Role, name: str = "") -> str:
    return f"{role}-{name}" if role in (Role.AGENT, Role.CLIENT) else str(role)


def _inbox(role: Role, name: str) -> str:
    return f"{INBOX}_{name}" if role is Role.CLIENT else INBOX


def _made(folder: Path, role: Role, name: str) -> User:
    return User(role, name, make_seed(folder / f"{_stem(role, name)}.nk"), _inbox(role, name))


def _url_of(context: Path) -> str:
    try:
        return str(json.loads(context.read_text())["url"])
    except (OSError, ValueError, KeyError, TypeError):
        return "nats://127.0.0.1:4222"


def _write_changed(file: Path, text: str) -> None:
    """Write a file unless it says so already: most starts change nothing."""
    try:
        if file.read_text() == text and not file.stat().st_mode & 0o077:
            return
    except (OSError, UnicodeDecodeError):
        pass
    write_private(file, text.encode())
