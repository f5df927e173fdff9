"""What runs, and what happened: ps, events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import click

from dspex.console.options import Options, common
from dspex.console.programs import check_program, program_names
from dspex.console.render import EventLines, clean, compact, print_fields, print_json, print_table
from dspex.console.sources import log_option, opened, time_of

if TYPE_CHECKING:
    from dspex.compose.caller import Caller
    from dspex.compose.story import Source

__all__ = ["events", "ps"]

TAIL_WAIT = 20.0


@click.command(short_help="Show the processes that run.")
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C.")
@common
def ps(options: Options, watch: bool) -> None:
    """Show the processes that run: agents, and what looks after them."""

    async def work() -> None:
        async with options.connect() as caller:
            while True:
                _show_processes(options, await caller.processes())
                if not watch:
                    return
                await asyncio.sleep(1)

    options.run(work())


def _show_processes(options: Options, processes: list[dict[str, Any]]) -> None:
    if options.json:
        for process in processes:
            print_json(process)
        return
    if not processes:
        click.echo(
            "dspex: a NATS server answers, but nothing of dspex runs on it; `dspex up FILE` runs a program", err=True
        )
        return
    columns = ["agent", "serves", "supervisor", "pid", "state", "restarts", "tasks", "why"]
    rows = [
        [
            p["agent"],
            p["program"] or p.get("role"),
            p["supervisor"] or "",
            p["pid"] or "",
            p["state"],
            p["restarts"],
            p["tasks"] if p["program"] else "",
            p["why"],
        ]
        for p in processes
    ]
    print_table(columns, rows, right={"pid", "restarts", "tasks"})


@click.command(short_help="Show what happened, from the log.")
@click.argument("what", metavar="[TASK|AGGREGATE]", required=False)
@click.option("--program", metavar="PROGRAM", help="Only events of this program.", shell_complete=program_names)
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@click.option("--after", type=click.IntRange(0), metavar="N", help="Only what is behind position N of the log.")
@click.option("--limit", type=click.IntRange(0), help="So many at most; 0 is all (default: 100, with --json all).")
@click.option("--to", type=click.IntRange(0), metavar="N", help="The aggregate's own events, up to its version N.")
@click.option("--at", metavar="TIME", help="The same, up to a time: 2026-11-23T10:00:00, 10:00:00 (UTC) or 2h ago.")
@click.option("--state", is_flag=True, help="Show the state that the aggregate's events add up to, not the events.")
@log_option
@common
def events(
    options: Options, what: str | None, program: str | None, follow: bool, after: int | None, limit: int | None,
    to: int | None, at: str | None, state: bool, log: str | None,
) -> None:  # fmt: skip
    """Show what happened, from the log: everything, or one program's, one task's or one aggregate's events.

    An aggregate is kind.name.id, such as task.qabot.42 or program.qabot.0. With --limit they are the newest, or with
    --after the first behind that position. With --json they are CloudEvents, one per line, each with its position in
    the log.
    """
    if what and program:
        raise click.UsageError("a task and a program were given; one of them is due")
    if follow and log:
        raise click.UsageError("--follow and --log were given; nothing happens in a file")
    narrow = state or at is not None or to is not None
    if narrow and (not what or follow or after is not None):
        raise click.UsageError("--to, --at and --state need a task or an aggregate, and neither --follow nor --after")
    if to is not None and at is not None:
        raise click.UsageError("--to and --at were given; one of them is due")
    if what and (narrow or ("." in what and not follow and after is None)):
        options.run(_show_aggregate(options, what, to, time_of(at) if at else "", state, limit or 0, log))
        return
    wanted = limit if limit is not None else (0 if options.json or what else 100)
    query = _query(what) if what else {"program": program} if program else {}
    show = _shower(options, versions=what is not None)

    async def work() -> None:
        async with opened(options, log) as source:
            await check_program(source, program)
            last = await _show_past(source, query, after, wanted, show, quiet=follow)
        if follow:
            async with options.connect() as caller:
                async for event in _coming(caller, query, last):
                    show(event)

    options.run(work())


def _query(what: str) -> dict[str, Any]:
    """A task's id asks for its story, an aggregate's name for its own events."""
    return {"aggregate": what} if "." in what else {"task": what}


def _shower(options: Options, *, versions: bool = False) -> Callable[[dict[str, Any]], None]:
    return print_json if options.json else EventLines(versions=versions).show


async def _show_aggregate(
    options: Options, what: str, to: int | None, at: str, state: bool, limit: int, log: str | None
) -> None:
    """One aggregate's own events up to a version or a time (the last `limit` of them), or the state after them."""
    from dspex.compose.state import events_of_aggregate, state_at
    from dspex.compose.story import shown, story_of

    async with opened(options, log) as source:
        name = what if "." in what else (await story_of(source, what)).events[0].aggregate
        if not state:
            show = _shower(options)
            for event in (await events_of_aggregate(source, name, to, at))[-limit:]:
                show(shown(event))
            return
        found = await state_at(source, name, to, at)
    if options.json:
        print_json(found)
        return
    about = {name: found[name] for name in ("aggregate", "version", "position", "time")}
    print_fields([(name, compact(value)) for name, value in (about | found["state"]).items()])


async def _show_past(
    source: Source, query: dict[str, Any], after: int | None, limit: int, show: Any, *, quiet: bool
) -> int:
    """Show what is there; return the position up to which it was looked at."""
    head = await source.head()
    if after is not None or not limit:
        shown, last = 0, after or 0
        async for event in source.events(after=after or 0, **query):
            if limit and shown >= limit:
                return last
            show(event)
            shown, last = shown + 1, event["position"]
        return max(head, last)
    # Without a filter every position has an event, so the newest are found without reading the rest.
    start = max(0, head - limit) if not query else 0
    newest: deque[dict[str, Any]] = deque(maxlen=limit)
    more = start > 0
    async for event in source.events(after=start, **query):
        more = more or len(newest) == limit
        newest.append(event)
    for event in newest:
        show(event)
    if more and not quiet:
        click.echo(f"dspex: the newest {limit}; --limit 0 shows all", err=True)
    return max(head, newest[-1]["position"] if newest else 0)


async def _coming(caller: Caller, query: dict[str, Any], after: int) -> AsyncIterator[dict[str, Any]]:
    """Events as they are appended, for ever; over a lost connection, too."""
    from dspex.core.errors import ConnectionFailed, DeadlineExceeded, Unavailable

    while True:
        try:
            page = await caller.read_log(wait=TAIL_WAIT, after=after, **query)
        except (ConnectionFailed, DeadlineExceeded, Unavailable) as error:
            click.echo(f"dspex: {clean(str(error))}; trying on", err=True)
            await asyncio.sleep(2)
            continue
        for event in page["events"]:
            yield event
        after = max(after, int(page["next"]))
