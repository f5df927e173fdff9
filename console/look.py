"""What runs, what came in, what happened: ps, tasks, events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import click

from dspex.console.history import state_of
from dspex.console.options import Options, common
from dspex.console.programs import check_program, program_names
from dspex.console.render import EventLines, clean, compact, duration, print_json, print_table
from dspex.console.sources import log_option, opened

if TYPE_CHECKING:
    from dspex.compose.caller import Caller
    from dspex.compose.story import Source
    from dspex.core.task import TaskState

__all__ = ["events", "ps", "tasks"]

STATES = ["submitted", "running", "sleeping", "completed", "failed", "dead", "duplicate", "cancelled"]
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
    columns = ["agent", "serves", "pid", "state", "restarts", "tasks"]
    rows = [
        [
            p["agent"],
            p["program"] or p.get("role"),
            p["pid"],
            p["state"],
            p["restarts"],
            p["tasks"] if p["program"] else "",
        ]
        for p in processes
    ]
    print_table(columns, rows, right={"pid", "restarts", "tasks"})


@click.command(short_help="Show the tasks that came in.")
@click.argument("program", required=False, shell_complete=program_names)
@click.option("--state", type=click.Choice(STATES), help="Only tasks in this state.")
@click.option("--limit", type=click.IntRange(0), help="The newest so many; 0 is all (default: 50, with --json all).")
@log_option
@common
def tasks(options: Options, program: str | None, state: str | None, limit: int | None, log: str | None) -> None:
    """Show the tasks that came in, oldest first, and where they stand."""
    kept = limit if limit is not None else (0 if options.json else 50)

    async def work() -> deque[tuple[str, str, str, TaskState]]:
        async with opened(options, log) as source:
            await check_program(source, program)
            query = {"program": program} if program else {}
            found = await _folded(source, query)
        wanted = [row for row in found if state is None or row[3].status == state]
        return deque(wanted, kept or None)

    rows = options.run(work())
    if options.json:
        for task, name, came, where in rows:
            print_json({"task": task, "program": name, "submitted": came, **state_of(where)})
        return
    print_table(
        ["task", "program", "state", "tries", "came (UTC)", "took", "what came of it"],
        [
            [task, name, where.status, where.attempts, came[11:19], duration(where.seconds or None), _end(where)]
            for task, name, came, where in rows
        ],
        right={"task", "tries", "took"},
    )


async def _folded(source: Source, query: dict[str, Any]) -> list[tuple[str, str, str, TaskState]]:
    """Every task that the events name: id, program, when it came in, and its state."""
    from dspex.compose.story import to_event
    from dspex.core.task import TaskState, fold

    states: dict[str, TaskState] = {}
    came: dict[str, str] = {}
    async for event in source.events(**query):
        name = event["aggregate"]
        if name.startswith("task."):
            came.setdefault(name, event["time"])
            states[name] = fold([to_event(event)], states.get(name, TaskState()))
    return [(name.split(".")[2], name.split(".")[1], came[name], state) for name, state in states.items()]


def _end(state: TaskState) -> str:
    """What came of a task, in a line."""
    if state.output is not None:
        return compact(_json(bytes(state.output)))
    if state.of:
        return f"the same as task {state.of}"
    if state.error:
        return f"{state.code} {state.error}: {state.message}"
    if state.status == "sleeping":  # nobody holds it meanwhile
        signals = sorted({wait.signal for wait in state.waits if wait.signal})
        return clean(f"waits for the signal {' or '.join(signals)}" if signals else "waits for a time")
    return f"held by {state.agent}" if state.agent else ""


def _json(body: bytes) -> Any:
    import json

    return json.loads(body)


@click.command(short_help="Show what happened, from the log.")
@click.argument("task", required=False)
@click.option("--program", metavar="PROGRAM", help="Only events of this program.", shell_complete=program_names)
@click.option("--follow", "-f", is_flag=True, help="Go on with what happens, until Ctrl-C.")
@click.option("--after", type=click.IntRange(0), metavar="N", help="Only what is behind position N of the log.")
@click.option("--limit", type=click.IntRange(0), help="So many at most; 0 is all (default: 100, with --json all).")
@log_option
@common
def events(
    options: Options, task: str | None, program: str | None, follow: bool, after: int | None, limit: int | None,
    log: str | None,
) -> None:  # fmt: skip
    """Show what happened, from the log: everything, or one program's or one task's events.

    With --limit they are the newest, or with --after the first behind that position. With --json they are
    CloudEvents, one per line, each with its position in the log.
    """
    if task and program:
        raise click.UsageError("a task and a program were given; one of them is due")
    if follow and log:
        raise click.UsageError("--follow and --log were given; nothing happens in a file")
    wanted = limit if limit is not None else (0 if options.json or task else 100)
    query = {"task": task} if task else {"program": program} if program else {}
    lines = EventLines()

    def show(event: dict[str, Any]) -> None:
        if options.json:
            print_json(event)
        else:
            lines.show(event)

    async def work() -> None:
        async with opened(options, log) as source:
            await check_program(source, program)
            last = await _show_past(source, query, after, wanted, show, quiet=follow)
        if follow:
            async with options.connect() as caller:
                async for event in _coming(caller, query, last):
                    show(event)

    options.run(work())


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
