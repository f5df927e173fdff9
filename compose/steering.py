"""Steers a supervisor's agents: scales programs, rolls them over to new code, and ends agents that somebody names.

What there should be is decided in `core.fleet`; here it is done, with children that are added to and removed from the
supervisor while it runs. Everything happens in the supervisor's one thread: what is asked for comes through its voice,
and is done at the end of a turn of its loop. What somebody scaled by hand is kept by the supervisor's parent, and so
outlives the supervisor; a new `dspex up` begins with what it was started with.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from msgspec import convert

from dspex.agents.children import Child, CloseOthers, Life
from dspex.agents.link import Link
from dspex.agents.supervisor import Supervisor
from dspex.compose.loader import LOADER, Loader
from dspex.compose.plans import About, Plan
from dspex.compose.reloading import Reload, Watcher, compared
from dspex.core.errors import Conflict, DspexError, InvalidInput, NotFound, TaskError
from dspex.core.fleet import Action, Begin, Fleet, Leave, Rolled, RolledBack
from dspex.core.scaling import Scale
from dspex.core.supervision import SupervisorSpec

__all__ = ["Steering"]

logger = logging.getLogger("dspex.compose")

LOAD_TIME = 120.0
"""Seconds in which new code must have been loaded."""
Born = Callable[[Life, CloseOthers], tuple[int, Link | None]]


@dataclass
class _Served:
    """A program: by which plan, how many, why, and what is known of each generation of its code."""

    plan: Plan
    scale: Scale
    by: str = ""
    why: str = ""
    notice: str = ""
    about: dict[int, About] = field(default_factory=dict)
    code: str = ""
    """The code version that tasks are taken with now."""


class Steering:
    """The agents of one supervisor, `name`. `child` makes an agent's process out of (about it, plan, number, how it is
    born); `own` is how one is born with the code that the supervisor itself has. `group` is the supervisor in the tree
    that those of the programs are under, and `kept` is what the supervisor before us left."""

    def __init__(
        self, name: str, system: str, served: Iterable[tuple[Plan, About]], *, group: str,
        child: Callable[[About, Plan, int, Born], Child], own: Callable[[About, Plan, int], Born],
        spec: Callable[[About, Plan, int], dict[str, Any]],
        identities: Path, kept: dict[str, Any], replace: bool = False, watch: bool = False, debug: bool = False,
        may_grow: bool = True,
    ) -> None:  # fmt: skip
        self.name, self._system, self._group, self._identities = name, system, group, identities
        self._child, self._own, self._spec = child, own, spec
        self._replace, self._debug, self._may_grow = replace, debug, may_grow
        self.fleet = Fleet()
        self._loaders: dict[int, Loader] = {}
        self._generation = 0
        self._reload: Reload | None = None
        self._last: Reload | None = None
        self._watcher = Watcher() if watch else None
        self._loads: dict[str, dict[str, int]] = {}
        self._events: deque[Callable[[], None]] = deque()
        self._told: Any = None
        self._told_at = 0.0
        self._served = {about.program: _first(plan, about, kept) for plan, about in served}
        self._kept_codes: dict[str, str] = dict(kept.get("codes", {}))

    def children(self) -> tuple[SupervisorSpec, ...]:
        """What the supervisor begins with."""
        groups = []
        for name, it in self._served.items():
            begun = self.fleet.serve(name, it.plan.agents)
            agents = tuple(self._made(each) for each in begun if isinstance(each, Begin))
            groups.append(it.plan.upkeep.over(name, agents))
        return tuple(groups)

    def attach(self, supervisor: Supervisor) -> None:
        """Steer this one from now on. What a supervisor before us did and could not say any more is said now."""
        self._supervisor = supervisor
        for name, it in self._served.items():
            if it.notice:
                self._note_scaled(name, it)
            was = self._kept_codes.get(name, it.code)
            if was != it.code:
                self._note_reloaded(name, it.code, was, "the supervisor, which was started again")
        self._keep()

    # -- what the supervisor tells us

    def heard(self, event: dict[str, Any]) -> None:
        """An event of the supervisor."""
        kind, name, role = event["event"], event.get("agent", ""), event.get("role")
        if role == LOADER:
            if kind in ("gave-up", "crashed"):
                self._events.append(lambda: self._not_loaded(name, event.get("reason", "")))
        elif role == "agent":
            program, number = self._who(name)
            if kind == "serving":
                self._events.append(lambda: self._do(self.fleet.serves(program, number)))
            elif kind in ("crashed", "refused", "gave-up"):
                self._events.append(lambda: self._do(self.fleet.down(program, number, event.get("reason", ""))))
            elif kind == "gone":
                self._loads.pop(name, None)
                self._events.append(lambda: self._do(self.fleet.gone(program, number)))

    def word(self, name: str, message: dict[str, Any]) -> None:
        """What a child says."""
        if message.get("load"):
            self._loads[name] = message["load"]
        if message.get("state") == "draining":
            self._events.append(lambda: self._do(self.fleet.takes_no_more(*self._who(name))))
        if message.get("loaded"):
            self._events.append(lambda: self._loaded(name, convert(message["loaded"], list[About])))
        if "unloaded" in message:
            self._events.append(lambda: self._not_loaded(name, message["unloaded"]))
        if "control" in message:
            self._events.append(lambda: self._control(message))
        if "scale_to" in message:
            wanted = message["scale_to"]
            self._events.append(lambda: self._follow(wanted["program"], wanted["agents"], wanted["why"]))

    def tick(self) -> None:
        """Do what is to be done; called at the end of every turn of the supervisor's loop."""
        while self._events:
            try:
                self._events.popleft()()
            except Exception:  # what was asked for must not end the supervisor, and with it everybody
                logger.exception("%s could not do what was to be done", self.name)
        now = time.monotonic()
        reload = self._reload
        if reload and reload.loading and now - reload.begun > LOAD_TIME:
            self._not_loaded(reload.loader.name, f"it was not loaded within {LOAD_TIME:.0f} s")
        self._drop_loaders()
        if self._watcher and self._reload is None and self._watcher.changed(now, self._files()):
            try:
                self._begin_reload(Reload(by="--reload", replace=self._replace))
            except TaskError as error:
                self._up({"event": "not-reloaded", "reason": str(error)})
        self._tell(now)

    # -- what somebody asks for

    def _control(self, message: dict[str, Any]) -> None:
        """`{"control": number, "agent", "verb", "body", "by"}`, which is answered by that number."""
        try:
            answer = self._asked(message)
        except TaskError as error:
            about = {"code": error.code, "type": error.type, "message": error.message}
            self._supervisor.say({"answer": message["control"], "error": about})
        else:
            if answer is not None:
                self._supervisor.say({"answer": message["control"], "body": answer})

    def _asked(self, message: dict[str, Any]) -> dict[str, Any] | None:
        agent, verb, body, by = message["agent"], message["verb"], message["body"], message["by"]
        if agent != self.name:
            return self._ask_agent(agent, verb, by)
        match verb:
            case "scale":
                program, agents, why = (str(body.get(name, "")) for name in ("program", "agents", "why"))
                return self._scale(program, agents, by, why[:500])
            case "reload":
                return self._ask_reload(message["control"], body, by)
            case "drain":
                for program in self._served:
                    self._set(program, Scale(0, 0), 0, by, "drained")
                return {"supervisor": self.name, "programs": list(self._served)}
            case "stop":
                self._up({"event": "stop", "by": by})
                return {"supervisor": self.name}
            case _:
                raise InvalidInput(f"a supervisor does not know {verb[:40]}; it knows scale, reload, drain and stop")

    def _ask_agent(self, agent: str, verb: str, by: str) -> dict[str, Any]:
        program, number = self._who(agent)
        if program not in self._served or number not in self.fleet.members(program):
            raise NotFound(f"{self.name} looks after no agent {agent[:80]}; `dspex ps` shows what runs")
        it = self._served[program]
        if verb == "restart":
            self._do(self.fleet.renew(program, number))
        elif verb in ("drain", "stop"):
            agents = max(self.fleet.wanted(program) - 1, 0)
            self._do(self.fleet.lose(program, number), hurry=verb == "stop")
            least, most = min(it.scale.least, agents), agents if not it.scale.automatic else it.scale.most
            self._set(program, replace(it.scale, least=least, most=most), agents, by, f"{agent} was told to {verb}")
        else:
            raise InvalidInput(f"an agent does not know {verb[:40]}; it knows drain, stop and restart")
        return {"agent": agent, "program": program, "agents": self.fleet.wanted(program)}

    def _scale(self, program: str, agents: str, by: str, why: str) -> dict[str, Any]:
        it = self._served.get(program)
        if it is None:
            have = ", ".join(self._served)
            raise NotFound(f"{self.name} serves no program {program[:80]!r}; it serves {have}")
        try:
            wanted = Scale.read(agents)
        except ValueError as error:
            raise InvalidInput(str(error)) from None
        was = self.fleet.wanted(program)
        scale = replace(it.scale, least=wanted.least, most=wanted.most)
        self._set(program, scale, max(scale.least, min(was, scale.most)), by, why)
        return {
            "program": program, "supervisor": self.name, "agents": self.fleet.wanted(program), "was": was,
            "least": scale.least, "most": scale.most,
        }  # fmt: skip

    def _follow(self, program: str, agents: int, why: str) -> None:
        """The load asks for another number; it may have come too late to count."""
        it = self._served.get(program)
        right = it and it.scale.automatic and it.scale.least <= agents <= it.scale.most
        if it and right and agents != self.fleet.wanted(program):
            self._set(program, it.scale, agents, "load", why)

    def _set(self, program: str, scale: Scale, agents: int, by: str, why: str) -> None:
        """Have so many agents. Our parent keeps it before it is done, and the log is told."""
        it = self._served[program]
        it.scale, it.by, it.why = scale, by, why
        actions = self.fleet.scale(program, agents)
        it.notice = self._supervisor.next_id()
        self._keep()
        self._note_scaled(program, it)
        self._do(actions)
        self._up({"event": "scaled", "program": program, "agents": agents, "by": by, "reason": why})

    # -- new code

    def _ask_reload(self, number: int, body: dict[str, Any], by: str) -> dict[str, Any] | None:
        id, program = str(body.get("id", "")), str(body.get("program", ""))
        for known in (self._reload, self._last):
            if known and id and known.id == id:
                if known.over:
                    return known.answer()
                known.waiting.append(number)
                return None
        if program and program not in self._served:
            raise NotFound(f"{self.name} serves no program {program[:80]!r}; it serves {', '.join(self._served)}")
        reload = Reload(id, [program] if program else [], by, bool(body.get("replace")) or self._replace)
        self._begin_reload(reload)
        reload.waiting.append(number)
        return None

    def _begin_reload(self, reload: Reload) -> None:
        """Raises Conflict, InvalidInput when it cannot begin."""
        if self._reload:
            raise Conflict("new code is being rolled out already; wait until that is done")
        plans = [it.plan for name, it in self._served.items() if not reload.programs or name in reload.programs]
        reload.apps(plans)
        self._generation += 1
        name = f"{LOADER}-{self._system}-{self._generation}"
        reload.begin(self._generation, Loader(name, reload.wanted, self._debug, reload.replace))
        self._reload = reload
        self._loaders[reload.generation] = reload.loader
        self._supervisor.add(reload.loader.child(), self._group)

    def _loaded(self, loader: str, found: list[About]) -> None:
        generation = next((number for number, it in self._loaders.items() if it.name == loader), None)
        if generation is None:
            return
        for about in found:
            if about.program in self._served:
                self._served[about.program].about[generation] = about
        reload = self._reload
        if reload is None or reload.generation != generation or not reload.loading:
            return  # it died and has loaded what is there now: who starts from now on runs that
        new = {about.program: about for about in found}
        old = {name: it.about[self.fleet.current(name)] for name, it in self._served.items()}
        try:
            todo = compared(old, new, reload.programs, replace=reload.replace, may_grow=self._may_grow)
        except DspexError as error:
            self._not_loaded(loader, str(error))
            return
        reload.loading = False
        for program in todo.fresh:
            self._take_in(new[program], generation, reload)
        for program in todo.gone:
            self._set(program, Scale(0, 0), 0, reload.by, "the new code has no such program")
        reload.todo = deque(todo.changed)
        self._next_program()

    def _next_program(self) -> None:
        reload = self._reload
        assert reload
        if reload.todo:
            reload.was = self._served[reload.todo[0]].code
            self._do(self.fleet.roll(reload.todo[0], reload.generation))
        else:
            self._end_reload()

    def _take_in(self, about: About, generation: int, reload: Reload) -> None:
        """A program that the old code did not have."""
        plan = replace(reload.plan_of(about.program), values={}, name="")
        it = self._served[about.program] = _Served(plan, plan.bounds, about={generation: about}, code=about.code)
        self._supervisor.add(plan.upkeep.over(about.program, ()), self._group)
        self._do(self.fleet.serve(about.program, it.plan.agents, generation))
        reload.done.append({"program": about.program, "code": about.code, "was": "", "agents": it.plan.agents})

    def _rolled(self, program: str, generation: int) -> None:
        reload, it = self._reload, self._served[program]
        it.code = it.about[generation].code
        if reload is None or not reload.todo or reload.todo[0] != program:
            return
        reload.todo.popleft()
        agents = self.fleet.wanted(program)
        reload.done.append({"program": program, "code": it.code, "was": reload.was, "agents": agents})
        self._note_reloaded(program, it.code, reload.was, reload.by)
        self._keep()
        self._next_program()

    def _not_loaded(self, loader: str, why: str) -> None:
        reload = self._reload
        if reload and reload.loader.name == loader and reload.loading:
            self._end_reload(Conflict(why))

    def _end_reload(self, error: TaskError | None = None) -> None:
        reload = self._reload
        assert reload
        reload.over, reload.error, self._reload, self._last = True, error, None, reload
        if error and self._watcher:
            self._watcher.failed()
        for number in reload.waiting:
            self._control_answer(number, reload)
        reload.waiting.clear()
        said = {"event": "not-reloaded", "reason": str(error)} if error else {"event": "reloaded"}
        self._up({**said, "by": reload.by, "programs": reload.done})

    def _control_answer(self, number: int, reload: Reload) -> None:
        try:
            self._supervisor.say({"answer": number, "body": reload.answer()})
        except TaskError as error:
            about = {"code": error.code, "type": error.type, "message": error.message}
            self._supervisor.say({"answer": number, "error": about})

    def _drop_loaders(self) -> None:
        """End those whose code nobody needs any more."""
        needed = self.fleet.generations() | ({self._reload.generation} if self._reload else set())
        for generation in set(self._loaders) - needed:
            loader = self._loaders.pop(generation)
            self._supervisor.remove(loader.name)
            for it in self._served.values():
                it.about.pop(generation, None)

    # -- doing it

    def _do(self, actions: list[Action], *, hurry: bool = False) -> None:
        for action in actions:
            match action:
                case Begin(program=program):
                    self._supervisor.add(self._made(action), program)
                case Leave(program=program, number=number):
                    timeout = max(about.timeout for about in self._served[program].about.values())
                    self._supervisor.remove(self._agent(program, number), None if hurry else timeout + 1.0)
                case Rolled(program=program, generation=generation):
                    self._rolled(program, generation)
                case RolledBack(program=program, why=why):
                    if self._reload:
                        done = [each["program"] for each in self._reload.done]
                        also = f"; {', '.join(done)} runs the new code" if done else ""
                        sentence = f"{program} stays with the code it has, for the new one cannot serve: {why}{also}"
                        self._end_reload(Conflict(sentence))

    def _made(self, begin: Begin) -> Child:
        it = self._served[begin.program]
        name = self._agent(begin.program, begin.number)

        def born(life: Life, close: CloseOthers) -> tuple[int, Link | None]:
            about = it.about[begin.generation]
            if not begin.generation:
                return self._own(about, it.plan, begin.number)(life, close)
            loader = self._loaders[begin.generation]
            spec = self._spec(about, it.plan, begin.number)
            spec["replace"] = spec["replace"] or loader.replace
            return loader.fork(begin.program, spec, life, self._identities / name)

        return self._child(it.about[begin.generation], it.plan, begin.number, born)

    def _agent(self, program: str, number: int) -> str:
        return f"{program}-{self._system}-{number}"

    def _who(self, agent: str) -> tuple[str, int]:
        program, _, number = agent.rpartition("-")
        return program.removesuffix(f"-{self._system}"), int(number) if number.isdecimal() else 0

    def _files(self) -> list[str]:
        return [file for name, it in self._served.items() for file in it.about[self.fleet.current(name)].files]

    # -- what is said of it

    def _keep(self) -> None:
        """What our parent gives to the supervisor that comes after us."""
        self._supervisor.keep["fleet"] = {
            name: {
                "scale": _as_sent(it.scale), "agents": self.fleet.wanted(name), "by": it.by, "why": it.why,
                "notice": it.notice,
            }
            for name, it in self._served.items() if it.notice
        }  # fmt: skip
        self._supervisor.keep["codes"] = {name: it.code for name, it in self._served.items()}
        self._supervisor.tell_kept()

    def _note_scaled(self, program: str, it: _Served) -> None:
        data = {
            "program": program, "supervisor": self.name, "agents": self.fleet.wanted(program), "least": it.scale.least,
            "most": it.scale.most, "by": it.by, "why": it.why,
        }  # fmt: skip
        self._note(program, "ProgramScaled", data, it.notice)

    def _note_reloaded(self, program: str, code: str, was: str, by: str) -> None:
        agents = self.fleet.wanted(program)
        data = {"program": program, "supervisor": self.name, "code": code, "was": was, "agents": agents, "by": by}
        self._note(program, "ProgramReloaded", data, self._supervisor.next_id())

    def _note(self, program: str, type: str, data: dict[str, Any], id: str) -> None:
        aggregate = f"fleet.{program}.{self.name}"
        self._supervisor.notice({"id": id, "aggregate": aggregate, "type": type, "data": data})

    def _up(self, event: dict[str, Any]) -> None:
        """Tell our parent, who prints it."""
        if self._supervisor.parent and self._supervisor.parent.open:
            self._supervisor.parent.send({"agent": self.name, "role": "supervisor", **event})

    def _tell(self, now: float) -> None:
        """Tell the voice how things stand: when that has changed, and once a second where it follows the load."""
        stands = {name: self._stands(name, it) for name, it in self._served.items()}
        due = stands != self._told or now - self._told_at >= 1.0
        if due and self._supervisor.say({"supervisor": self.name, "fleet": stands}):
            self._told, self._told_at = stands, now

    def _stands(self, name: str, it: _Served) -> dict[str, Any]:
        loads = [self._loads.get(self._agent(name, number), {}) for number in self.fleet.members(name)]
        about = it.about[self.fleet.current(name)]
        return {
            "agents": self.fleet.wanted(name), "serving": self.fleet.serving(name), "scale": _as_sent(it.scale),
            "by": it.by, "why": it.why, "code": it.code, "rolling": self.fleet.rolling(name), "slots": about.slots,
            "running": sum(load.get("running", 0) for load in loads),
            "done": sum(load.get("done", 0) for load in loads),
        }  # fmt: skip


def _first(plan: Plan, about: About, kept: dict[str, Any]) -> _Served:
    """A program as it begins: as it was planned, or as it was scaled under a supervisor before us."""
    known = kept.get("fleet", {}).get(about.program)
    if known is None:
        return _Served(plan, plan.bounds, about={0: about}, code=about.code)
    scale = Scale(**known["scale"])
    plan = replace(plan, agents=known["agents"])
    return _Served(plan, scale, known["by"], known["why"], known["notice"], {0: about}, about.code)


def _as_sent(scale: Scale) -> dict[str, Any]:
    """A scale as it is sent and kept."""
    return {"least": scale.least, "most": scale.most, "wait": scale.wait, "quiet": scale.quiet}
