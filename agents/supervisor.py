"""A supervisor: starts children in order, restarts the ones that die, stops them in reverse order.

It is one thread without an event loop and without a connection, so that it can fork at any time: a child begins with
everything imported and costs milliseconds. What it has to say on the bus it says through one of its children, the
`voice`. When its own parent dies, it stops its children and ends.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from dspex.agents.link import Link, link_pair
from dspex.core.errors import DspexError

__all__ = ["EXIT_RECYCLE", "EXIT_REFUSED", "Child", "Life", "Supervisor", "exit_reason", "fork_child"]

logger = logging.getLogger("dspex.agents")

EXIT_RECYCLE = 75
"""A child that wants to be replaced: no crash, no delay."""
EXIT_REFUSED = 76
"""A child that cannot be what it was meant to be; it has said why. It is not started again."""
STABLE = 10.0
BEAT, SILENCE = 1.0, 5.0
"""Seconds between the beats of a child, and after which one that has not beaten is called silent."""
FIRST_DELAY, MAX_DELAY = 0.1, 5.0
MAX_NOTICES = 1000
INHERITED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP)
"""Signals whose handlers a child inherits and must let go of."""
CloseOthers = Callable[[], None]


@dataclass(frozen=True)
class Life:
    """What a child is told at birth: how many have died before it under its name, and how the last one did."""

    restarts: int = 0


@dataclass(frozen=True)
class Child:
    """What a supervisor looks after. `start` gives a pid and a line (None for a program that is not ours).

    Children of one `stage` are stopped together, higher stages first.
    """

    name: str
    role: str
    start: Callable[[Life, CloseOthers], tuple[int, Link | None]]
    program: str | None = None
    stage: int = 0
    look: Callable[[], None] | None = None
    """Called about once a second while the child serves; it must not take long, and may end the child."""


@dataclass
class _State:
    spec: Child
    pid: int = 0
    link: Link | None = None
    state: str = "starting"
    restarts: int = 0
    started: float = 0.0
    heard: float = 0.0
    quick: int = 0
    due: float | None = None
    why: str = ""

    def shown(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "agent": spec.name, "program": spec.program, "role": spec.role, "pid": self.pid or None,
            "state": self.state, "restarts": self.restarts,
        }  # fmt: skip


def fork_child(main: Callable[[Link], int], close_others: CloseOthers) -> tuple[int, Link]:
    """Fork a child that runs `main` with its end of the line and exits with what it returns."""
    ours, theirs = link_pair()
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal that reaches the child before it has let go of our handlers would be taken for ours, and lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INHERITED)
    pid = os.fork()
    if pid:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        return pid, ours
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        for number in INHERITED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        ours.close()
        close_others()
        random.seed()
        code = main(theirs)
    except BaseException:
        logging.getLogger("dspex.agents").exception("a child could not go on")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exit_reason(status: int) -> str:
    """A wait status in words: `SIGKILL`, or `exit 1`."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"exit {os.WEXITSTATUS(status)}"


@dataclass
class Supervisor:
    """Looks after `children` until told to stop (SIGTERM, SIGINT, or the end of `parent`).

    `voice` names the child that speaks on the bus for us. `on_event` hears what happens:
    `{"event": "serving" | "crashed" | "refused" | "all-serving", "agent", "reason", …}`.
    """

    children: Sequence[Child]
    parent: Link | None = None
    voice: str | None = None
    on_event: Callable[[dict[str, Any]], None] = lambda event: None
    above: Callable[[], list[dict[str, Any]]] = list
    grace: float = 10.0
    _states: list[_State] = field(default_factory=list)
    _notices: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=MAX_NOTICES))
    _number: int = 0
    _heard: int = 0
    _token: str = field(default_factory=lambda: secrets.token_hex(4))
    _beaten: float = 0.0
    _stopping: bool = False
    _hurry: bool = False
    _changed: bool = True
    _was_ready: bool = False
    _higher: list[dict[str, Any]] = field(default_factory=list)

    def run(self) -> int:
        """Look after the children; return when all of them have ended."""
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
        self._states = [_State(spec) for spec in self.children]
        try:
            for state in self._states:
                if not self._stopping:
                    self._start(state)
            while not self._stopping:
                self._tick(wake_in)
            self._stop_all(wake_in)
        finally:
            signal.set_wakeup_fd(-1)
            wake_in.close()
            wake_out.close()
            self._selector.close()
        return 0

    def stop(self) -> None:
        self._stopping = True

    def processes(self) -> list[dict[str, Any]]:
        """Everything looked after here and above, as `dspex ps` shows it."""
        return [*self.above(), *self._higher, *(state.shown() for state in self._states)]

    # -- inside

    def _on_stop(self, *_: object) -> None:
        self._hurry = self._stopping
        self._stopping = True

    def _tick(self, wake: socket.socket) -> None:
        now = time.monotonic()
        due = [state.due for state in self._states if state.due is not None]
        timeout = max(0.0, min(due) - now) if due else (0.5 if self._notices and self.voice else BEAT)
        self._poll(wake, timeout)
        self._reap()
        now = time.monotonic()
        for state in self._states:
            if state.due is not None and state.due <= now and not self._stopping:
                self._start(state)
        self._listen(now)
        self._report()

    def _listen(self, now: float) -> None:
        """Beat, as every child does; say which child has not for a while. It is not killed: it may only be frozen."""
        if self.parent and self.parent.open and now - self._beaten >= BEAT:
            self._beaten = now
            self.parent.send({"beat": True})
        for state in self._states:
            if state.spec.look and state.pid and state.state == "serving":
                state.spec.look()
            if state.link and state.state == "serving" and now - state.heard > SILENCE:
                state.state = "silent"
                self._changed = True
                self._tell("silent", state, reason=f"no beat for {SILENCE:.0f} s")

    def _poll(self, wake: socket.socket, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                while True:
                    try:
                        if not wake.recv(4096):
                            break
                    except BlockingIOError:
                        break
            elif key.data is self.parent:
                self._hear_parent()
            else:
                self._hear(key.data)

    def _start(self, state: _State) -> None:
        state.due = None
        state.started = state.heard = time.monotonic()
        state.state = "starting"
        self._changed = True
        try:
            state.pid, state.link = state.spec.start(Life(state.restarts), self._close_links)
        except (OSError, DspexError) as error:  # no memory to fork, a full disk: it may be better later
            self._try_later(state, reason=str(error))
            return
        if state.link:
            self._selector.register(state.link, selectors.EVENT_READ, state)
        else:
            state.state = "serving"
            self._tell("serving", state)

    def _close_links(self) -> None:
        """In a child just forked: it must not hold its siblings' lines open, nor our parent's."""
        for state in self._states:
            if state.link:
                state.link.close()
        if self.parent:
            self.parent.close()
        self._selector.close()

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
            self._stopping = self._hurry = True

    def _hear(self, state: _State) -> None:
        link = state.link
        assert link
        for message in link.receive():
            state.heard = time.monotonic()
            if state.state == "silent":
                state.state = "serving"
                self._changed = True
            if "state" in message and not self._stopping:
                state.state = message["state"]
                self._changed = True
                if state.state == "serving":
                    self._tell("serving", state)
            if "refused" in message:
                state.why = message["refused"]
            if "ack" in message:
                self._written_down(message["ack"])
            if "event" in message:
                self.on_event(message)
        if not link.open:
            self._selector.unregister(link)
            link.close()
            state.link = None

    def _reap(self) -> None:
        """Take note of every child that ended; as process 1 of a container also of strangers left to us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for state in self._states:
                if state.pid == pid:
                    self._died(state, status)

    def _died(self, state: _State, status: int) -> None:
        if state.link:
            self._hear(state)
        if state.link:
            self._selector.unregister(state.link)
            state.link.close()
            state.link = None
        pid, state.pid = state.pid, 0
        self._changed = True
        if self._stopping:
            state.state = "stopped"
            return
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1
        if code == EXIT_REFUSED:
            state.state = "gave up"
            self._tell("refused", state, reason=state.why)
            return
        if code == EXIT_RECYCLE:
            state.restarts += 1
            state.due, state.state = time.monotonic(), "restarting"
            return
        reason = exit_reason(status)
        self._try_later(state, reason=reason, pid=pid)
        self._notice(
            {"id": f"{self._token}/{self._number + 1}", "agent": state.spec.name,
             "kind": state.spec.program or state.spec.role, "pid": pid, "reason": reason}
        )  # fmt: skip

    def _try_later(self, state: _State, **more: Any) -> None:
        """Start it again: at once the first time, then after delays that grow while it keeps failing soon."""
        now = time.monotonic()
        state.restarts += 1
        state.quick = state.quick + 1 if now - state.started < STABLE else 0
        delay = 0.0
        if state.quick > 1:
            delay = min(FIRST_DELAY * 2 ** min(state.quick - 2, 10), MAX_DELAY) * random.uniform(0.75, 1.25)
        state.due, state.state = now + delay, "restarting"
        self._tell("crashed", state, delay=round(delay, 2), **more)

    def _notice(self, notice: dict[str, Any]) -> None:
        """Something for the log, kept until the voice has written it down."""
        self._number += 1
        self._notices.append(notice | {"notice": self._number})

    def _written_down(self, number: int) -> None:
        while self._notices and self._notices[0]["notice"] <= number:
            above = self._notices.popleft().get("above")
            if above and self.parent:
                self.parent.send({"ack": above})

    def _tell(self, event: str, state: _State, **more: Any) -> None:
        message = {"event": event, "agent": state.spec.name, "role": state.spec.role, **more}
        self.on_event(message)
        if self.parent and self.parent.open:
            self.parent.send(message)

    def _report(self) -> None:
        """Tell the voice how things stand, and our parent when all serve."""
        voice = next((state for state in self._states if state.spec.name == self.voice), None)
        link = voice.link if voice and voice.state == "serving" else None
        if link and (self._changed or self._notices):
            link.send({"processes": self.processes(), "notices": list(self._notices)[:50]})
        if not self._changed:
            return
        self._changed = False
        for state in self._states:
            if state.link and self.voice is None:
                state.link.send({"above": self.processes(), "notices": list(self._notices)[:50]})
        ready = all(state.state == "serving" for state in self._states)
        if ready and not self._was_ready:
            self.on_event({"event": "all-serving"})
            if self.parent and self.parent.open:
                self.parent.send({"state": "serving"})
        self._was_ready = ready

    def _stop_all(self, wake: socket.socket) -> None:
        """Stop stage by stage, the highest first: SIGTERM, then SIGKILL after the grace, at once when hurried."""
        for stage in sorted({state.spec.stage for state in self._states}, reverse=True):
            group = [state for state in self._states if state.spec.stage == stage]
            for state in group:
                self._signal(state, signal.SIGTERM)
            until = time.monotonic() + (1.0 if self._hurry else self.grace)
            while any(state.pid for state in group):
                if time.monotonic() > until or (self._hurry and until - time.monotonic() > 1.0):
                    for state in group:
                        self._signal(state, signal.SIGKILL)
                self._poll(wake, 0.05)
                self._reap()

    def _signal(self, state: _State, number: signal.Signals) -> None:
        if state.pid:
            try:
                os.kill(state.pid, number)
            except ProcessLookupError:
                state.pid = 0
