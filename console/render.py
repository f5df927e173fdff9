"""How things look: tables, event lines and JSON. Good at 80 columns; plain, whole and without colour when piped."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import IO, Any

import click

__all__ = [
    "EventLines", "bold", "clean", "compact", "dim", "duration", "gist", "green", "is_terminal", "paint", "print_fields",
    "print_json", "print_table", "red", "shorten", "who", "yellow",
]  # fmt: skip

WHOLE = 2000
"""Characters of a cell that are shown where nothing else limits them."""

_GOOD = {"TaskCompleted"}
_BAD = {"TaskFailed", "TaskDeadLettered", "AgentCrashed", "AgentGaveUp"}
_OURS = {"TaskSubmitted", "OutcomeReported", "SignalSent"}


def is_terminal(stream: IO[str] | None = None) -> bool:
    """Whether a person looks at it."""
    return (stream or sys.stdout).isatty()


def paint(text: str, *, stream: IO[str] | None = None, **style: Any) -> str:
    """`text` in a style, unless nobody sees it or NO_COLOR is set."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not is_terminal(stream):
        return text
    return click.style(text, **style)


def bold(text: str) -> str:
    return paint(text, bold=True)


def dim(text: str) -> str:
    return paint(text, dim=True)


def green(text: str) -> str:
    return paint(text, fg="green")


def yellow(text: str) -> str:
    return paint(text, fg="yellow")


def red(text: str) -> str:
    return paint(text, stream=sys.stderr, fg="red")


def print_json(value: object) -> None:
    """One line of JSON, at once."""
    click.echo(json.dumps(value, ensure_ascii=False, separators=(", ", ": ")))


def compact(value: object) -> str:
    """A value as JSON on one line; a bare string as itself."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return clean(text)


def clean(text: str) -> str:
    """`text` on one line and without control characters: what comes out of a log must not steer a terminal."""
    text = " ".join(text.split())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def shorten(text: str, width: int) -> str:
    """At most `width` characters, the end told by an ellipsis."""
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"


def duration(seconds: float | None) -> str:
    """3.2 ms, 1.4 s, 2 min."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Iterable[str] = ()) -> None:
    """A table: boxed and cut to the terminal's width, or aligned plain text when piped. `right` names the columns of
    numbers."""
    cells = [["" if cell is None else clean(str(cell)) for cell in row] for row in rows]
    numbers = set(right)
    if is_terminal():
        _print_rich(columns, cells, numbers)
        return
    widths = [max(len(name), *(len(row[i]) for row in cells)) if cells else len(name) for i, name in enumerate(columns)]
    for row in [list(columns), *cells]:
        line = "  ".join(
            cell.rjust(width) if name in numbers else cell.ljust(width)
            for name, cell, width in zip(columns, row, widths, strict=True)
        )
        click.echo(line.rstrip())


def _print_rich(columns: Sequence[str], cells: list[list[str]], numbers: set[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for number, name in enumerate(columns):
        last = number == len(columns) - 1
        table.add_column(
            name, justify="right" if name in numbers else "left", no_wrap=True, overflow="ellipsis",
            ratio=None, min_width=None if last else min(12, max([len(name), *(len(row[number]) for row in cells)])),
        )  # fmt: skip
    for row in cells:
        table.add_row(*(Text(shorten(cell, WHOLE), style=_STATES.get(cell, "")) for cell in row))
    Console(highlight=False).print(table)


_STATES = {
    "serving": "green", "completed": "green", "ok": "green", "starting": "yellow", "restarting": "yellow",
    "draining": "yellow", "running": "yellow", "warn": "yellow", "failed": "red", "dead": "red", "gave up": "red",
    "fail": "red", "duplicate": "dim", "submitted": "cyan",
}  # fmt: skip


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Names and values under each other, long values wrapped beside their name."""
    import textwrap

    shown = list(fields)
    indent = max((len(name) for name, _ in shown), default=0) + 2
    width = max(shutil.get_terminal_size().columns - indent, 20) if is_terminal() else WHOLE
    for name, value in shown:
        lines = textwrap.wrap(clean(value), width) or [""]
        click.echo(f"{bold(name.ljust(indent))}{lines[0]}")
        for line in lines[1:]:
            click.echo(" " * indent + line)


class EventLines:
    """Events under each other, one line each, so that they can be followed while they come."""

    def __init__(self) -> None:
        self._width = shutil.get_terminal_size().columns if is_terminal() else WHOLE
        self._begun = False

    def show(self, event: dict[str, Any], *, faded: bool = False) -> None:
        """Print one event as `dspex.log.read` gives it."""
        if not self._begun:
            self._begun = True
            click.echo(bold(f"{'position':>8}  {'time (UTC)':<12}  {'event':<17}  {'who':<18}  what"))
        kind, author = event["type"], shorten(who(event), 18)
        room = self._width - 8 - 12 - 17 - 18 - 8
        text = shorten(gist(event), max(room, 16))
        color = "green" if kind in _GOOD else "red" if kind in _BAD else "cyan" if kind in _OURS else None
        name = paint(f"{shorten(kind, 17):<17}", fg=color, dim=faded)
        line = f"{event['position']:>8}  {_clock(event['time'])}  {name}  {author:<18}  {text}"
        click.echo(dim(line) if faded else line)


def who(event: dict[str, Any]) -> str:
    """Who wrote an event."""
    return clean(str(event.get("source", "")).rpartition("/")[2])


def gist(event: dict[str, Any]) -> str:
    """What an event says, in one short line."""
    data: dict[str, Any] = event["data"] if isinstance(event.get("data"), dict) else {}
    match event["type"]:
        case "TaskSubmitted":
            key = data.get("headers", {}).get("Dspex-Key")
            return f"{data['program']} {compact(data['input'])}" + (f", key {clean(key)}" if key else "")
        case "TaskClaimed":
            return f"attempt {data['attempt']}, values {data['assignment'][:8]}"
        case "TaskCompleted":
            return f"{compact(data['output'])}, {duration(data.get('seconds'))}"
        case "TaskFailed":
            return clean(f"{data['code']} {data['type']}: {data.get('detail') or data['message']}")
        case "TaskDuplicate":
            return clean(f"the same as task {data['of']} (key {data['key']})")
        case "TaskDeadLettered":
            return clean(data["reason"])
        case "OutcomeReported":
            return _fields(data.get("outcome"))
        case "SignalSent":
            return _fields(data.get("signal"))
        case "KeyBound":
            return clean(f"key {data['key']} is task {data['task']}")
        case "ProgramRegistered":
            variables = data.get("variables", {}).get("variables", {})
            return clean(f"{data['program']}, {len(variables)} variables, from {data.get('app') or 'a class'}")
        case "AgentStarted":
            return clean(f"{data['role']}, process {data['pid']}, restarts {data.get('restarts', 0)}")
        case "AgentStopped" | "AgentCrashed":
            return clean(f"process {data['pid']}: {data['reason']}")
        case _:
            return compact(data)


def _fields(body: object) -> str:
    if not isinstance(body, dict):
        return compact(body)
    return ", ".join(f"{clean(str(name))} {compact(value)}" for name, value in body.items())


def _clock(time: str) -> str:
    """`2026-11-23T10:00:00.123456Z` as 10:00:00.123; times are UTC here as in the log."""
    return time[11:23].rstrip("Z").ljust(12)
