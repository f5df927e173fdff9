"""A program made into a running system: `with QABot.to_agent_system() as system: system.ask(question="…")`."""

from __future__ import annotations

import asyncio
import getpass
import os
import signal
import threading
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import msgspec

from dspex.agents.link import Link, link_pair
from dspex.compose.caller import Caller
from dspex.compose.root import Plan, SystemSpec, run_root
from dspex.compose.settings import SECURE
from dspex.core.access import Role
from dspex.core.errors import ConfigurationError, DspexError, InvalidInput
from dspex.core.program import Program
from dspex.core.schema import Schema
from dspex.core.upkeep import Upkeep

__all__ = ["System"]

T = TypeVar("T")
START_TIMEOUT = 60.0


class System:
    """A running system of one program: server, supervisor, registrar and agents, in processes of their own.

    Enter it with `with` or `async with`; leaving it drains the agents and ends every process. The processes are
    forked from this one, so the program may be defined anywhere, also in a notebook.

    `agents` is how many processes serve the program, `data` the folder of the log, `nats` the URL of a server to use
    instead of an own one, `durability` "power" (fsync before every acknowledgement) or "process" (survives any crash
    of ours), `log` "jetstream", "sqlite" or what a distribution adds; `archive` False keeps no archive beside the log
    in JetStream; `master` refers to the master key of private values (`env:NAME`); `upkeep` says how the agents are
    looked after. With `secure` it has access rules and TLS, and is asked as its console; `credentials` names a context
    for a server of somebody else's. Keyword arguments in `values` set variables. Raises ConfigurationError when it
    cannot be started.
    """

    def __init__(
        self, program: type[Program], *, agents: int = 1, data: str | Path = ".dspex", nats: str | None = None,
        durability: Literal["power", "process"] = "power", prefix: str = "dspex", replace: bool = False,
        archive: bool = True, log: str = "jetstream", master: str = "", secure: bool = False,
        credentials: str | None = None, values: dict[str, Any] | None = None, upkeep: Upkeep | None = None,
    ) -> None:  # fmt: skip
        program(**(values or {}))  # a bad value is refused here, not in another process
        if agents < 1:
            raise ConfigurationError(f"agents = {agents}: a system needs one at least")
        self.program = program
        plan = Plan(agents=agents, program=program, values=values or {}, upkeep=upkeep or Upkeep())
        self._spec = SystemSpec(
            [plan], data=Path(data), nats=nats, durability=durability, prefix=prefix, replace=replace, archive=archive,
            log=log, master=master, secure=secure, credentials=credentials,
        )  # fmt: skip
        self.url = ""
        self._pid = 0
        self._link: Link | None = None
        self._caller: Caller | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # -- life

    def __enter__(self) -> Self:
        self._launch()
        try:
            self._wait_ready()
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._loop.run_forever, name="dspex-system", daemon=True)
            self._thread.start()
            self._caller = self._run(self._connect())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._caller:
            self._run(self._caller.close())
        self._end()

    async def __aenter__(self) -> Self:
        self._launch()
        try:
            await asyncio.to_thread(self._wait_ready)
            self._caller = await self._connect()
        except BaseException:
            await asyncio.to_thread(self._end)
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._caller:
            await self._caller.close()
        await asyncio.to_thread(self._end)

    # -- the doors; each blocking call has an async twin

    def ask(
        self, input: Schema | None = None, /, *, timeout: float = 60.0, key: str | None = None,
        retries: int | None = 0, **fields: object,
    ) -> Any:  # fmt: skip
        """Run and wait; the Output. Raises TaskError.

        After a connection that broke, `ask` or `result` with the same `key` finds the task again. `retries` is how
        often to ask again, within `timeout`, when there is no room for the task now; None: as often as time allows.
        """
        return self._run(self.aask(input, timeout=timeout, key=key, retries=retries, **fields))

    async def aask(
        self, input: Schema | None = None, /, *, timeout: float = 60.0, key: str | None = None,
        retries: int | None = 0, **fields: object,
    ) -> Any:  # fmt: skip
        content = self._body(input, fields)
        body, _ = await self._doors.ask(self.program.name, content, timeout=timeout, key=key, retries=retries)
        return self.program.Output.decode(body)

    def submit(self, input: Schema | None = None, /, *, key: str | None = None, **fields: object) -> str:
        """Store a task and return its id; `result` gives the output."""
        return self._run(self.asubmit(input, key=key, **fields))

    async def asubmit(self, input: Schema | None = None, /, *, key: str | None = None, **fields: object) -> str:
        return await self._doors.submit(self.program.name, self._body(input, fields), key=key)

    def result(self, task: str, *, timeout: float = 60.0) -> Any:
        """The Output of a task by id or key, waited for. Raises TaskError."""
        return self._run(self.aresult(task, timeout=timeout))

    async def aresult(self, task: str, *, timeout: float = 60.0) -> Any:
        return self.program.Output.decode(await self._doors.result(self.program.name, task, timeout=timeout))

    def score(self, task: str, score: float, feedback: str = "") -> None:
        """Say how good a task's output was."""
        self._run(self.ascore(task, score, feedback))

    async def ascore(self, task: str, score: float, feedback: str = "") -> None:
        await self._doors.score(self.program.name, task, score, feedback)

    def forget(self, task: str, reason: str = "", *, force: bool = False) -> dict[str, Any]:
        """Have the private values and large objects of a task forgotten, for good. Raises Conflict, NotFound."""
        return self._run(self.aforget(task, reason, force=force))

    async def aforget(self, task: str, reason: str = "", *, force: bool = False) -> dict[str, Any]:
        return await self._doors.forget(task, reason, actor=getpass.getuser(), force=force)

    def retry(self, task: str, *, clean: bool = False, values: Mapping[str, Any] | None = None) -> str:
        """Submit a task that ended without an output again, and give the new one's id; the same retry twice is one
        task. It goes on with what was recorded, unless `clean`. Raises Conflict, NotFound, InvalidInput."""
        return self._run(self.aretry(task, clean=clean, values=values))

    async def aretry(self, task: str, *, clean: bool = False, values: Mapping[str, Any] | None = None) -> str:
        who, name = getpass.getuser(), self.program.name
        found = await self._doors.retry(task, program=name, clean=clean, values=values, actor=who)
        return str(found["retried"])

    def drop(self, task: str, why: str) -> None:
        """Have nothing more done about a task that ended without an output. Raises Conflict, NotFound."""
        self._run(self.adrop(task, why))

    async def adrop(self, task: str, why: str) -> None:
        await self._doors.drop(task, why, program=self.program.name, actor=getpass.getuser())

    def events(self, task: str) -> list[dict[str, Any]]:
        """A task's events, oldest first, as CloudEvents."""
        return self._run(self.aevents(task))

    async def aevents(self, task: str) -> list[dict[str, Any]]:
        return [event async for event in self._doors.events(task=task)]

    def processes(self) -> list[dict[str, Any]]:
        """What runs, one dict a process."""
        return self._run(self.aprocesses())

    async def aprocesses(self) -> list[dict[str, Any]]:
        return await self._doors.processes()

    # -- inside

    async def _connect(self) -> Caller:
        spec = self._spec
        console = str(spec.data.absolute() / SECURE / f"{Role.CONSOLE}.json") if spec.secure else spec.credentials
        return await Caller.connect(self.url, prefix=spec.prefix, wait=10.0, credentials=console)

    @property
    def _doors(self) -> Caller:
        if self._caller is None:
            raise ConfigurationError("the system does not run; use it inside `with` or `async with`")
        return self._caller

    def _body(self, input: Schema | None, fields: dict[str, object]) -> bytes:
        if input is not None:
            if fields or not isinstance(input, self.program.Input):
                raise InvalidInput(f"give one {self.program.__name__}.Input, or its fields by name")
            return input.encode()
        try:
            return msgspec.json.encode(fields)
        except TypeError:
            checked: bytes = self.program.Input(**fields).encode()
            return checked

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise ConfigurationError("the system does not run with `with`; inside `async with` use the async twins")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _launch(self) -> None:
        ours, theirs = link_pair()
        pid = os.fork()
        if pid == 0:
            self._be_root(ours, theirs)
        theirs.close()
        self._pid, self._link = pid, ours

    def _be_root(self, ours: Link, theirs: Link) -> None:
        """In the forked process: run the system; never return into the caller's code."""
        code = 1
        try:
            ours.close()
            os.setsid()  # a Ctrl-C in the terminal is for the caller, who then ends us in order
            signal.set_wakeup_fd(-1)
            try:
                code = run_root(self._spec, parent=theirs)
            except DspexError as error:
                theirs.send({"event": "refused", "reason": str(error)})
        finally:
            os._exit(code)

    def _wait_ready(self) -> None:
        assert self._link
        until = time.monotonic() + START_TIMEOUT
        while time.monotonic() < until:
            for event in self._link.receive():
                if event.get("event") == "ready":
                    self.url = event["nats"]
                    return
                if event.get("event") == "refused":
                    raise ConfigurationError(event["reason"])
            if not self._link.open:
                raise ConfigurationError("the system ended while it was being started; its messages are above")
            time.sleep(0.005)
        raise ConfigurationError(f"the system did not start within {START_TIMEOUT:.0f} s")

    def _end(self) -> None:
        if self._pid:
            try:
                os.kill(self._pid, signal.SIGTERM)
                os.waitpid(self._pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
            self._pid = 0
        if self._link:
            self._link.close()
        if self._loop and self._thread:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
        self._loop = self._caller = None
