"""A supervisor: does what `core.supervision` decides. It forks children, hears what they say, and notices their ends.

It is one thread without an event loop and without a connection, so that it can fork at any time: a child begins with
everything imported and costs milliseconds. What it has to say on the bus it says through one of its children, the
`voice`. When its own parent dies, it stops its children and ends.
"""

from __future__ import annotations

import os
import random
import secrets
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dspex.agents.children import (
    EXIT_RECYCLE,
    EXIT_REFUSED,
    EXIT_TAKEN,
    Child,
    CloseOthers,
    Life,
    ending_of,
    exit_reason,
    fork_child,
)
from dspex.agents.identity import end_holder, holder_of, take_identity
from dspex.agents.link import Link
from dspex.core.errors import DspexError
from dspex.core.supervision import Action, ChildSpec, Escalated, GaveUp, Kill, Start, Stop, SupervisorSpec, Tree

__all__ = ["EXIT_RECYCLE", "EXIT_REFUSED", "Child", "CloseOthers", "Life", "Supervisor", "exit_reason", "fork_child"]

BEAT, SILENCE = 1.0, 5.0
"""Seconds between the beats of a child, and after which one that has not beaten is called silent."""
LEFT_OVER = 2.0
"""Seconds that a process of an earlier supervisor gets to end by itself before its identity is needed."""
LOOK_AGAIN = 0.05
MAX_NOTICES = 1000


@dataclass
class _State:
    spec: Child
    pid: int = 0
    link: Link | None = None
    word: str = ""
    """What the child says of itself, or its silence of it: serving, draining, blocked, silent."""
    where: str = ""
    heard: float = 0.0
    said: str = ""
    by_us: bool = False
    patience: float | None = None
    kept: dict[str, Any] = field(default_factory=dict)
    waits_since: float | None = None
    """When its identity was first found to be taken by a process of an earlier supervisor."""


@dataclass
class Supervisor:
    """Looks after the children in `spec` until told to stop (SIGTERM, SIGINT, or the end of `parent`).

    `voice` names the child that speaks on the bus for us. `on_event` hears what happens: `{"event": "serving" |
    "crashed" | "refused" | "escalated" | "gave-up" | "nothing-serves" | "all-serving", "agent", "reason", …}`.
    `on_word` hears all that the children say, and `on_tick` is called at least once a second, when children may be
    added and removed.
    `identities` is a folder where each child locks a file of its name. `life` is our own; what is in `keep` is found in
    the `life.kept` of the supervisor that comes after us.
    """

    spec: SupervisorSpec
    parent: Link | None = None
    voice: str | None = None
    on_event: Callable[[dict[str, Any]], None] = lambda event: None
    on_word: Callable[[str, dict[str, Any]], None] = lambda name, message: None
    on_tick: Callable[[], None] = lambda: None
    above: Callable[[], list[dict[str, Any]]] = list
    identities: Path | None = None
    life: Life = field(default_factory=Life)
    keep: dict[str, Any] = field(default_factory=dict)
    _states: dict[str, _State] = field(default_factory=dict)
    _notices: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_NOTICES))
    _number: int = 0
    _heard: int = 0
    _token: str = field(default_factory=lambda: secrets.token_hex(4))
    _beaten: float = 0.0
    _told: dict[int, int] = field(default_factory=dict)
    _stop_asked: int = 0
    _stop_heeded: int = 0
    _changed: bool = True
    _was_ready: bool = False
    _over: bool = False
    _kept: dict[str, Any] = field(default_factory=dict)
    _higher: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = Tree(self.spec, self.life.kept.get("restarts"))
        self._states = {child.name: _State(child) for child in _children(self.spec)}

    def run(self) -> int:
        """Look after the children; return when all of them have ended: 0, or 1 when it gave up."""
        self._selector = selectors.DefaultSelector()
        wake_in, wake_out = socket.socketpair()
        for end in (wake_in, wake_out):
            end.setblocking(False)
        signal.set_wakeup_fd(wake_out.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(wake_in, selectors.EVENT_READ, None)
        if self.parent:
            self._selector.register(self.parent, selectors.EVENT_READ, self.parent)
        if self.identities:
            with suppress(OSError):
                self.identities.mkdir(parents=True, exist_ok=True)
        try:
            self._do(self.tree.begin(time.monotonic()))
            while not self.tree.over():
                self._tick(wake_in)
        finally:
            signal.set_wakeup_fd(-1)
            wake_in.close()
            wake_out.close()
            self._selector.close()
        return 0 if self._stop_asked else 1

    def stop(self, *, hurry: bool = False) -> None:
        """Stop all children, and then `run` returns."""
        self._stop_asked = max(self._stop_asked, 2 if hurry else 1)

    def add(self, child: Child | SupervisorSpec, under: str, after: str | None = None) -> None:
        """Look after one more child, or a supervisor with its own, as the last of the supervisor `under`, or behind
        its child `after`. Raises KeyError, ValueError."""
        actions = self.tree.add(under, child, time.monotonic(), after)
        self._states |= {it.name: _State(it) for it in _children(child)}
        self._do(actions)

    def remove(self, name: str, patience: float | None = None) -> None:
        """Have a child drain and end (or a supervisor with its own), and look after it no more. With `patience` a child
        is told to let its tasks end for so many seconds; without, it has the usual time. Raises KeyError."""
        state = self._states.get(name)
        if patience is None or state is None:
            self._do(self.tree.remove(name, time.monotonic()))
        else:
            state.patience = patience
            self._do(self.tree.remove(name, time.monotonic(), patience + state.spec.shutdown))

    def say(self, message: dict[str, Any]) -> bool:
        """Tell the voice something; False when it is not there to hear it."""
        voice = self._states.get(self.voice or "")
        return bool(voice and voice.link and voice.word == "serving" and voice.link.send(message))

    def tell_kept(self) -> None:
        """Have our parent keep what the supervisor after us is to know, if it does not yet."""
        restarts = {name: restarts for name in self._states if (restarts := self.tree.state(name)[1])}
        kept = {**self.keep, "restarts": restarts}
        if self.parent and self.parent.open and kept != self._kept and self.parent.send({"kept": kept}):
            self._kept = kept

    def next_id(self) -> str:
        """What the next notice is called."""
        return f"{self._token}/{self._number + 1}"

    def notice(self, notice: dict[str, Any]) -> None:
        """Something for the log, kept until the voice has written it down. By its `id` it is written once."""
        self._notice(notice)

    def processes(self) -> list[dict[str, Any]]:
        """Everything looked after here and above, as `dspex ps` shows it."""
        return [*self.above(), *self._higher, *(self._shown(state) for state in self._states.values())]

    # -- inside: the loop

    def _on_stop(self, number: int, frame: object) -> None:
        """A second time means to hurry; but one Ctrl-C reaches us from the terminal and through our parent."""
        self._told[number] = self._told.get(number, 0) + 1
        self._stop_asked = max(self._stop_asked, self._told[number])

    def _tick(self, wake: socket.socket) -> None:
        self._poll(wake, self._patience())
        if self._stop_asked > self._stop_heeded:
            self._stop_heeded = self._stop_asked
            self._do(self.tree.stop(time.monotonic(), hurry=self._stop_asked > 1))
        self._reap()
        now = time.monotonic()
        for state in list(self._states.values()):
            if state.waits_since is not None:
                self._do(self._start(state))
        self._do(self.tree.tick(now))
        self._listen(now)
        self.on_tick()
        self._report()

    def _patience(self) -> float:
        """Seconds until there is something to do, unless something happens before."""
        if self._stop_asked > self._stop_heeded:
            return 0.0
        if any(state.waits_since is not None for state in self._states.values()):
            return LOOK_AGAIN
        due = self.tree.next_due()
        most = 0.5 if self._notices and self.voice else BEAT
        return most if due is None else min(max(0.0, due - time.monotonic()), most)

    def _poll(self, wake: socket.socket, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                with suppress(BlockingIOError):
                    while wake.recv(4096):
                        pass
            elif key.data is self.parent:
                self._hear_parent()
            else:
                self._hear(key.data)

    # -- inside: doing what was decided

    def _do(self, actions: Sequence[Action]) -> None:
        """Do it, and what follows from doing it."""
        todo = deque(actions)
        while todo:
            self._changed = True
            match todo.popleft():
                case Start(name):
                    todo.extend(self._start(self._states[name]))
                case Stop(name):
                    todo.extend(self._ask_to_end(self._states[name]))
                case Kill(name):
                    todo.extend(self._signal(self._states[name], signal.SIGKILL))
                case Escalated(name, because, delay):
                    self._tell("escalated", name, "supervisor", reason=because, delay=delay)
                case GaveUp(name, because):
                    self._say_given_up(name, because)
        for name in set(self._states) - set(self.tree.names()):
            gone = self._states.pop(name)
            self.on_event({"event": "gone", "agent": name, "role": gone.spec.role})

    def _start(self, state: _State) -> list[Action]:
        name, now = state.spec.name, time.monotonic()
        if self._is_taken(state, now):
            return []
        state.heard, state.word, state.where, state.said, state.by_us = now, "", "", "", False
        restarts = self.tree.state(name)[1]
        try:
            state.pid, state.link = state.spec.start(Life(restarts, state.kept), lambda: self._be_born(name))
        except (OSError, DspexError) as error:  # no memory to fork, a full disk: it may be better later
            return self._ended(state, "crash", str(error), pid=None)
        if state.link:
            self._selector.register(state.link, selectors.EVENT_READ, state)
            return []
        self._tell("serving", name, state.spec.role)
        return self.tree.ready(name, now)

    def _is_taken(self, state: _State, now: float) -> bool:
        """Whether a process of an earlier supervisor still has this identity. It sees that its supervisor is gone and
        ends by itself, unless it is stopped or stuck."""
        holder = holder_of(self.identities / state.spec.name) if self.identities else 0
        if not holder or not self.identities:
            state.waits_since = None
            return False
        state.waits_since = state.waits_since or now
        if now - state.waits_since > LEFT_OVER:
            end_holder(self.identities / state.spec.name)
        return True

    def _be_born(self, name: str) -> None:
        """In a child just forked: hold nothing of its siblings and our parent, and take its own identity."""
        for state in self._states.values():
            if state.link:
                state.link.close()
        if self.parent:
            self.parent.close()
        self._selector.close()
        if self.identities and not take_identity(self.identities / name):
            os._exit(EXIT_TAKEN)

    def _ask_to_end(self, state: _State) -> list[Action]:
        patience, state.patience = state.patience, None
        if patience is not None and state.link and state.link.send({"drain": patience}):
            return []
        return self._signal(state, signal.SIGTERM)

    def _signal(self, state: _State, number: signal.Signals) -> list[Action]:
        if state.waits_since is not None:  # it has not been born yet
            state.waits_since = None
            return self.tree.died(state.spec.name, "normal", time.monotonic())
        if state.pid:
            with suppress(ProcessLookupError):
                os.kill(state.pid, number)
        return []

    # -- inside: what the children say

    def _hear(self, state: _State) -> None:
        link, name = state.link, state.spec.name
        assert link
        for message in link.receive():
            if "blocked" in message:  # from its watch: the loop itself says nothing
                state.word, state.where = "blocked", message["blocked"]
                self._changed = True
                continue
            state.heard = time.monotonic()
            if state.word in ("silent", "blocked"):
                state.word, state.where = "serving", ""
                self._changed = True
            if "state" in message:
                state.word = message["state"]
                self._changed = True
                if state.word == "serving" and not self._stop_asked:
                    self._tell("serving", name, state.spec.role)
                    self._do(self.tree.ready(name, time.monotonic()))
            if "served" in message:
                self.tree.served(name)
            if "refused" in message:
                state.said = message["refused"]
            if "why" in message:
                state.said = message["why"]
            if "kept" in message:
                state.kept = message["kept"]
            if "ack" in message:
                self._written_down(message["ack"])
            self.on_word(name, message)
            if "event" in message:
                self.on_event(message)
        if not link.open:
            self._selector.unregister(link)
            link.close()
            state.link = None

    def _listen(self, now: float) -> None:
        """Beat, as every child does; say which child has not for a while. It may only be frozen, so it is not killed
        unless that was asked for."""
        if self.parent and self.parent.open and now - self._beaten >= BEAT:
            self._beaten = now
            self.parent.send({"beat": True})
        for state in self._states.values():
            spec = state.spec
            if self.tree.state(spec.name)[0] != "serving":
                continue
            if spec.look and state.pid:
                spec.look()
            quiet = now - state.heard if state.link else 0.0
            if quiet > SILENCE and state.word == "serving":
                state.word = "silent"
                self._changed = True
                self._tell("silent", spec.name, spec.role, reason=f"no beat for {SILENCE:.0f} s")
            if spec.blocked_after and quiet > spec.blocked_after and not state.by_us:
                state.by_us = True
                state.said = f"its event loop stood still for {quiet:.0f} s{' ' + state.where if state.where else ''}"
                self._do(self._signal(state, signal.SIGKILL))

    def _hear_parent(self) -> None:
        assert self.parent
        for message in self.parent.receive():
            if "above" in message:
                self._higher = message["above"]
                self._changed = True
            for notice in message.get("notices", ()):
                if notice["notice"] > self._heard:
                    self._heard = notice["notice"]
                    self._notice(notice | {"above": notice["notice"]})
        if not self.parent.open:
            self._selector.unregister(self.parent)
            self.stop(hurry=True)

    # -- inside: how they end

    def _reap(self) -> None:
        """Take note of every child that ended; as process 1 of a container also of strangers left to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for state in list(self._states.values()):
                if state.pid == pid:
                    self._do(self._died(state, status))

    def _died(self, state: _State, status: int) -> list[Action]:
        if state.link:
            self._hear(state)
        if state.link:
            self._selector.unregister(state.link)
            state.link.close()
            state.link = None
        pid, state.pid = state.pid, 0
        return self._ended(state, ending_of(status, by_us=state.by_us), state.said or exit_reason(status), pid)

    def _ended(self, state: _State, ending: Any, reason: str, pid: int | None) -> list[Action]:
        """Hear what is decided about a child that has ended or could not be born, and say what is to be said."""
        spec, now = state.spec, time.monotonic()
        meant = self.tree.is_leaving(spec.name)
        actions = self.tree.died(spec.name, ending, now, why=reason, jitter=random.random())
        self._changed = True
        meant = meant or (ending == "normal" and spec.restart != "permanent")
        if meant or ending in ("recycle", "refused"):
            return actions
        delay = next((it.delay for it in actions if isinstance(it, Escalated) and it.delay), 0.0)
        process = {} if pid is None else {"pid": pid}
        self._tell("crashed", spec.name, spec.role, reason=reason, delay=round(delay, 2), **process)
        if pid is not None:
            kind = spec.program or spec.role
            self._notice({"id": self.next_id(), "agent": spec.name, "kind": kind, "pid": pid, "reason": reason})
        return actions

    def _say_given_up(self, name: str, because: str) -> None:
        below = [it for it in self._states.values() if name == it.spec.name or name in self.tree.path(it.spec.name)]
        refused = len(below) == 1 and below[0].spec.name == name and self.tree.state(name)[2] == below[0].said
        role = below[0].spec.role if len(below) == 1 else "supervisor"
        self._tell("refused" if refused else "gave-up", name, role, reason=because)
        for state in below:
            spec = state.spec
            self._notice(
                {"id": self.next_id(), "agent": spec.name, "kind": spec.program or spec.role, "gave_up": True,
                 "restarts": self.tree.state(spec.name)[1], "reason": because}
            )  # fmt: skip

    # -- inside: what is said upwards and to the voice

    def _notice(self, notice: dict[str, Any]) -> None:
        """Something for the log, kept until the voice has written it down."""
        self._number += 1
        self._notices.append(notice | {"notice": self._number})

    def _written_down(self, number: int) -> None:
        while self._notices and self._notices[0]["notice"] <= number:
            above = self._notices.popleft().get("above")
            if above and self.parent:
                self.parent.send({"ack": above})

    def _tell(self, event: str, name: str, role: str, **more: Any) -> None:
        message = {"event": event, "agent": name, "role": role, **more}
        self.on_event(message)
        if self.parent and self.parent.open:
            self.parent.send(message)

    def _shown(self, state: _State) -> dict[str, Any]:
        spec = state.spec
        now, restarts, why = self.tree.state(spec.name)
        return {
            "agent": spec.name, "program": spec.program, "role": spec.role, "pid": state.pid or None,
            "state": (state.word or now) if now == "serving" else now, "restarts": restarts,
            "supervisor": self.tree.path(spec.name)[-1], "why": why or state.where,
        }  # fmt: skip

    def _report(self) -> None:
        """Tell the voice how things stand, and our parent when all serve and what we want to be kept."""
        voice = self._states.get(self.voice or "")
        link = voice.link if voice and voice.word == "serving" else None
        if link and (self._changed or self._notices):
            link.send({"processes": self.processes(), "notices": list(self._notices)[:50]})
        if not self._changed:
            return
        self._changed = False
        for state in self._states.values():
            if state.link and self.voice is None:
                state.link.send({"above": self.processes(), "notices": list(self._notices)[:50]})
        stands = {name: self.tree.state(name) for name in self._states}
        self.tell_kept()
        ended = {"stopped", "gave up"}
        programs = [stands[name] for name, state in self._states.items() if state.spec.program]
        hollow = bool(programs) and all(state in ended for state, _, _ in programs)
        ready = not hollow and all(state in ended or state == "serving" for state, _, _ in stands.values())
        if ready and not self._was_ready and not self._stop_asked:
            self.on_event({"event": "all-serving"})
            if self.parent and self.parent.open:
                self.parent.send({"state": "serving"})
        self._was_ready = ready
        if hollow and not (self._over or self._stop_asked):
            self._over = True
            why = next((why for state, _, why in programs if state == "gave up"), "all agents have ended")
            self._tell("nothing-serves", self.spec.name, "supervisor", reason=why)


def _children(spec: ChildSpec | SupervisorSpec) -> Iterator[Child]:
    if isinstance(spec, SupervisorSpec):
        for child in spec.children:
            yield from _children(child)
    else:
        assert isinstance(spec, Child)
        yield spec
