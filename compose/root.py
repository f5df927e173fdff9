"""The processes of a system and how they stand above each other.

    root          what `dspex up` started: looks after the two below it, and prints
    ├── server       nats-server, when it is ours
    └── supervisor   has the programs loaded and forks the ones below it
        ├── registrar    (or log, when it owns the log, too)
        ├── archivist
        └── agents

A process that dies is started again by the one above it. When the root dies, all of them end within a second.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dspex.agents.bounds import Bounds
from dspex.agents.children import EXIT_REFUSED, Child, CloseOthers, Life, fork_child
from dspex.agents.link import Link
from dspex.agents.resources import in_force
from dspex.agents.supervisor import Supervisor
from dspex.agents.titles import be_called
from dspex.bus.blocks import last_position
from dspex.bus.health import Health, end_of_stream
from dspex.bus.server import Server
from dspex.compose.folder import Folder
from dspex.compose.plans import About, Plan, check_names, programs_of
from dspex.compose.secure import Secured, adopt_log, is_secured
from dspex.core.access import LOG_ACCOUNT, Role
from dspex.core.doors import Marks
from dspex.core.errors import ConfigurationError, DspexError, LogCorrupt
from dspex.core.program import Program
from dspex.core.subjects import Subjects
from dspex.core.supervision import SupervisorSpec
from dspex.core.upkeep import Named, arranged, stop_time
from dspex.store.backends import JETSTREAM, LOG_FILE, SQLITE, factory_of

__all__ = ["Plan", "SystemSpec", "run_root", "secure"]

SUPERVISOR, REGISTRAR, LOG, ARCHIVIST, SERVER = "supervisor", "registrar", "log", "archivist", "server"


@dataclass(frozen=True)
class SystemSpec:
    """A system to run: what, on which data folder, on whose server (None: our own), and where its log is. `limits` are
    those of the configuration by scope, `began` is since when they count (seconds since the epoch)."""

    plans: Sequence[Plan]
    data: Path = Path(".dspex")
    nats: str | None = None
    port: int = 0
    credentials: str | None = None
    prefix: str = "dspex"
    durability: Literal["power", "process"] = "process"
    log: str = JETSTREAM
    replace: bool = False
    archive: bool = True
    debug: bool = False
    retention: Bounds = field(default_factory=Bounds)
    secure: bool = False
    host: str = "127.0.0.1"
    master: str = ""
    watch: bool = False
    """Reload the programs when the author's files change."""
    limits: dict[str, dict[str, str]] = field(default_factory=dict)
    began: float = field(default_factory=time.time)
    marks: Marks = field(default_factory=Marks)
    supervisors: tuple[Named, ...] = ()


def run_root(
    spec: SystemSpec, *, parent: Link | None = None, on_event: Callable[[dict[str, Any]], None] = lambda event: None
) -> int:
    """Run a system until told to stop. Raises ConfigurationError before anything is started.

    `on_event` hears `{"event": "loaded", "programs"}` when the programs are found, `{"event": "ready", "nats", "data"}`
    once everything serves, then what dies and comes back, and `{"event": "refused", "reason"}` when it cannot run; that
    goes to `parent`, too.
    """
    logging_to_stderr(spec.debug)
    if spec.master:
        from dspex.agents.vault import master_from

        master_from(spec.master)  # refused here, not in another process
    if spec.log != JETSTREAM:
        factory_of(spec.log)
        if spec.retention.any:
            raise ConfigurationError(
                f"[retention] is for the log {JETSTREAM}, whose archive keeps what it forgets; the log {spec.log} is "
                "its own archive and forgets nothing: take [retention] out"
            )
    folder = Folder(spec.data)
    be_called(f"root-{folder.name}")
    server: Server | None = None
    try:
        secured = secure(spec, folder)
        if spec.nats is None or spec.log != JETSTREAM:
            folder.keep_to(spec.log)
        if spec.nats is None:
            server = Server(
                folder.path / "server", port=spec.port, durability=spec.durability, host=spec.host,
                access=secured.access if secured else None,
            )  # fmt: skip
            _start(server, spec.prefix, on_event, secured)
        url = spec.nats or (server.url if server else "")
        root = _Root(spec, folder, server, url, secured, parent, on_event)
        root.supervisor.run()
        return root.status
    finally:
        if server:
            server.stop()
        folder.close()


def secure(spec: SystemSpec, folder: Folder) -> Secured | None:
    """The identities that a system runs with, made where they are missing; None for a system open to all.

    A folder that has identities is never run without them: its log is in an account that nobody else sees. Raises
    ConfigurationError.
    """
    if not spec.secure:
        if spec.nats is None and is_secured(folder.path):
            raise ConfigurationError(
                f"the system in {spec.data} has access rules; run it with --secure, or choose another folder (--data)"
            )
        return None
    if spec.log != JETSTREAM:
        raise ConfigurationError(
            f"a system whose log is {spec.log} has no access rules yet: leave out --secure, or --log {spec.log}"
        )
    secured = Secured(folder.path, spec.prefix)
    hosts = [] if spec.host in ("127.0.0.1", "0.0.0.0", "::") else [spec.host]
    secured.add(programs=_names_in(spec.plans), hosts=hosts)
    if spec.nats is None:
        adopt_log(folder.path / "server", LOG_ACCOUNT, Subjects(spec.prefix).stream)
    return secured


def _names_in(plans: Sequence[Plan]) -> list[str]:
    """The programs of these plans. They are loaded in a process that ends again, for this one must stay small and
    forks; it is none of its business when they cannot be: the supervisor says so when it comes to it."""
    names, ours = [plan.program.name for plan in plans if plan.program], [plan for plan in plans if not plan.program]
    if not ours:
        return names
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
            found = [program.name for plan in ours for program in programs_of(plan)]
            with os.fdopen(writing, "w") as stream:
                json.dump(found, stream)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        said = stream.read()
    os.waitpid(pid, 0)
    return [*names, *json.loads(said or "[]")]


class _Root:
    def __init__(
        self, spec: SystemSpec, folder: Folder, server: Server | None, url: str, secured: Secured | None,
        parent: Link | None, on_event: Callable[[dict[str, Any]], None],
    ) -> None:  # fmt: skip
        self.spec, self.folder, self.server, self.url, self.parent = spec, folder, server, url, parent
        self.secured, self.tell, self.status, self.ready = secured, on_event, 0, False
        self.health = Health(server) if server else None
        children = [
            Child(f"{SUPERVISOR}-{folder.name}", SUPERVISOR, self._start_supervisor, shutdown=15.0 + _stop_time(spec)),
        ]
        if server:
            children.insert(0, Child(f"{SERVER}-{folder.name}", SERVER, self._start_server, look=self._look_at_server))
        tree = SupervisorSpec(f"root-{folder.name}", tuple(children), beyond="retry")
        self.supervisor = Supervisor(tree, parent=parent, on_event=self._on_event, above=self._myself)

    def _myself(self) -> list[dict[str, Any]]:
        return [
            {"agent": f"root-{self.folder.name}", "program": None, "role": "root", "pid": os.getpid(),
             "state": "serving", "restarts": 0, "supervisor": None, "why": ""}
        ]  # fmt: skip

    def _start_server(self, life: Life, close_others: CloseOthers) -> tuple[int, Link | None]:
        assert self.server is not None
        _start(self.server, self.spec.prefix, self._say, self.secured)
        return self.server.pid, None

    def _look_at_server(self) -> None:
        assert self.health and self.server
        if self.server.refresh() and self.secured and not self.secured.in_force:
            self.secured.note_in_force()
            self._say({"event": "rules", "agent": SERVER, "reason": "the access rules have changed, and are in force"})
        sentence = self.health.look()
        if sentence:
            self._say({"event": "trouble" if self.health.trouble else "better", "agent": SERVER, "reason": sentence})

    def _start_supervisor(self, life: Life, close_others: CloseOthers) -> tuple[int, Link | None]:
        def run(link: Link) -> int:
            if self.server:
                self.server.disown()
            return _supervise(link, life, self.spec, self.folder, self.url, self.secured)

        return fork_child(run, close_others)

    def _on_event(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if kind == "all-serving":
            if not self.ready:
                self.ready = True
                if self.secured:
                    Secured(self.folder.path, self.spec.prefix).announce(self.url)
                    if self.server and not self.server.stale:
                        self.secured.note_in_force()
                self.folder.announce(self.url, self.spec.prefix)
                self._say({"event": "ready", "nats": self.url, "data": str(self.folder.path)})
            return
        if kind == "crashed" and event["role"] == SERVER and self.health and self.health.ended:
            self.health.ended = False
            return
        if kind == "stop":
            self.supervisor.stop()
        if kind == "nothing-serves" or (kind == "refused" and not self.ready):
            self.status = 1
            self.supervisor.stop()
        self._say(event)

    def _say(self, event: dict[str, Any]) -> None:
        self.tell(event)
        if self.parent and self.parent.open:
            self.parent.send(event)


def _start(server: Server, prefix: str, say: Callable[[dict[str, Any]], None], secured: Secured | None) -> None:
    """Start our server. When it has cut off the damaged end of the log, see that nobody gets those positions again."""
    if server.alive():
        return
    subjects = Subjects(prefix)
    top = -1
    try:
        top = last_position(server.data, subjects.stream, prefix)
        server.start()
    except (ConfigurationError, LogCorrupt) as error:
        if not top:  # there is no log that could be damaged
            raise
        raise ConfigurationError(
            f"{error}. If it never comes up, its files are damaged: `dspex restore --replace` puts them aside"
        ) from None
    end = end_of_stream(server, subjects.stream) if top else None
    if end is None or end >= top:
        return
    reason = (
        f"nats-server found its newest block damaged and has lost the log's positions {end + 1} to {top}. What the "
        "archive has of them, `dspex restore --replace` brings back; the archive names the others as a gap"
    )
    say({"event": "trouble", "agent": SERVER, "reason": reason})

    def keep(link: Link) -> int:
        import asyncio

        from dspex.agents.restoring import keep_positions

        server.disown()
        asyncio.run(keep_positions(server.url, subjects, top, secured.context(Role.OPERATOR) if secured else None))
        return 0

    pid, line = fork_child(keep, lambda: None)
    line.close()
    os.waitpid(pid, 0)


def _supervise(link: Link, life: Life, spec: SystemSpec, folder: Folder, url: str, secured: Secured | None) -> int:
    """The supervisor's process: load everything once, then fork agents that have it already."""
    be_called(f"{SUPERVISOR}-{folder.name}")
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")  # many agents share the machine; and threads and forks do not mix
    try:
        plans = [(plan, program) for plan in spec.plans for program in programs_of(plan)]
        check_names([program for _, program in plans])
    except DspexError as error:
        if life.restarts:  # it has served: whoever edits the file will mend it
            link.send({"why": str(error)})
            return 1
        link.send({"refused": str(error)})
        return EXIT_REFUSED
    link.send({"event": "loaded", "programs": [_about(plan, program) for plan, program in plans]})
    # Imported here, so that every agent is born with them and the root stays small.
    from dspex.agents.agent import AgentSpec, agent_main
    from dspex.agents.archivist import ARCHIVE, ArchivistSpec, archivist_main, known_log
    from dspex.agents.registrar import RegistrarSpec, registrar_main
    from dspex.compose.steering import Born, Steering

    name = folder.name

    def credentials(role: Role, program: str = "") -> str | None:
        return secured.context(role, program) if secured else spec.credentials

    ours = spec.archive and spec.nats is None and spec.log == JETSTREAM
    known = known_log(folder.path / ARCHIVE) if ours else None
    is_log = spec.log == SQLITE
    archivist = ArchivistSpec(
        f"{ARCHIVIST}-{name}", url, folder.path / (LOG_FILE if is_log else ARCHIVE), spec.prefix,
        credentials(Role.ARCHIVIST), bounds=spec.retention, master=spec.master, known=known,
        served=spec.log != JETSTREAM, is_log=is_log,
    )  # fmt: skip
    role = REGISTRAR if spec.log == JETSTREAM else LOG
    registrar = RegistrarSpec(
        f"{role}-{name}", url, spec.prefix, credentials(Role.REGISTRAR), known=known, log=spec.log, folder=folder.path,
        durability=spec.durability, alone=spec.nats is None, master=spec.master, limits=spec.limits,
        limits_since=spec.began,
        marks=spec.marks,
    )  # fmt: skip

    def start_registrar(life: Life, close: CloseOthers) -> tuple[int, Link | None]:
        return fork_child(lambda line: registrar_main(line, life, registrar), close)

    def start_archivist(life: Life, close: CloseOthers) -> tuple[int, Link | None]:
        return fork_child(lambda line: archivist_main(line, life, archivist), close)

    def called(about: About, number: int) -> str:
        return f"{about.program}-{name}-{number}"

    def described(about: About, plan: Plan, number: int) -> dict[str, Any]:
        """An AgentSpec without its program."""
        return {
            "name": called(about, number), "url": url, "prefix": spec.prefix, "app": plan.app,
            "credentials": credentials(Role.AGENT, about.program), "replace": spec.replace, "values": plan.values,
            "code": about.code, "master": spec.master, "max_queue": plan.max_queue,
            "upkeep": plan.upkeep, "number": number,
        }  # fmt: skip

    def own(about: About, plan: Plan, number: int) -> Born:
        agent = AgentSpec(program=classes[about.program], **described(about, plan, number))
        return lambda life, close: fork_child(lambda line: agent_main(line, life, agent), close)

    def child(about: About, plan: Plan, number: int, born: Born) -> Child:
        return Child(
            called(about, number), "agent", born, program=about.program, restart=plan.upkeep.restart,
            shutdown=plan.upkeep.shutdown, blocked_after=plan.upkeep.blocked_after,
        )  # fmt: skip

    classes = {program.name: program for _, program in plans}
    group = f"programs-{name}"
    steering = Steering(
        f"{SUPERVISOR}-{name}", name, [(plan, About.of(program)) for plan, program in plans], group=group, child=child,
        own=own, spec=described, identities=folder.path / "identities", kept=life.kept, replace=spec.replace,
        watch=spec.watch, debug=spec.debug, may_grow=secured is None,
    )  # fmt: skip
    children: list[Child | SupervisorSpec] = [Child(registrar.name, registrar.role, start_registrar)]
    if spec.archive:
        children.append(Child(archivist.name, ARCHIVIST, start_archivist))
    top = arranged(steering.children(), spec.supervisors)
    children.append(SupervisorSpec(group, top, beyond="retry", ordered=False))
    tree = SupervisorSpec(f"{SUPERVISOR}-{name}", tuple(children), beyond="retry")
    gc.collect()
    gc.freeze()  # what is loaded now is shared by all agents; collecting it would copy its pages

    def forward(event: dict[str, Any]) -> None:
        if event["event"] in ("draining", "limit"):  # the rest is told by itself
            link.send(event)
        steering.heard(event)

    supervisor = Supervisor(
        tree, parent=link, voice=registrar.name, on_event=forward, on_word=steering.word, on_tick=steering.tick,
        identities=folder.path / "identities", life=life,
    )  # fmt: skip
    steering.attach(supervisor)
    return supervisor.run()


def _stop_time(spec: SystemSpec) -> float:
    """Seconds that the agents get to end, when the programs are not known yet."""
    each = [plan.upkeep.shutdown for plan in spec.plans for _ in range(max(plan.agents, plan.bounds.most))]
    return stop_time(each, named=bool(spec.supervisors))


def _about(plan: Plan, program: type[Program]) -> dict[str, Any]:
    about = program.describe()
    return {
        "program": about.name, "doc": about.doc, "agents": plan.agents, "app": plan.app,
        "input_schema": about.input_schema, "confined": in_force(plan.upkeep),
    }  # fmt: skip


def logging_to_stderr(debug: bool = False) -> None:
    """The log of a dspex process: one line a record on stderr, tracebacks only when debugging."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Plain(debug))
    root = logging.getLogger("dspex")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if debug else logging.WARNING)
    root.propagate = False
    logging.getLogger("nats").setLevel(logging.DEBUG if debug else logging.CRITICAL)


class _Plain(logging.Formatter):
    def __init__(self, debug: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
        self._debug = debug

    def formatException(self, ei: Any) -> str:
        if self._debug:
            return super().formatException(ei)
        return f"{ei[0].__name__}: {ei[1]} (run with --debug for the traceback)"


