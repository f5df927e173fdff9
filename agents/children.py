"""A supervisor's children: what they are, how they are born, and what the end of one says."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NoReturn

from dspex.agents.link import Link, link_pair
from dspex.core.supervision import ChildSpec, Ending

__all__ = [
    "EXIT_RECYCLE", "EXIT_REFUSED", "EXIT_TAKEN", "INHERITED", "Child", "CloseOthers", "Life", "be_child",
    "ending_of", "exit_reason", "fork_child",
]  # fmt: skip

EXIT_RECYCLE = 75
"""A child that wants to be replaced: no crash, no delay."""
EXIT_REFUSED = 76
"""A child that cannot be what it was meant to be; it has said why. It is not started again."""
EXIT_TAKEN = 77
"""A child whose identity another process still has: it has done nothing."""
FROM_OUTSIDE = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
INHERITED = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGHUP)
"""Signals whose handlers a child inherits and must let go of."""
CloseOthers = Callable[[], None]


@dataclass(frozen=True)
class Life:
    """What a child is told at birth: how many were before it under its name, and what the one before it left behind
    (`Supervisor.keep`)."""

    restarts: int = 0
    kept: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Child(ChildSpec):
    """What a supervisor looks after. `start` gives a pid and a line (None for a program that is not ours)."""

    role: str
    start: Callable[[Life, CloseOthers], tuple[int, Link | None]]
    program: str | None = None
    look: Callable[[], None] | None = None
    """Called about once a second while the child serves; it must not take long, and may end the child."""
    blocked_after: float = field(default=0.0, kw_only=True)
    """Seconds without a beat after which it is killed; 0 is never."""


def fork_child(main: Callable[[Link], int], close_others: CloseOthers) -> tuple[int, Link]:
    """Fork a child that runs `main` with its end of the line and exits with what it returns."""
    ours, theirs = link_pair()
    sys.stdout.flush()
    sys.stderr.flush()
    # A signal that reaches the child before it has let go of our handlers would be taken for ours, and lost.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, INHERITED)
    pid = os.fork()
    if not pid:
        ours.close()
        be_child(main, theirs, before, close_others)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return pid, ours


def be_child(
    main: Callable[[Link], int], link: Link, mask: Iterable[int], close_others: CloseOthers
) -> NoReturn:
    """In a process just forked: let go of what its parent had, run `main`, and exit with what that returns. `mask` is
    the signals that are to be blocked from now on."""
    code = 70
    try:
        signal.set_wakeup_fd(-1)
        for number in INHERITED:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        close_others()
        random.seed()
        code = main(link)
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


def ending_of(status: int, *, by_us: bool) -> Ending:
    """What a wait status says. A signal that no program sends itself by mistake came from somebody else, unless it
    came from us."""
    if os.WIFSIGNALED(status):
        return "killed" if os.WTERMSIG(status) in FROM_OUTSIDE and not by_us else "crash"
    known: dict[int, Ending] = {0: "normal", EXIT_RECYCLE: "recycle", EXIT_REFUSED: "refused", EXIT_TAKEN: "recycle"}
    return known.get(os.WEXITSTATUS(status), "crash")
