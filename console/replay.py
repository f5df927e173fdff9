"""`dspex replay`: a task from the log, at any version or time, and today's code run on what was recorded."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import TYPE_CHECKING, Any

import click

from dspex.console.history import state_of
from dspex.console.options import Options, common
from dspex.console.programs import program_names
from dspex.console.render import (
    EventLines,
    bold,
    clean,
    compact,
    duration,
    green,
    has_styles,
    print_fields,
    print_json,
    yellow,
)
from dspex.console.sources import code_of, log_option, opened, settings_of, time_of

if TYPE_CHECKING:
    from dspex.compose.story import Story
    from dspex.console.stops import Stops
    from dspex.core.program import Program
    from dspex.core.replay import Difference, Report, Rerun
    from dspex.core.task import TaskState

__all__ = ["judge", "replay", "show_difference"]


@click.command(short_help="Run recorded tasks again, no effect performed.")
@click.argument("task", required=False)
@click.option("--to", type=click.IntRange(0), metavar="N", help="Only show the task as it stood at version N.")
@click.option("--at", metavar="TIME", help="Only show it as it stood then: 2026-11-23T10:00:00, 10:00:00 or 2h.")
@click.option("--step", is_flag=True, help="Walk through it event by event.")
@click.option("--break", "breaks", multiple=True, metavar="PLACE", help="Stop at an effect, or at file.py:LINE.")
@click.option("--pdb", is_flag=True, help="Stop where the code differs from the record, or raises.")
@click.option("--app", metavar="FILE[:PROGRAM]", help="Where the program is, when it is not where it was.")
@click.option("--set", "pairs", multiple=True, metavar="K=V", help="Run on another value.")
@click.option("--all", "program", metavar="PROGRAM", help="Every task of a program.", shell_complete=program_names)
@click.option("--since", metavar="TIME", help="With --all: only tasks that came then or later.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="With --all: the newest so many.")
@log_option
@common
def replay(
    options: Options, task: str | None, to: int | None, at: str | None, step: bool, breaks: tuple[str, ...], pdb: bool,
    app: str | None, pairs: tuple[str, ...], program: str | None, since: str | None, limit: int | None, log: str | None,
) -> int:  # fmt: skip
    """Run today's code on the recorded input and effects of a task, and compare.

    No effect is performed. It says that all is the same, or names the first difference: what was expected, what was
    found, the place, and where in the code. A task that has not ended is run up to where its record stops. Nothing is
    written to the log.

    Exit code 1 when something differs.
    """
    if (task is None) == (program is None):
        raise click.UsageError("a task or --all PROGRAM is due, and not both")
    values = settings_of(pairs)
    if program is not None:
        if to is not None or at or step or breaks or pdb:
            raise click.UsageError("--to, --at, --step, --break and --pdb are for one task, not for --all")
        from dspex.console.regress import regress

        return regress(options, program, log, app, values, since and time_of(since), limit)
    if since or limit:
        raise click.UsageError("--since and --limit are for --all")
    if to is not None and at:
        raise click.UsageError("--to and --at were given; one of them is due")
    assert task is not None, "one of them was given"
    story = options.run(_read(options, log, task))
    if step:
        from dspex.console.stepping import step as walk

        walk(_cut(story, to, at), as_json=options.json)
        return 0
    if to is not None or at:
        _show_state(options, story, _cut(story, to, at))
        return 0
    found = code_of(options, story.program, story.app, app, f"dspex replay {task}")
    if (breaks or pdb) and not story.missing:
        return _debug(options, story, found, values, breaks, pdb=pdb)
    report = judge(story, found, values).report
    if options.json:
        print_json(_json(story, report))
    else:
        _show_events(story, story)
        show_state(story.state, story)
        click.echo()
        _show_verdict(report, story.state)
    return 1 if report.same is False else 0


async def _read(options: Options, log: str | None, task: str) -> Story:
    from dspex.compose.story import story_of

    if not (task.isascii() and task.isdecimal()):
        raise click.UsageError(f"{clean(task)[:40]} is no task's id, which is a number; `dspex tasks` lists them")
    async with opened(options, log) as source:
        return await story_of(source, task)


def judge(
    story: Story, program: type[Program] | str, values: dict[str, Any] | None = None, *, stops: Stops | None = None,
    strict: bool = False,
) -> Rerun:  # fmt: skip
    """Run the program on the records and compare. `program` may be the reason why there is none."""
    from dspex.compose.story import instance_of
    from dspex.core.replay import Report, Rerun, rerun

    if story.missing or isinstance(program, str):
        return Rerun(Report(story.task, None, 0, 0, why=story.missing or str(program)))
    instance = instance_of(program, story, values)
    if instance is None:
        ran = story.state.assignment[:8]
        why = f"it ran on values {ran}, which are not those of the code at hand; --set gives others"
        return Rerun(Report(story.task, None, 0, 0, why=why))
    # What the program prints is no part of what we print, unless a person debugs it.
    with contextlib.nullcontext() if stops or strict else contextlib.redirect_stdout(sys.stderr):
        return asyncio.run(rerun(instance, story.events, story.task, watch=stops, strict=strict))


def _cut(story: Story, to: int | None, at: str | None) -> Story:
    """The story up to a version or a time."""
    from dataclasses import replace

    if to is not None and to > story.versions:
        raise click.UsageError(f"task {story.task} has versions 0 to {story.versions}, there is no {to}")
    events = story.before(time_of(at)) if at else story.at(story.versions if to is None else to)
    return replace(story, events=events)


def _debug(
    options: Options, story: Story, program: type[Program] | str, values: dict[str, Any], breaks: tuple[str, ...], *,
    pdb: bool,
) -> int:  # fmt: skip
    """Run it with stops, then, with --pdb, stop where it parts from the record or raises."""
    from dspex.console.stops import Quit, Stops, post_mortem

    if options.json:
        raise click.UsageError("--json, and --break or --pdb: a person and a program cannot both read the output")
    stops = Stops(breaks)
    try:
        report = judge(story, program, values, stops=stops if breaks else None, strict=bool(breaks)).report
        if breaks and not stops.hits:
            click.echo(f"dspex: the run did not come to {', '.join(map(clean, breaks))}", err=True)
        if report.same is None and not report.effects:
            click.echo(f"{bold('not run again')}: {report.why}")
            return 0
        _show_verdict(report, story.state)
        if pdb:
            # Once more, stopping at the first difference instead of going on to see what it is.
            error = judge(story, program, values, strict=True).error
            if error is None or not post_mortem(error):
                click.echo("nothing was raised, so there is no line to stop in; --break PLACE stops before the end")
    except (Quit, KeyboardInterrupt):
        click.echo("quit")
        return 0
    return 1 if report.same is False else 0


def _json(story: Story, report: Report) -> dict[str, Any]:
    import msgspec

    return {
        "task": story.task, "same": report.same, "effects": report.effects, "performed": report.performed,
        "difference": msgspec.to_builtins(report.difference), "why": report.why or None, "stopped": report.stopped,
        "program": story.program, "version": story.versions, "state": state_of(story.state),
    }  # fmt: skip


def _show_state(options: Options, story: Story, cut: Story) -> None:
    if options.json:
        kept = {event.version for event in cut.events}
        shown = [it for it in story.shown if it["aggregate"] == story.events[0].aggregate and it["version"] in kept]
        why = "only the state is shown"
        about = {"task": story.task, "same": None, "effects": 0, "performed": 0, "difference": None, "why": why}
        print_json(
            {**about, "program": story.program, "version": cut.versions, "state": state_of(cut.state), "events": shown}
        )
        return
    _show_events(story, cut)
    show_state(cut.state, story)


def _show_events(story: Story, cut: Story) -> None:
    lines = EventLines(versions=True)
    kept = {(event.aggregate, event.version) for event in cut.events}
    following = next((it.position for it in story.events if (it.aggregate, it.version) not in kept), None)
    for shown in story.shown:
        if shown["aggregate"].startswith("task."):
            later = (shown["aggregate"], shown["version"]) not in kept
        else:  # a signal, a score
            later = following is not None and shown["position"] > following
        if later and not has_styles():
            continue  # nothing would tell it from what had happened then
        lines.show(shown, faded=later)
    click.echo()


def show_state(state: TaskState, story: Story) -> None:
    """A task's state, field by field."""
    about = state_of(state)
    tries = f"{state.attempts} attempt{'' if state.attempts == 1 else 's'}"
    fields = [
        ("task", f"{story.task} of {story.program}"),
        ("version", f"{state.head.version} of {story.versions}"),
        ("state", f"{state.status}, {tries}"),
    ]
    if state.forked:
        fields.append(("fork of", f"task {state.forked.parent}, up to its event {state.forked.at}"))
    if about["input"] is not None:
        fields.append(("input", compact(about["input"])))
    if state.output is not None:
        fields.append(("output", compact(about["output"])))
    if state.error:
        fields.append(("error", f"{state.code} {state.error}: {state.message}"))
    if state.ended:
        fields.append(("took", duration(state.seconds)))
    print_fields(fields)


def _show_verdict(report: Report, state: TaskState) -> None:
    asked = f"{report.effects} effect{'' if report.effects == 1 else 's'} looked up, 0 performed"
    if report.same is None:
        click.echo(f"{bold('not run again')}: {report.why}")
    elif report.difference:
        click.echo(f"{yellow('different')}: {asked}")
        show_difference(report.difference)
    elif report.stopped:
        click.echo(f"{green('same')} so far: {report.why}; {asked}")
    else:
        what = "output" if state.output is not None else "failure"
        click.echo(f"{green('same')}: run again on the record, the {what} is the same; {asked}")


WORDS = {
    "added": "the code asks for an effect that was not recorded",
    "removed": "the code does not ask for an effect that was recorded",
    "arguments": "the code asks for the effect with other arguments",
    "reordered": "the code asks for effects in another order",
    "output": "the output is another one",
    "error": "the error is another one",
}


def show_difference(difference: Difference) -> None:
    """The first difference, in words."""
    fields = [("  kind", f"{difference.kind}: {WORDS[difference.kind]}"), ("  place", difference.place)]
    fields.append(("  recorded", _value(difference.expected)))
    fields.append(("  today", _value(difference.found)))
    if difference.where:
        fields.append(("  where", difference.where))
    print_fields(fields)


def _value(value: Any) -> str:
    return "nothing" if value is None else compact(value)
