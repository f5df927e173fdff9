"""tasks: which came in, and what came of them, found by what is known of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dspex.console.options import Options, common
from dspex.console.programs import check_program, program_names
from dspex.console.render import clean, compact, duration, print_json, print_table
from dspex.console.sources import log_option, opened, time_of

if TYPE_CHECKING:
    from dspex.core.find import TaskQuery, TaskRow

__all__ = ["tasks"]


@click.command(short_help="Show and find the tasks that came in.")
@click.argument("program", required=False, shell_complete=program_names)
@click.option("--program", "named", metavar="PROGRAM", help="The same as the argument.", shell_complete=program_names)
@click.option("--state", metavar="STATE,…", help="Only tasks in one of these states.")
@click.option("--since", metavar="TIME", help="Came in at or after TIME: 2026-11-23T10:00:00, 10:00 (UTC) or 2h ago.")
@click.option("--until", metavar="TIME", help="Came in before TIME.")
@click.option("--key", help="Submitted with this key.")
@click.option("--score", metavar="CONDITION", help="Scored so: '>=0.8', '<0.5', '=1'; the newest score counts.")
@click.option("--text", metavar="WORDS", help="All these words are in the input or output; '\"in a row\"', 'begin*'.")
@click.option("--parent", metavar="TASK", help="Started by this task.")
@click.option("--after", type=click.IntRange(0), metavar="ID", help="The first behind this task, not the newest.")
@click.option("--limit", type=click.IntRange(0), help="So many at most; 0 is all (default: 50, with --json all).")
@log_option
@common
def tasks(
    options: Options, program: str | None, named: str | None, state: str | None, since: str | None, until: str | None,
    key: str | None, score: str | None, text: str | None, parent: str | None, after: int | None, limit: int | None,
    log: str | None,
) -> None:  # fmt: skip
    """Show the tasks that came in, oldest first, and where they stand.

    What is given has to be so of each that is shown. A running system finds them in its archive, a file (--log) is
    searched by itself.
    """
    from dspex.core.find import TaskQuery

    if program and named and program != named:
        raise click.UsageError(f"the programs {program} and {named} were given; one is due")
    query = TaskQuery(
        program=program or named or "", state=[one.strip() for one in (state or "").split(",") if one.strip()],
        since=time_of(since) if since else "", until=time_of(until) if until else "", key=key or "",
        score=score or "", text=text or "", parent=parent or "", after=after,
    )  # fmt: skip
    kept = limit if limit is not None else (0 if options.json else 50)
    rows = options.run(_find(options, query, kept, log))
    if not options.json:
        _show(rows)


async def _find(options: Options, query: TaskQuery, limit: int, log: str | None) -> list[TaskRow]:
    """The rows; with --json they are printed as they come and not kept."""
    from dspex.compose.find import Finder

    rows: list[TaskRow] = []
    async with opened(options, log) as source:
        await check_program(source, query.program or None)
        async with Finder(source) as finder:
            async for row in finder.rows(query, limit):
                if options.json:
                    print_json(_json(row))
                else:
                    rows.append(row)
            if finder.known < finder.head:
                said = f"dspex: the archive is behind: it knows the log up to {finder.known:,} of {finder.head:,}"
                click.echo(said, err=True)
    return rows


def _json(row: TaskRow) -> dict[str, Any]:
    import msgspec

    shown: dict[str, Any] = msgspec.to_builtins(row)
    del shown["last"], shown["waits"]
    return shown


def _show(rows: list[TaskRow]) -> None:
    scored = any(row.score is not None for row in rows)
    columns = ["task", "program", "state", "tries", "came (UTC)", "took", *(["score"] if scored else []),
               "what came of it"]  # fmt: skip
    print_table(
        columns,
        [
            [
                row.task, row.program, row.state, row.attempts, row.submitted[11:19], duration(row.seconds or None),
                *([_score(row.score)] if scored else []), end_of(row),
            ]
            for row in rows
        ],
        right={"task", "tries", "took", "score"},
    )  # fmt: skip


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.4g}"


def end_of(row: TaskRow) -> str:
    """What came of a task, in a line."""
    said = _said(row)
    return f"fork of {clean(row.forked)}: {said}" if row.forked else said


def _said(row: TaskRow) -> str:
    if row.output is not None:
        return compact(row.output)
    if row.of:
        return f"the same as task {row.of}"
    if row.error:
        return clean(f"{row.error['code']} {row.error['type']}: {row.error['message']}")
    if row.state == "sleeping":  # nobody holds it meanwhile
        return clean(f"waits for the signal {' or '.join(row.waits)}" if row.waits else "waits for a time")
    if row.state == "completed":
        return "its output is sealed, or too large to be among the events; `dspex result` has it"
    version = f", code {row.code}" if row.code else ""
    if row.agent:
        return clean(f"held by {row.agent}{version}")
    return clean(f"waits for an agent with code {row.code}") if row.code else ""
