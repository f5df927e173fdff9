"""`dspex diff`: two tasks, or two versions of one, event by event and value by value."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import click

from dspex.console.options import Options, common
from dspex.console.render import bold, compact, dim, green, is_terminal, paint, print_json, shorten
from dspex.console.sources import log_option, opened

if TYPE_CHECKING:
    from dspex.compose.story import Story
    from dspex.core.compare import Change, Row
    from dspex.core.events import Event

__all__ = ["diff"]

PIPED = 80


@click.command(short_help="Compare two tasks, or two versions of one.")
@click.argument("left", metavar="A")
@click.argument("right", metavar="B")
@click.option("--all", "everything", is_flag=True, help="Ids, times, attempts and durations, too.")
@log_option
@common
def diff(options: Options, left: str, right: str, everything: bool, log: str | None) -> int:
    """Compare two tasks event by event, or two versions of one task: `42@3 42@7`.

    Only what a run decides is compared; with --all also ids, times, attempts and durations, which are others in every
    run. Exit code 1 when something differs.
    """

    async def work() -> tuple[list[Event], list[Event], Story, Story]:
        async with opened(options, log) as source:
            one, cut = await _side(source, left)
            other, short = await _side(source, right)
            return cut, short, one, other

    before, after, one, other = options.run(work())
    from dspex.core.compare import compare

    rows = compare(before, after, everything=everything)
    outcome = _states(before, after)
    differ = sum(not row.same for row in rows)
    if options.json:
        print_json(
            {
                "left": left, "right": right, "same": not differ, "events": [_json(row) for row in rows],
                "state": [_change(change) for change in outcome],
            }
        )  # fmt: skip
    else:
        _show(left, right, one, other, rows, outcome)
    return 1 if differ else 0


async def _side(source: Any, text: str) -> tuple[Story, list[Event]]:
    """A task, and its events up to the version that was named with it."""
    from dspex.compose.story import story_of

    task, sign, version = text.partition("@")
    if not (task.isascii() and task.isdecimal()) or (sign and not version.isdecimal()):
        raise click.UsageError(f"{text} is no task; write its id, or id@version, e.g. 42@3")
    story = await story_of(source, task)
    if sign and int(version) > story.versions:
        raise click.UsageError(f"task {task} has versions 0 to {story.versions}, there is no {version}")
    return story, story.at(int(version)) if sign else story.events


def _states(before: list[Event], after: list[Event]) -> list[Change]:
    """How the two ends differ."""
    from dspex.console.history import state_of
    from dspex.core.compare import changes
    from dspex.core.task import fold

    kept = ("state", "input", "output", "error")
    one, other = ({name: state_of(fold(events))[name] for name in kept} for events in (before, after))
    return list(changes(one, other))


def _json(row: Row) -> dict[str, Any]:
    return {
        "left": _head(row.left), "right": _head(row.right), "same": row.same,
        "changes": [_change(change) for change in row.changes],
    }  # fmt: skip


def _head(event: Event | None) -> dict[str, Any] | None:
    if event is None:
        return None
    return {"version": event.version, "type": event.type, "place": getattr(event.data, "key", None)}


def _change(change: Change) -> dict[str, Any]:
    """A place with both values; a value that is not there is left out, for null would be one."""
    from dspex.core.compare import ABSENT

    sides = {"left": change.left, "right": change.right}
    return {"path": change.path, **{name: value for name, value in sides.items() if value is not ABSENT}}


def _show(left: str, right: str, one: Story, other: Story, rows: list[Row], outcome: list[Change]) -> None:
    width = shutil.get_terminal_size().columns if is_terminal() else PIPED
    half = (width - 5) // 2
    heads = (_fit(f"{left} of {one.program}", half), _fit(f"{right} of {other.program}", half))
    click.echo(bold("  " + "   ".join(heads).rstrip()))
    for row in rows:
        mark = " " if row.same else "<" if row.right is None else ">" if row.left is None else "~"
        line = f"{mark} {_fit(_name(row.left), half)}   {_fit(_name(row.right), half)}".rstrip()
        click.echo(dim(line) if row.same else paint(line, fg="yellow" if mark == "~" else "cyan"))
        for change in row.changes:
            _show_change(change, width)
    differ = sum(not row.same for row in rows)
    click.echo()
    if not differ:
        click.echo(f"{green('same')}: {len(rows)} events, ids, times and attempts apart")
        return
    click.echo(f"{bold(f'{differ} of {len(rows)} events differ')}" + ("; the ends are the same" if not outcome else ""))
    for change in outcome:
        _show_change(change, width)


def _show_change(change: Change, width: int) -> None:
    room = max(width - 6, 20)
    click.echo(f"    {bold(shorten(change.path, room))}")
    click.echo(paint(f"      - {shorten(_text(change.left), room - 4)}", fg="red"))
    click.echo(paint(f"      + {shorten(_text(change.right), room - 4)}", fg="green"))


def _text(value: Any) -> str:
    from dspex.core.compare import ABSENT

    return "(nothing)" if value is ABSENT else compact(value)


def _name(event: Event | None) -> str:
    if event is None:
        return ""
    return f"{event.version:>3} {event.type} {getattr(event.data, 'key', '')}".rstrip()


def _fit(text: str, width: int) -> str:
    return shorten(text, width).ljust(width)
