"""How things look: tables, event lines and JSON. Good at 80 columns; plain, whole and without colour when piped."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC
from typing import IO, Any

import click

__all__ = [
    "EventLines", "bold", "clean", "clock", "compact", "dim", "duration", "gist", "green", "has_styles", "is_terminal",
    "paint", "print_fields", "print_json", "print_table", "red", "shorten", "who", "yellow",
]  # fmt: skip

WHOLE = 2000
"""Characters of a cell that are shown where nothing else limits them."""
PIPED = 240
"""Characters of an event's line that nobody's terminal limits; --json has all."""

_GOOD = {"TaskCompleted"}
_BAD = {
    "TaskFailed", "TaskCancelled", "TaskDeadLettered", "AttemptDied", "AgentCrashed", "AgentGaveUp", "BreakerOpened",
    "DoorsClosed", "LimitReached",
}  # fmt: skip
_OURS = {"TaskSubmitted", "OutcomeReported", "SignalSent"}


def is_terminal(stream: IO[str] | None = None) -> bool:
    """Whether a person looks at it."""
    return (stream or sys.stdout).isatty()


def paint(text: str, *, stream: IO[str] | None = None, **style: Any) -> str:
    """`text` in a style, unless nobody sees it or NO_COLOR is set."""
    return click.style(text, **style) if style and has_styles(stream) else text


def has_styles(stream: IO[str] | None = None) -> bool:
    """Whether colours and dimmed text are seen."""
    return is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


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
    """A table: cut to the terminal's width, or whole when piped. `right` names the columns of numbers; they and states
    are never cut."""
    cells = [["" if cell is None else shorten(clean(str(cell)), WHOLE) for cell in row] for row in rows]
    numbers = set(right)
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    if is_terminal():
        widths = _fitted(widths, [name in numbers or name in _WHOLE_COLUMNS for name in columns])
    for row_number, row in enumerate([list(columns), *cells]):
        parts = []
        for cell, width, name in zip(row, widths, columns, strict=True):
            text = shorten(cell, width)
            text = text.rjust(width) if name in numbers else text.ljust(width)
            parts.append(bold(text) if row_number == 0 else paint(text, **_STATES.get(cell, {})))
        click.echo("  ".join(parts).rstrip())
        if row_number == 0 and is_terminal():
            click.echo(dim("─" * (sum(widths) + 2 * (len(widths) - 1))))


def _fitted(widths: list[int], whole: list[bool]) -> list[int]:
    """The widths made to fit the terminal, by cutting the widest of those that may be cut."""
    widths = list(widths)
    room = shutil.get_terminal_size().columns - 2 * (len(widths) - 1)
    while sum(widths) > room:
        widest = max((width, i) for i, width in enumerate(widths) if not whole[i] or all(whole))[1]
        if widths[widest] <= 8:
            break
        widths[widest] -= 1
    return widths


_WHOLE_COLUMNS = {"state", "variable"}
_STATES: dict[str, dict[str, Any]] = {
    state: style
    for states, style in (
        (("serving", "completed"), {"fg": "green"}),
        (("starting", "restarting", "draining", "running", "submitted"), {"fg": "yellow"}),
        (("failed", "dead", "cancelled", "gave up"), {"fg": "red"}),
        (("duplicate", "not active", "stopped"), {"dim": True}),
    )
    for state in states
}


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
    """Events under each other, one line each, so that they can be followed while they come. `versions` gives each its
    version in the task, for one task's events."""

    def __init__(self, *, versions: bool = False) -> None:
        self._versions = versions
        width = shutil.get_terminal_size().columns if is_terminal() else PIPED
        self._clock = 12 if width >= 100 else 8  # milliseconds where there is room for them
        self._room = max(width - (6 + 2 + self._clock + 2 + 17 + 2 + 14 + 2 + 6 * versions), 16)
        self._begun = False

    def show(self, event: dict[str, Any], *, faded: bool = False) -> None:
        """Print one event as `dspex.log.read` gives it."""
        if not self._begun:
            self._begun = True
            head = "time UTC" if self._clock == 8 else "time (UTC)"
            version = f"{'v':>4}  " if self._versions else ""
            click.echo(bold(f"{'at':>6}  {version}{head:<{self._clock}}  {'event':<17}  {'who':<14}  what"))
        kind = clean(event["type"])
        color = "green" if kind in _GOOD else "red" if kind in _BAD else "cyan" if kind in _OURS else None
        style: dict[str, Any] = {"dim": True} if faded else {"fg": color} if color else {}
        # A time is 2026-11-23T10:00:00.123456Z; it is UTC here as in the log.
        time = event["time"][11 : 11 + self._clock].rstrip("Z").ljust(self._clock)
        name, author = f"{shorten(kind, 17):<17}", f"{shorten(who(event), 14):<14}"
        rest = f"{author}  {shorten(gist(event), self._room)}"
        # What is about the task without being an event of it (a score, a signal) has no version in it.
        version = str(event["version"]) if event["version"] or kind == "TaskSubmitted" else ""
        number = f"{version:>4}  " if self._versions else ""
        what = dim(rest) if faded else rest
        click.echo(f"{event['position']:>6}  {number}{dim(time)}  {paint(name, **style)}  {what}")


def who(event: dict[str, Any]) -> str:
    """Who wrote an event."""
    return clean(str(event.get("source", "")).rpartition("/")[2])


def _arguments(request: Any) -> str:
    """What an effect was asked, when that was recorded and is not nothing."""
    if not isinstance(request, list) or len(request) != 2:
        return ""
    args, kwargs = request
    words = [compact(value) for value in args] + [f"{name}={compact(value)}" for name, value in kwargs.items()]
    return f"({', '.join(words)})" if words else ""


def _cost(usage: dict[str, Any]) -> str:
    """What an effect has cost."""
    tokens = f"{usage['tokens']:,} tokens" if usage.get("tokens") else ""
    usd = f"${usage['usd']:.6g}" if usage.get("usd") else ""
    return " ".join(part for part in (usd, tokens, usage.get("model", "")) if part) or "free"


def gist(event: dict[str, Any]) -> str:
    """What an event says, in one short line."""
    data: dict[str, Any] = event["data"] if isinstance(event.get("data"), dict) else {}
    match event["type"]:
        case "TaskSubmitted":
            key = data.get("headers", {}).get("Dspex-Key")
            forked = data.get("headers", {}).get("Dspex-Fork")
            about = (f", key {clean(key)}" if key else "") + (f", a fork of {clean(forked)}" if forked else "")
            return f"{data['program']} {compact(data['input'])}{about}"
        case "TaskForked":
            count = f"{data['records']} record{'' if data['records'] == 1 else 's'}"
            return clean(f"shares events 1 to {data['at']} of task {data['parent']}: {count}")
        case "AssignmentProposed":
            why = ", ".join(part for part in (data.get("who"), data.get("why")) if part)
            return clean(f"{data['assignment'][:8]} {compact(data['values'])}" + (f" ({why})" if why else ""))
        case "ProgramScaled":
            between = f" of {data['least']}..{data['most']}" if data["least"] < data["most"] else ""
            why = ", ".join(part for part in (data.get("by"), data.get("why")) if part)
            return clean(f"{data['program']} {data['agents']}{between} agents" + (f" ({why})" if why else ""))
        case "ProgramReloaded":
            by = f", by {data['by']}" if data.get("by") else ""
            return clean(f"{data['program']} code {data['code'] or '?'}, was {data.get('was') or '?'}{by}")
        case "TaskClaimed":
            alone = ", alone" if data.get("alone") else ""
            return f"attempt {data['attempt']}, values {data['assignment'][:8]}{alone}"
        case "AttemptDied":
            company = "alone" if data.get("alone") else "beside others"
            return clean(f"attempt {data['attempt']} of {data['agent']}: {data['reason']}, {company}")
        case "TaskCompleted":
            return f"{compact(data['output'])}, {duration(data.get('seconds'))}"
        case "EffectRecorded":
            raised = data.get("error", "").partition(":")[2]
            gave = f"raised {raised} {compact(data['arguments'])}" if raised else compact(data.get("result"))
            # A copy says which event of its parent it was made of.
            parent, _, version = str(event.get("causationid", "")).rpartition("/")
            copied = f"(from {parent.rpartition('.')[2]}@{version}) " if parent else ""
            cost = f", {_cost(data['usage'])}" if data.get("usage") else ""
            return clean(f"{copied}{data['key']}{_arguments(data.get('request'))} → {gave}{cost}")
        case "EffectRetried":
            when = clock(data["until"], event["time"])
            return clean(f"{data['key']} raised {data['type']}, retry {data['retry']} at {when}")
        case "EffectsInterrupted":
            told = ", ".join(f"{it['key']} (key {it['idempotency_key']})" for it in data["effects"])
            return clean(f"under way when attempt {data['attempt']} was stopped: {told}")
        case "TaskSleeping":
            signal = f"for the signal {data['signal']}" if data.get("signal") else ""
            until = f"until {clock(data['until'], event['time'])}" if data.get("until") else ""
            return clean(f"at {data['key']} {signal} {until}")
        case "TaskRetried":
            when = clock(data["until"], event["time"])
            return clean(f"retry {data['retry']} at {when}, {data['type']}: {data['message']}")
        case "SignalReceived":
            return f"{clean(data['name'])} {compact(data['value'])}"
        case "TaskFailed":
            return clean(f"{data['code']} {data['type']}: {data.get('detail') or data['message']}")
        case "TaskDuplicate":
            return clean(f"the same as task {data['of']} (key {data['key']})")
        case "TaskResubmitted":
            how = ", from the start" if data.get("clean") else ""
            changed = f", {', '.join(data['changed'])} changed" if data.get("changed") else ""
            by = f", by {data['actor']}" if data.get("actor") else ""
            return clean(f"as task {data['successor']}{how}{changed}{by}")
        case "TaskDropped":
            return clean(f"{data['why']}, by {data['actor'] or 'somebody'}")
        case "TaskCancelled":
            by = f", by {data['by']}" if data.get("by") else ""
            return clean((data.get("reason") or "cancelled") + by)
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
            count = f"{len(variables)} variable{'' if len(variables) == 1 else 's'}"
            return clean(f"{data['program']}, {count}, from {data.get('app') or 'a class'}")
        case "BreakerOpened":
            slow = f"{data['slow']} slow" if data["reason"] == "slow" else f"{data['failures']} failed"
            return f"of {data['calls']} calls {slow} in {data['window']}, until {clock(data['due'], event['time'])}"
        case "BreakerHalfOpened" | "BreakerClosed":
            by = f", reset by {clean(data['by'])}" if data.get("by") else ""
            held = f", {len(data['permits'])} under way" if data.get("permits") else ""
            return f"of {data['calls']} trial calls {data['failures']} failed{held}{by}"
        case "DoorsClosed":
            return clean(data["message"])
        case "DoorsOpened":
            return clean(f"new tasks{' of ' + data['program'] if data.get('program') else ''} are taken again")
        case "AgentStarted":
            return clean(f"{data['role']}, process {data['pid']}, restarts {data.get('restarts', 0)}")
        case "LimitSet":
            why = ", ".join(part for part in (data.get("who"), data.get("why")) if part)
            texts = " ".join(f"{name}={value}" for name, value in data["limits"].items())
            return clean(f"{data['scope']} {texts}" + (f" ({why})" if why else ""))
        case "LimitCleared":
            return clean(f"{data['scope']}" + (f" ({data['who']})" if data.get("who") else ""))
        case "LimitReached":
            what = f"{data['percent']} % of {data['limit']} of {data['scope']}"
            return clean(f"{what}: {data['used']:g} of {data['of']:g}, window {data['window']}")
        case "BudgetLeased":
            over = ", spent beyond what was reserved" if data.get("overrun") else ""
            return clean(f"{data['amount']:g} {data['resource']} of {data['scope']} to {data['holder']}{over}")
        case "BudgetSettled":
            assumed = ", as its holder is gone" if data.get("assumed") else ""
            return clean(f"{data['used']:g} {data['resource']} of {data['scope']} used{assumed}")
        case "AgentStopped" | "AgentCrashed":
            return clean(f"process {data['pid']}: {data['reason']}")
        case "AgentGaveUp":
            return clean(f"after {data.get('restarts', 0)} restarts: {data['reason']}")
        case _:
            return compact(data)


def clock(seconds: float, beside: str) -> str:
    """A time of day in UTC, with its date unless it is on the day of `beside`, a time as the log has it."""
    from datetime import datetime

    when = datetime.fromtimestamp(seconds, UTC)
    day = "" if f"{when:%Y-%m-%d}" == beside[:10] else f"{when:%Y-%m-%d} "
    return f"{day}{when:%H:%M:%S} UTC"


def _fields(body: object) -> str:
    if not isinstance(body, dict):
        return compact(body)
    return ", ".join(f"{clean(str(name))} {compact(value)}" for name, value in body.items())
