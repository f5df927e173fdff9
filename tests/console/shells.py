"""The real command line, run as a subprocess."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dspex

PROGRAM = '''
import os, time, asyncio
from dspex import Program, Schema, variable

class Echo(Program):
    """Say it again."""
    timeout = 2.0
    class Input(Schema):
        text: str
        n: int = 1
    class Output(Schema):
        text: str
        length: int
    times = variable(2, low=1, high=5, doc="how often")
    style = variable("plain", choices=["plain", "loud"])
    marks = variable(1, low=0, high=3, when={"style": "loud"})
    async def predict(self, input):
        if input.text == "raise":
            raise ValueError("a secret")
        if input.text == "sleep":
            await asyncio.sleep(60)
        if input.text == "wait":
            await self.signal("note")
        if input.text == "nap":
            await asyncio.sleep(1.0)
        return self.Output(text=input.text * self.times, length=len(input.text) * self.times)
'''
SRC = str(Path(str(dspex.__file__)).parent.parent)


def environment(**more: str) -> dict[str, str]:
    """Ours without settings of the machine's owner."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DSPEX_", "NATS_", "_DSPEX"))}
    return kept | {"PYTHONPATH": SRC, "XDG_CONFIG_HOME": "/nonexistent", "COLUMNS": "80"} | more


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]


@dataclass
class Shell:
    """A folder to run commands in."""

    folder: Path

    def __call__(self, *arguments: str, input: str | None = None, env: Mapping[str, str] | None = None) -> Ran:
        done = subprocess.run(
            [sys.executable, "-m", "dspex", *arguments],
            cwd=self.folder,
            env=environment(**(env or {})),
            input=input,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return Ran(done.returncode, done.stdout, done.stderr)

    def run(self, module: str, *arguments: str, **env: str) -> Ran:
        """Another command that is a module of Python."""
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], cwd=self.folder, env=environment(**env), capture_output=True,
            text=True, timeout=100, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        return Ran(done.returncode, done.stdout, done.stderr)

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "dspex", *arguments],
            cwd=self.folder,
            env=environment(**env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def stop(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """End a command as a person or an init system would; exit code, the rest of its output, its complaints."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        out, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return process.returncode, out, err


def until(found: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What `found` gives once it gives something."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
    return value
