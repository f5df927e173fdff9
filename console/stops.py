"""Stopping in the user's code while a task is replayed: `--break PLACE` and `--pdb`, with Python's own debugger."""

from __future__ import annotations

import pdb
import sys
import types
from bdb import BdbQuit
from pathlib import Path

import click

from dspex.console.render import clean

__all__ = ["Quit", "Stops", "post_mortem"]

OURS = ("dspex.core", "dspex.console", "dspex.compose", "asyncio", "concurrent", "threading", "contextlib", "functools")
SKIPPED = [f"{name}*" for name in OURS] + ["uvloop*", "selectors"]


class Quit(BaseException):
    """The person at the debugger has seen enough."""


class Stops:
    """The `Watch` of a replay that stops at `places`: the key or the name of an effect, or `file.py:LINE`."""

    def __init__(self, places: tuple[str, ...]) -> None:
        self._lines = False
        self._effects: set[str] = set()
        self._pdb: pdb.Pdb | None = None
        self.hits = 0
        for place in places:
            file, _, line = place.rpartition(":")
            if file.endswith(".py") and line.isdecimal():
                path = Path(file).resolve()
                if not path.is_file():
                    raise click.UsageError(f"--break {place}: there is no file {file}")
                # What it says of a line that is none has stars before it.
                problem = self._debugger().set_break(str(path), int(line))
                if problem:
                    raise click.UsageError(f"--break {place}: {problem.strip('* ')}")
                self._lines = True
            else:
                self._effects.add(place)

    def begins(self) -> None:
        """Watch for lines, in the thread that runs the program."""
        if not self._lines:
            return
        debugger = self._debugger()
        debugger.botframe = sys._getframe()
        debugger.set_continue()
        sys.settrace(debugger.trace_dispatch)

    def asked(self, key: str, name: str, frame: types.FrameType) -> None:
        """Stop in the line that asks."""
        # A signal's name is `signal.approval`, and its person thinks of `approval`.
        if not self._effects & {key, name, key.partition("#")[0], name.removeprefix("signal.")}:
            return
        self.hits += 1
        click.echo(f"stopped where {clean(name)} is asked for: {clean(key)}")
        debugger = self._debugger()
        above: types.FrameType | None = frame
        while above is not None and str(above.f_globals.get("__name__", "")).partition(".")[0] != "asyncio":
            above.f_trace = debugger.trace_dispatch
            debugger.botframe = above
            above = above.f_back
        try:
            debugger.interaction(frame, None)
        except BdbQuit:
            raise Quit from None
        if debugger.quitting:
            raise Quit
        # `continue` sets this line to -1; anything else means to go on step by step.
        if debugger.stoplineno != -1 or debugger.get_all_breaks():
            sys.settrace(debugger.trace_dispatch)

    def _debugger(self) -> pdb.Pdb:
        if self._pdb is None:
            self._pdb = _Debugger(self)
            self._pdb.reset()
        return self._pdb


class _Debugger(pdb.Pdb):
    """Counts its stops, and keeps out of what is not the user's."""

    def __init__(self, stops: Stops) -> None:
        super().__init__(skip=SKIPPED, nosigint=True)
        self._stops = stops

    def user_line(self, frame: types.FrameType) -> None:
        self._stops.hits += 1
        super().user_line(frame)


def post_mortem(error: BaseException) -> bool:
    """Stop in the innermost line of the user's that an exception went through; False when there is none."""
    steps = []
    step = error.__traceback__
    while step is not None:
        if not str(step.tb_frame.f_globals.get("__name__", "")).startswith(OURS):
            steps.append(step)
        step = step.tb_next
    if not steps:
        return False
    chain: types.TracebackType | None = None
    for step in reversed(steps):
        chain = types.TracebackType(chain, step.tb_frame, step.tb_lasti, step.tb_lineno)
    debugger = pdb.Pdb(nosigint=True)
    debugger.reset()
    debugger.interaction(None, chain)
    return True
