"""Where a command reads from: the running system, or a file (`--log FILE`); and where a program's code is."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dspex.console.options import Options

if TYPE_CHECKING:
    from dspex.compose.story import Source
    from dspex.core.program import Program

__all__ = ["code_of", "log_option", "opened", "settings_of", "time_of"]

T = TypeVar("T")
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def log_option(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command `--log FILE`."""
    kind = click.Path(dir_okay=False)
    return click.option("--log", type=kind, metavar="FILE", help="Read this SQLite log; no server is needed.")(command)


@asynccontextmanager
async def opened(options: Options, log: str | None) -> AsyncIterator[Source]:
    """The log that is meant. Raises ConnectionFailed, LogError."""
    from dspex.compose.story import BusSource, FileSource

    if log is None:
        async with options.connect() as caller:
            yield BusSource(caller, options.settings().privacy.key)
        return
    if not Path(log).is_file():  # noqa: ASYNC240  (one look, before anything runs)
        raise click.UsageError(f"there is no file {log}")
    source = await FileSource.open(log, options.settings().prefix, options.settings().privacy.key)
    try:
        yield source
    finally:
        await source.close()


def code_of(options: Options, program: str, registered: str, app: str | None, command: str) -> type[Program] | str:
    """The program's class: from --app, from the settings, from where it was when it was registered; or why not.

    Raises ConfigurationError when the file that was named has no such program."""
    from dspex.compose.app import load_app, split_app
    from dspex.core.errors import ConfigurationError

    configured = options.settings().programs.get(program)
    place = app or (configured.app if configured else registered)
    hint = f"say where it is: {command} --app FILE.py"
    if not app and (not place or not split_app(place)[0].is_file()):
        return f"the code of {program} is not {f'at {place}' if place else 'known'}; {hint}"
    with contextlib.redirect_stdout(sys.stderr):
        found = {one.name: one for one in load_app(place)}
    if program not in found:
        if app:
            raise ConfigurationError(f"{place} has no program {program}; it has {', '.join(found)}")
        return f"{place} has no program {program} now; {hint}"
    return found[program]


def settings_of(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`k=v` of --set, values as JSON or else as text."""
    from dspex.console.bodies import loosely

    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not name or not sign:
            raise click.UsageError(f"--set {pair}: a name and a value are due, e.g. --set passages=4")
        found[name] = loosely(value)
    return found


def time_of(text: str) -> str:
    """A time as the log writes it: from RFC 3339 (UTC unless it says otherwise), `12:30:05` of today, or `2h` for so
    long ago."""
    from datetime import datetime, timedelta

    from dspex.core.codec import rfc3339

    now = datetime.now(UTC)
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    try:
        if ago:
            when = now - timedelta(seconds=float(ago[1]) * _UNITS[ago[2]])
        elif re.fullmatch(r"\d\d:\d\d(:\d\d(\.\d+)?)?", text):
            when = datetime.fromisoformat(f"{now:%Y-%m-%d}T{text}+00:00")
        else:
            when = datetime.fromisoformat(text)
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
        return rfc3339(when.timestamp())
    except (ValueError, OverflowError):
        raise click.UsageError(f"{text!r} is no time; write 2026-11-23T10:00:00, 10:00:00 or 2h") from None
