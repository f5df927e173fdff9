"""A loader: a fresh process that loads new code, says whether it can be loaded, and forks the agents that run it.

A supervisor cannot load a changed file itself: it has the old one. It starts Python anew beside itself, so that new
dependencies are new, too, and nobody who serves is touched before everything is known to load. Agents are forked there
twice, so that their parent is gone and the supervisor adopts them (Linux: PR_SET_CHILD_SUBREAPER); it looks after them
as after its own.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from dspex.agents.children import EXIT_TAKEN, INHERITED, Child, CloseOthers, Life, be_child
from dspex.agents.identity import take_identity
from dspex.agents.link import Link, link_pair
from dspex.core.errors import DspexError
from dspex.core.program import Program

__all__ = ["LOADER", "Loader", "can_reload", "main"]

LOADER = "loader"
PATIENCE = 10.0
"""Seconds that a loader gets to fork an agent, which takes it milliseconds."""
PR_SET_CHILD_SUBREAPER = 36
_BEGIN = "import sys, json; sys.path[:] = json.loads(sys.argv[3]); from dspex.compose.loader import main; main()"


def can_reload() -> bool:
    """Have the kernel give us the processes that our children leave behind; False where it cannot (not Linux)."""
    if sys.platform != "linux" or not sys.executable:
        return False
    try:
        return bool(ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)
    except (OSError, AttributeError):
        return False


class Loader:
    """The supervisor's side of one: a child to look after, and somebody to ask for agents. `apps` are pairs of an app
    and the program wanted of it ("" for all). With `replace` its agents may change the schemas of their program."""

    def __init__(self, name: str, apps: list[tuple[str, str]], debug: bool, replace: bool) -> None:
        self.name, self._apps, self._debug, self.replace = name, apps, debug, replace
        self._forks: socket.socket | None = None

    def child(self) -> Child:
        return Child(self.name, LOADER, self._start, shutdown=2.0)

    def fork(self, program: str, about: dict[str, Any], life: Life, identity: Path) -> tuple[int, Link]:
        """Have an agent of a program forked; `about` is its AgentSpec without the program. Raises OSError when the
        loader is not there to do it."""
        if self._forks is None:
            raise OSError(f"{self.name} does not run, and has the code")
        ours, theirs = link_pair()
        wanted = {"program": program, "spec": about, "life": life, "identity": str(identity)}
        body = msgspec.json.encode(wanted) + b"\n"
        try:
            with theirs.release() as end:
                sent = socket.send_fds(self._forks, [body], [end.fileno()])
                self._forks.sendall(body[sent:])
            answer = json.loads(_line(self._forks))
        except (OSError, ValueError) as error:
            self._forks.close()
            self._forks = None
            ours.close()
            raise OSError(f"{self.name} did not start an agent: {error}") from None
        if "error" in answer:
            ours.close()
            raise OSError(f"{self.name} could not start an agent: {answer['error']}")
        return int(answer["pid"]), ours

    def _start(self, life: Life, close_others: CloseOthers) -> tuple[int, Link | None]:
        if self._forks:
            self._forks.close()
        ours, theirs = link_pair()
        self._forks, forks = socket.socketpair()
        self._forks.settimeout(PATIENCE)
        with theirs.release() as line, forks:
            arguments = [
                sys.executable, "-c", _BEGIN, str(line.fileno()), str(forks.fileno()), json.dumps(sys.path),
                json.dumps({"name": self.name, "apps": self._apps, "debug": self._debug}),
            ]  # fmt: skip
            pid = os.fork()
            if not pid:
                try:
                    for end in (line, forks):
                        os.set_inheritable(end.fileno(), True)
                    os.execv(sys.executable, arguments)
                finally:
                    os._exit(70)
        return pid, ours


def _line(sock: socket.socket) -> bytes:
    """One line, waited for. Raises OSError when the other side is gone."""
    found = b""
    while not found.endswith(b"\n"):
        data = sock.recv(65536)
        if not data:
            raise OSError("it has ended")
        found += data
    return found


# -- the process itself


def main() -> None:
    """Be a loader until the line to the supervisor breaks. Called with the numbers of two sockets, and what to load."""
    line, forks = (socket.socket(fileno=int(text)) for text in sys.argv[1:3])
    about = json.loads(sys.argv[4])
    sys.argv[:] = [sys.executable]
    for end in (line, forks):
        end.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the root, which ends all of us in order
    with suppress(OSError):
        Path("/proc/self/comm").write_text(about["name"][:15])
    sys.exit(_Process(Link(line), forks).run(about))


class _Process:
    def __init__(self, link: Link, forks: socket.socket) -> None:
        self._link, self._forks = link, forks
        self._programs: dict[str, type[Program]] = {}

    def run(self, about: dict[str, Any]) -> int:
        try:
            self._load(about)
        except DspexError as error:
            self._link.send({"unloaded": str(error)})  # whoever wanted it ends us
        self._link.send({"state": "serving"})
        beaten = time.monotonic()
        while self._link.open:
            line, forks = self._link.fileno(), self._forks.fileno()
            ready, _, _ = select.select([line, forks], [], [], 1.0)
            if line in ready:
                self._link.receive()
            if forks in ready and not self._serve():
                break
            if time.monotonic() - beaten >= 1.0:
                beaten = time.monotonic()
                self._link.send({"beat": True})
        return 0

    def _load(self, about: dict[str, Any]) -> None:
        from dspex.agents import agent  # so that every agent is born with it
        from dspex.compose.plans import About, Plan, check_names, programs_of
        from dspex.compose.root import logging_to_stderr

        assert agent
        logging_to_stderr(about["debug"])
        found = [program for app, name in about["apps"] for program in programs_of(Plan(app, name=name))]
        check_names(found)
        self._programs = {program.name: program for program in found}
        self._link.send({"loaded": [msgspec.to_builtins(About.of(program)) for program in found]})
        gc.collect()
        gc.freeze()  # what is loaded now is shared by all agents; collecting it would copy its pages

    def _serve(self) -> bool:
        """Fork one agent; False when nobody asks any more."""
        body, descriptors = b"", list[int]()
        while not body.endswith(b"\n"):
            data, more, _, _ = socket.recv_fds(self._forks, 65536, 1)
            if not data:
                return False
            body, descriptors = body + data, descriptors + more
        try:
            answer: dict[str, Any] = {"pid": self._born(json.loads(body), descriptors[0])}
        except (OSError, KeyError, IndexError, msgspec.ValidationError) as error:
            answer = {"error": str(error) or type(error).__name__}
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        self._forks.sendall(json.dumps(answer).encode() + b"\n")
        return True

    def _born(self, wanted: dict[str, Any], descriptor: int) -> int:
        """An agent, whose parent ends at once: the pid."""
        from dspex.agents.agent import AgentSpec, agent_main

        program = self._programs.get(wanted["program"])
        if program is None:
            raise OSError(f"it has no program {wanted['program']}")
        hints = get_type_hints(AgentSpec)
        about = {name: msgspec.convert(value, hints[name]) for name, value in wanted["spec"].items()}
        spec, life = AgentSpec(program=program, **about), msgspec.convert(wanted["life"], Life)
        reading, writing = os.pipe()
        try:
            ends = descriptor, reading, writing
            between = _forked(lambda: self._fork_agent(lambda line: agent_main(line, life, spec), wanted, ends))
            os.waitpid(between, 0)
            os.set_blocking(reading, False)
            return int.from_bytes(os.read(reading, 8), "big")
        finally:
            os.close(reading)
            os.close(writing)

    def _fork_agent(
        self, agent: Callable[[Link], int], wanted: dict[str, Any], ends: tuple[int, int, int]
    ) -> None:
        """In the process between us and the agent."""
        descriptor, reading, writing = ends
        before = signal.pthread_sigmask(signal.SIG_BLOCK, INHERITED)
        pid = os.fork()
        if pid:
            os.write(writing, pid.to_bytes(8, "big"))
            return

        def begin() -> None:
            self._link.close()
            self._forks.close()
            os.close(reading)
            os.close(writing)
            if not take_identity(Path(wanted["identity"])):
                os._exit(EXIT_TAKEN)

        be_child(agent, Link(socket.socket(fileno=descriptor)), before, begin)


def _forked(work: Callable[[], None]) -> int:
    """A process that does this and ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    return pid
