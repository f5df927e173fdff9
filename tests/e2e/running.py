"""A system in processes of its own, started as `dspex up` starts one, to be looked at and killed from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.e2e.plain import Plain

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs.py"
LOG = os.environ.get("DSPEX_TEST_LOG", "jetstream")
"""Where the log of every system here is: with `sqlite` all of these tests can be run on the other one."""


class Running:
    """`plans` are pairs of an app and how many agents serve it; an app without a path is in `programs.py`."""

    def __init__(self, data: Path, *plans: tuple[str, int], words: Path | None = None, **options: Any) -> None:
        apps = [(app if ".py" in app else f"{PROGRAMS}:{app}", agents) for app, agents in plans]
        self.data = data
        self.spec = {"plans": apps, "data": str(data), "durability": "process", "log": LOG, **options}
        self.events: list[dict[str, Any]] = []
        self.process: subprocess.Popen[str] | None = None
        self._words = words or data.parent / f"{data.name}.stderr"
        self._reader: threading.Thread | None = None
        self._changed = threading.Condition()

    # -- life

    def launch(self) -> Running:
        """Start, without waiting for it."""
        self.events = []
        with self._words.open("ab") as words:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "launch.py"), json.dumps(self.spec)],
                stdout=subprocess.PIPE, stderr=words, text=True, start_new_session=True,
            )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()
        return self

    def start(self) -> Running:
        self.launch()
        try:
            self.event("ready")
        except BaseException:
            self.kill()
            raise
        return self

    def stop(self) -> int:
        """SIGTERM, and the exit code."""
        assert self.process
        self.process.terminate()
        return self.wait()

    def wait(self, timeout: float = 60.0) -> int:
        assert self.process and self._reader and self.process.stdout
        code = self.process.wait(timeout)
        self._reader.join(timeout)
        self.process.stdout.close()
        return code

    def kill(self) -> None:
        """SIGKILL to the root; what is below it has to notice."""
        assert self.process
        self.process.kill()
        self.wait()

    def end(self) -> None:
        """Whatever state it is in, end it."""
        if self.process is None or self.process.stdout is None:
            return
        pids = self.descendants() if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
        if not self.process.stdout.closed:
            self.wait()
        for pid in pids:
            if not gone(pid):
                os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> Running:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    # -- what it says

    @property
    def words(self) -> str:
        """What it has said on stderr."""
        return self._words.read_text(errors="replace")

    def event(self, kind: str, *, after: int = 0, timeout: float = 60.0, **fields: object) -> dict[str, Any]:
        """Wait for an event that it prints."""
        deadline = time.monotonic() + timeout
        assert self.process
        with self._changed:
            while True:
                for event in self.events[after:]:
                    if event["event"] == kind and fields.items() <= event.items():
                        return event
                assert self._reader and self._reader.is_alive(), f"it ended without {kind}: {self.words}"
                assert time.monotonic() < deadline, f"no {kind} {fields} among {self.events}\n{self.words}"
                self._changed.wait(0.5)

    def _read(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            with self._changed:
                self.events.append(json.loads(line))
                self._changed.notify_all()

    @property
    def url(self) -> str:
        return str(self.event("ready")["nats"])

    async def plain(self) -> Plain:
        return await Plain.connect(self.url, self.log_file)

    @property
    def log_file(self) -> Path | None:
        """The log, when it is a SQLite file."""
        return self.data / "log.db" if self.spec["log"] == "sqlite" else None

    # -- processes

    @property
    def root(self) -> int:
        assert self.process
        return self.process.pid

    def server(self) -> int:
        """The pid of nats-server."""
        return next(pid for pid in children(self.root) if "nats-server" in command(pid))

    def supervisor(self) -> int:
        return next(pid for pid in children(self.root) if "nats-server" not in command(pid))

    def below_supervisor(self) -> list[int]:
        """The registrar, the archivist and the agents, in the order they were born."""
        return children(self.supervisor())

    def registrar(self) -> int:
        """The registrar, or the log process that does its work, too."""
        return self._called("log-" if self.log_file is not None else "registrar-")

    def archivist(self) -> int:
        return self._called("archivist-")

    def _called(self, start: str) -> int:
        return next(pid for pid in self.below_supervisor() if called(pid).startswith(start))

    def agent_pids(self) -> list[int]:
        """The agents, in the order they were born."""
        unborn = called(self.supervisor())  # a fork has its parent's name until it takes its own
        others = ("registrar-", "log-", "archivist-", unborn)
        return [pid for pid in self.below_supervisor() if not called(pid).startswith(others)]

    def descendants(self) -> list[int]:
        found, todo = [], [self.root]
        while todo:
            below = children(todo.pop())
            found += below
            todo += below
        return found

    async def agents(self, plain: Plain, program: str) -> dict[str, int]:
        """Name to pid of the program's agents, once all of them answer."""
        planned = sum(agents for app, agents in self.spec["plans"] if app.rpartition(":")[2].lower() == program)
        deadline = time.monotonic() + 30
        while True:
            answers = await plain.discover(f"STATS.{program}", enough=planned)
            serving = {a["id"]: a["data"]["pid"] for a in answers if a["data"]["state"] == "serving"}
            if len(serving) == planned:
                return serving
            assert time.monotonic() < deadline, f"{serving} of {planned}"


def children(pid: int) -> list[int]:
    try:
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def called(pid: int) -> str:
    """The name a process shows under, at most 15 characters."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gone(pid: int) -> bool:
    """Whether a process has ended; one that waits to be reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def freeze(pid: int) -> None:
    """SIGSTOP, and wait until it stands still: a signal takes effect only when the kernel comes to it."""
    os.kill(pid, signal.SIGSTOP)
    until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", what=f"{pid} goes on")


def until(condition: Any, timeout: float = 60.0, what: str = "it did not happen") -> Any:
    """Wait until `condition()` is true and return it."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
    return found
