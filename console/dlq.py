"""`dspex dlq`: the tasks that were set aside; why, what became of each attempt, and what is to be done about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import click

from dspex.console.bodies import is_id
from dspex.console.options import Options, common
from dspex.console.programs import check_program, program_names
from dspex.console.render import EventLines, bold, clean, compact, dim, print_fields, print_json, print_table
from dspex.console.sources import log_option, opened, settings_of, time_of

if TYPE_CHECKING:
    from dspex.compose.caller import Caller
    from dspex.compose.story import Story
    from dspex.core.find import TaskRow
    from dspex.core.tries import Try

__all__ = ["dlq"]

FIRST = 60
"""Characters of an input that a list shows."""


@click.group(short_help="Show the dead letters; retry or drop them.")
def dlq() -> None:
    """Dead letters: tasks that were set aside because their process died each time, and with --failed those that failed
    after all of their retries.

    They are counted in the log. Nothing is lost by setting a task aside: it can be retried, with what it recorded.
    """


# -- ls


@dlq.command("ls", short_help="List them, with what they died of.")
@click.argument("program", required=False, shell_complete=program_names)
@click.option("--since", metavar="TIME", help="Ended at or after TIME: 2026-11-23T10:00:00, 10:00 (UTC) or 2h ago.")
@click.option("--failed", is_flag=True, help="Also those that failed after their retries.")
@click.option("--all", "dropped", is_flag=True, help="Also those that were dropped.")
@click.option("--limit", type=click.IntRange(0), help="So many at most; 0 is all (default: 50, with --json all).")
@log_option
@common
def ls(
    options: Options, program: str | None, since: str | None, failed: bool, dropped: bool, limit: int | None,
    log: str | None,
) -> None:  # fmt: skip
    """List the dead letters, oldest first, and count them by program and reason."""
    kept = limit if limit is not None else (0 if options.json else 50)

    async def work() -> list[TaskRow]:
        from dspex.compose.find import Finder
        from dspex.compose.letters import letter_query

        query = letter_query(program or "", since=time_of(since) if since else "", failed=failed, dropped=dropped)
        async with opened(options, log) as source, Finder(source) as finder:
            await check_program(source, program)
            return [row async for row in finder.rows(query, kept)]

    rows = options.run(work())
    if options.json:
        for row in rows:
            print_json(_json(row))
        return
    if not rows:
        click.echo("no dead letters")
        return
    _show(rows)


def _json(row: TaskRow) -> dict[str, Any]:
    reason = row.error or {}
    return {
        "task": row.task, "program": row.program, "state": row.state, "ended": row.ended, "attempts": row.attempts,
        "deaths": row.deaths, "retries": row.retries, "agent": row.agent, "code": reason.get("code"),
        "type": reason.get("type"), "reason": reason.get("message"), "input": row.input, "retried": row.retried,
        "dropped": row.dropped,
    }  # fmt: skip


def _show(rows: list[TaskRow]) -> None:
    columns = ["task", "program", "state", "tries", "deaths", "holder", "age", "now", "reason", "input"]
    print_table(
        columns,
        [
            [
                row.task, row.program, row.state, row.attempts, row.deaths, row.agent, _age(row.ended), _now(row),
                _reason(row), "" if row.input is None else compact(row.input)[:FIRST],
            ]
            for row in rows
        ],
        right={"task", "tries", "deaths", "age"},
    )  # fmt: skip
    counts = Counter((row.program, _reason(row)) for row in rows)
    click.echo()
    print_table(
        ["count", "program", "reason"], [[n, name, why] for (name, why), n in counts.most_common()], right={"count"}
    )


def _now(row: TaskRow) -> str:
    if row.dropped:
        return "dropped"
    return f"retried as {row.retried}" if row.retried else ""


def _reason(row: TaskRow) -> str:
    if not row.error:
        return ""
    return row.error["message"] if row.state == "dead" else f"{row.error['code']} {row.error['type']}"


def _age(ended: str | None) -> str:
    from datetime import UTC, datetime

    if not ended:
        return ""
    seconds = (datetime.now(UTC) - datetime.fromisoformat(ended)).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


# -- show


@dlq.command(short_help="Show the whole history of one task.")
@click.argument("task")
@log_option
@common
def show(options: Options, task: str, log: str | None) -> None:
    """Show every attempt on a task: who held it, how that ended, what it recorded; and then its events.

    Any task can be shown, whatever became of it. What is private of it is not.
    """

    async def work() -> Story:
        from dspex.compose.story import story_of

        async with opened(options, log) as source:
            return await story_of(source, task)

    story = options.run(work())
    from dspex.core.tries import tries_of

    # As the log has them, not what was brought back from under their seals.
    tries = tries_of(event for event in story.every if event.aggregate.startswith("task."))
    if options.json:
        print_json(_history(story, tries))
        return
    for name, value in _history(story, []).items():
        if value not in (None, "", [], False) and name not in ("attempts", "events"):
            print_fields([(name, compact(value))])
    click.echo()
    print_table(
        ["attempt", "agent", "began (UTC)", "ended", "effects", "company", "end", "where"],
        [
            [
                it.attempt, it.agent, it.began[11:23], it.ended[11:23], it.effects, "alone" if it.alone else "",
                it.end or "goes on", it.where,
            ]
            for it in tries
        ],
        right={"attempt", "effects"},
    )  # fmt: skip
    click.echo()
    lines = EventLines(versions=True)
    for event in story.shown:
        lines.show(event)


def _history(story: Story, tries: list[Try]) -> dict[str, Any]:
    import msgspec

    from dspex.core.aggregates import FOLDS

    state = story.state
    letter = FOLDS["dlq"](event for event in story.every if event.aggregate.startswith("dlq."))
    return {
        "task": story.task, "program": story.program, "state": state.status, "reason": state.message or None,
        "type": state.error or None, "retried": letter.successor or None, "dropped": letter.dropped or None,
        "why": letter.why or None, "attempts": [msgspec.to_builtins(it) for it in tries],
        "events": story.shown,
    }  # fmt: skip


# -- retry, drop


@dlq.command(short_help="Submit dead letters again.")
@click.argument("tasks", nargs=-1, metavar="[TASK]...")
@click.option("--all", "program", metavar="PROGRAM", help="All of this program's that were not retried yet.",
              shell_complete=program_names)  # fmt: skip
@click.option("--failed", is_flag=True, help="With --all: also those that failed after their retries.")
@click.option("--set", "pairs", multiple=True, metavar="K=V", help="Set a variable, or input.<field>; may be repeated.")
@click.option("--clean", is_flag=True, help="Begin anew, with nothing of what was recorded.")
@common
def retry(
    options: Options, tasks: tuple[str, ...], program: str | None, failed: bool, pairs: tuple[str, ...], clean: bool
) -> int:
    """Submit tasks again that ended without an output, each as a new task with what the old one had recorded.

    Effects that were under way are done again under the same idempotency key, what had failed is done again, and
    nothing else. The same retry twice is one task. `dspex result` of the old one then gives what the new one gives.
    """
    if bool(tasks) == bool(program):
        raise click.UsageError("dlq retry TASK…, or dlq retry --all PROGRAM")
    values = settings_of(pairs)

    def again(caller: Caller, task: str) -> Coroutine[Any, Any, dict[str, Any]]:
        return caller.retry(task, clean=clean, values=values, actor=_who())

    return _each(options, tasks, program, failed, again)


@dlq.command(short_help="Have no more done about dead letters.")
@click.argument("tasks", nargs=-1, required=True, metavar="TASK...")
@click.option("--why", required=True, metavar="TEXT", help="Why, for the log.")
@common
def drop(options: Options, tasks: tuple[str, ...], why: str) -> int:
    """Drop tasks that ended without an output: the list shows them only with --all, and the log says who and why."""
    return _each(options, tasks, None, False, lambda caller, task: caller.drop(task, why, actor=_who()))


def _who() -> str:
    import getpass

    return getpass.getuser()


def _each(options: Options, tasks: tuple[str, ...], program: str | None, failed: bool, do: Any) -> int:
    """Do it for each; those that are refused are told, and the others go on. The exit code."""
    for task in tasks:
        if not is_id(task):
            raise click.UsageError(f"{task} is no task's id; `dspex dlq ls` lists them")

    async def work() -> int:
        from dspex.core.errors import TaskError

        refused = 0
        async with options.connect() as caller:
            for task in tasks or await _letters(caller, program or "", failed):
                try:
                    _tell(options, await do(caller, task))
                except TaskError as error:
                    refused += 1
                    _refuse(options, task, error)
        return 1 if refused else 0

    return options.run(work())


async def _letters(caller: Caller, program: str, failed: bool) -> list[str]:
    from dspex.compose.find import Finder
    from dspex.compose.letters import letter_query
    from dspex.compose.story import BusSource

    source = BusSource(caller)
    await check_program(source, program)
    async with Finder(source) as finder:
        return [row.task async for row in finder.rows(letter_query(program, failed=failed), 0) if not row.retried]


def _tell(options: Options, found: dict[str, Any]) -> None:
    if options.json:
        print_json(found)
    elif "retried" in found:
        before = "" if found["fresh"] else dim(" (it was before)")
        click.echo(f"task {found['task']} is retried as {bold(found['retried'])}{before}")
    else:
        click.echo(f"task {found['task']} is dropped{'' if found['fresh'] else dim(' (it was before)')}")


def _refuse(options: Options, task: str, error: Any) -> None:
    if options.json:
        print_json({"error": {"type": error.type, "message": error.message, "task": task, "code": error.code}})
    else:
        click.echo(f"dspex: {clean(error.message)}", err=True)
