"""`dspex fork`: a new task that shares the first events of another one, and goes on with other values or other code."""

from __future__ import annotations

import contextlib
import math
import sys
from typing import TYPE_CHECKING, Any

import click

from dspex.console.options import Options, common
from dspex.console.render import bold, compact, dim, green, print_fields, print_json, yellow
from dspex.console.sources import code_of, log_option, opened, settings_of

if TYPE_CHECKING:
    from dspex.compose.caller import Caller
    from dspex.compose.forks import Fork
    from dspex.core.dry import DryReport
    from dspex.core.program import Program

__all__ = ["fork"]


@click.command(short_help="Go on from any event of a task, otherwise.")
@click.argument("task")
@click.option("--at", type=click.IntRange(0), metavar="N", help="Share events up to version N (default: all).")
@click.option("--set", "pairs", multiple=True, metavar="K=V", help="Another value: VARIABLE=V or input.FIELD=V.")
@click.option("--code", metavar="FILE[:PROGRAM]", help="Run it here, with this code.")
@click.option("--dry", is_flag=True, help="Perform nothing: stop where it would first go outside.")
@click.option("--wait", is_flag=True, help="Wait for the output.")
@click.option("--resume", is_flag=True, help="With --code: TASK is a fork whose process died; finish it.")
@log_option
@common
def fork(
    options: Options, task: str, at: int | None, pairs: tuple[str, ...], code: str | None, dry: bool, wait: bool,
    resume: bool, log: str | None,
) -> int:  # fmt: skip
    """Begin a new task that shares the first N events of TASK, and goes on live: by the agents, or with --code here.

    Effects among the shared events are not performed again, also when they would be asked for otherwise now; what comes
    after them is. TASK itself is left as it is, whatever its state. `dspex events TASK` shows the versions.

    With --dry the program is run here on the shared events, up to the first effect that would go outside; with --log on
    a file, without a system.
    """
    values = settings_of(pairs)
    if resume and (not code or dry or log or at is not None or pairs):
        raise click.UsageError("--resume needs --code, and goes with none of --at, --set, --dry and --log")
    if log and not dry:
        raise click.UsageError("--log was given without --dry; a fork goes on live, and nothing runs in a file")
    if dry:
        return _dry(options, task, at, values, code, log)
    if resume:
        assert code
        return options.run(_resume(options, task, code))
    return options.run(_live(options, task, at, values, code, wait=wait))


# -- live


async def _live(
    options: Options, task: str, at: int | None, values: dict[str, Any], code: str | None, *, wait: bool
) -> int:
    from dspex.compose.forks import planned, submitted
    from dspex.compose.story import BusSource

    async with options.connect() as caller:
        source = BusSource(caller, options.settings().privacy.key)
        program = _given(options, code, await _program_of(caller, task)) if code else None
        forking = await planned(source, task, at, values, program)
        made = await submitted(caller, forking, program)
        if not options.json:
            _show(made, forking.story.versions)
        if program is not None:
            return await _here(options, caller, made, program)
        if not wait:
            if options.json:
                print_json(_json(made))
            return 0
        return _ended(options, made, await caller.result(made.program, made.task, timeout=math.inf))


async def _resume(options: Options, task: str, code: str) -> int:
    """Finish a fork whose process died."""
    from dspex.agents.code import code_of as version_of
    from dspex.compose.forks import Fork
    from dspex.compose.story import BusSource, story_of
    from dspex.core import headers as h
    from dspex.core.errors import InvalidInput
    from dspex.core.events import TaskSubmitted

    async with options.connect() as caller:
        story = await story_of(BusSource(caller), task)
        submission = story.events[0].data
        headers = submission.headers if isinstance(submission, TaskSubmitted) else {}
        asked = h.fork_of(headers)
        if asked is None or h.CODE not in headers:
            raise InvalidInput(f"task {task} is no fork with code of its own; without --resume it is forked")
        program = _given(options, code, story.program)
        if version_of(program) != headers[h.CODE]:
            raise InvalidInput(f"task {task} needs code {headers[h.CODE]}, and {code} is code {version_of(program)}")
        made = Fork(task, *asked, story.program, headers.get(h.ASSIGNMENT, ""), headers[h.CODE])
        return await _here(options, caller, made, program, again=True)


async def _here(options: Options, caller: Caller, made: Fork, program: type[Program], *, again: bool = False) -> int:
    """Run the fork in this process."""
    from dspex.compose.forks import output_of, worked_on

    hint = f"dspex fork {made.task} --resume --code FILE"
    click.echo(dim(f"task {made.task} runs here, on code {made.code}; if this process dies: {hint}"), err=True)
    with contextlib.redirect_stdout(sys.stderr):  # what the program prints is no part of what we print
        state = await worked_on(caller, made, program, again=again, master=options.settings().privacy.key)
    output_of(state, made.task)
    assert state.output is not None
    return _ended(options, made, bytes(state.output))


async def _program_of(caller: Caller, task: str) -> str:
    from dspex.compose.story import BusSource, story_of

    return (await story_of(BusSource(caller), task)).program


def _given(options: Options, code: str, program: str) -> type[Program]:
    """The class that --code names."""
    found = code_of(options, program, "", code, "dspex fork")
    assert not isinstance(found, str), "a file that was named has the program, or it was refused"
    return found


def _ended(options: Options, made: Fork, output: bytes) -> int:
    import json

    value = json.loads(output)
    if options.json:
        print_json({**_json(made), "output": value})
    elif isinstance(value, dict):
        print_fields((name, compact(field)) for name, field in value.items())
    else:
        click.echo(compact(value))
    return 0


def _json(made: Fork) -> dict[str, Any]:
    return {
        "task": made.task, "parent": made.parent, "at": made.at, "program": made.program,
        "assignment": made.assignment or None, "code": made.code or None,
    }  # fmt: skip


def _show(made: Fork, versions: int) -> None:
    shared = f"events 1 to {made.at} (of {versions})" if made.at else "nothing but the input"
    click.echo(f"task {bold(made.task)} shares {shared} of task {made.parent}")
    if made.at == versions:
        click.echo(dim("all that was recorded is shared and not performed again; --at N goes on live behind event N"))
    click.echo(dim(f"compare them: dspex diff {made.parent} {made.task}"))


# -- dry


def _dry(
    options: Options, task: str, at: int | None, values: dict[str, Any], code: str | None, log: str | None
) -> int:
    from dspex.compose.forks import planned, rehearsed
    from dspex.core.errors import ConfigurationError

    async def work() -> DryReport:
        async with opened(options, log) as source:
            plan = await planned(source, task, at, values)
        program = code_of(options, plan.story.program, plan.story.app, code, f"dspex fork {task} --dry")
        if isinstance(program, str):
            raise ConfigurationError(program.replace("--app FILE.py", "--code FILE.py"))
        with contextlib.redirect_stdout(sys.stderr):
            return await rehearsed(plan, program)

    report = options.run(work())
    if options.json:
        import msgspec

        print_json(msgspec.to_builtins(report))
    else:
        _show_dry(report)
    return 0


def _show_dry(report: DryReport) -> None:
    shared = f"{report.used} of {report.shared} shared record{'' if report.shared == 1 else 's'} asked for, 0 performed"
    if report.outside:
        click.echo(f"{yellow('would go outside')}: {shared}")
        fields = [("  place", report.outside.place), ("  asks", report.outside.request)]
        print_fields([*fields, *([("  where", report.outside.where)] if report.outside.where else [])])
    elif report.error:
        click.echo(f"{yellow('fails')} without going outside: {shared}")
        print_fields([("  error", report.error)])
    else:
        click.echo(f"{green('ends')} without going outside: {shared}")
        print_fields([("  output", compact(report.output))])
    if report.changed:
        click.echo("asked for otherwise than was recorded, and the record counts:")
        for each in report.changed:
            print_fields([(f"  {each.place}", ""), ("    recorded", each.recorded), ("    now", each.asked)])
    if report.slept:
        click.echo(f"sleeps that were not waited for: {report.slept:g} s")
