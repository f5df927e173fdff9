"""`dspex replay`: a task from the log, at any version, and today's code run on what came in then."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dspex.console.history import history, state_of
from dspex.console.options import Options, common
from dspex.console.render import EventLines, bold, clean, compact, duration, green, print_fields, print_json, yellow

if TYPE_CHECKING:
    from dspex.compose.caller import Caller
    from dspex.core.events import Event
    from dspex.core.program import Program
    from dspex.core.task import TaskState

__all__ = ["Recorded", "Verdict", "first_difference", "judge", "recorded", "replay"]

NOT_AGAIN = {"DeadlineExceeded": "it ended by its deadline, and time is not replayed"}


@dataclass(frozen=True)
class Recorded:
    """What the log has of a task: `versions` of its aggregate, and in `known` values by the hash of an assignment."""

    task: str
    program: str
    shown: list[dict[str, Any]]
    events: list[Event]
    state: TaskState
    versions: int
    app: str
    known: dict[str, dict[str, Any]]

    @property
    def whole(self) -> bool:
        """Whether the state is that after the last event."""
        return self.state.head.version == self.versions


@dataclass(frozen=True)
class Verdict:
    """What became of running it again: `same` is None when it was not run, and `why` says why."""

    same: bool | None
    difference: dict[str, Any] | None = None
    why: str = ""


@click.command(short_help="Rebuild a task from the log and run it again.")
@click.argument("task")
@click.option("--to", type=click.IntRange(0), metavar="N", help="Show the task as it stood at version N.")
@click.option("--app", metavar="FILE[:PROGRAM]", help="Where the program is, when it is not where it was.")
@common
def replay(options: Options, task: str, to: int | None, app: str | None) -> int:
    """Rebuild a task from the log, run today's code on its input, and compare.

    Shows the task's events and its state, at the end or at version N. Then runs the program again, on the
    values it ran on, and says whether the output is the same, byte for byte, or names the first place that
    differs. Nothing is written.

    Exit code 1 when the output differs.
    """

    async def work() -> Recorded:
        async with options.connect() as caller:
            return await recorded(caller, task, to)

    past = options.run(work())
    verdict = judge(past, _find(past, app, options))
    if options.json:
        print_json(
            {
                "task": past.task, "same": verdict.same, "effects": 0, "performed": 0, "difference": verdict.difference,
                "why": verdict.why or None, "program": past.program, "version": past.state.head.version,
                "state": state_of(past.state),
            }
        )  # fmt: skip
    else:
        _show(past, verdict)
    return 1 if verdict.same is False else 0


async def recorded(caller: Caller, task: str, to: int | None = None) -> Recorded:
    """Read a task from the log. Raises NotFound, and UsageError for a version that it does not have."""
    from dspex.core.errors import NotFound, TaskError
    from dspex.core.task import fold

    if not (task.isascii() and task.isdecimal()):
        raise click.UsageError(f"{clean(task)} is no task's id, which is a number; `dspex tasks` lists them")
    shown = [event async for event in caller.events(task=task)]
    every = history(shown, task)
    if not every:
        raise NotFound(f"the log has no task {task}")
    versions = every[-1].version
    if to is not None and to > versions:
        raise click.UsageError(f"task {task} has versions 0 to {versions}, there is no {to}")
    program = str(shown[0]["data"]["program"])
    app, known = "", {}
    async for event in caller.events(aggregate=f"program.{program}.0"):
        app = event["data"].get("app", app)
    with contextlib.suppress(TaskError):  # no agent serves it now: then the default values have to do
        now = await caller.variables(program)
        paths = now["space"]["variables"]
        known[now["assignment"]] = {path: value for path, value in now["values"].items() if path in paths}
    events = history(shown, task, to)
    return Recorded(task, program, shown, events, fold(events), versions, app, known)


def judge(past: Recorded, program: type[Program] | str) -> Verdict:
    """Run the program on the recorded input and compare. `program` may be the reason why there is none."""
    from dspex.core.space import canonical

    state = past.state
    if not past.whole:
        return Verdict(
            None, why=f"version {state.head.version} of {past.versions}: it had not ended; only the state is shown"
        )
    if state.status not in ("completed", "failed"):
        return Verdict(
            None, why=f"the task is {state.status}" + (f": task {state.of} has its output" if state.of else "")
        )
    if state.error in NOT_AGAIN:
        return Verdict(None, why=NOT_AGAIN[state.error])
    if isinstance(program, str):
        return Verdict(None, why=program)
    instance = _instance(past, program)
    if instance is None:
        return Verdict(None, why=f"it ran on values {state.assignment[:8]}, which are not those of the code at hand")
    was = {"output": json.loads(bytes(state.output))} if state.output is not None else {"error": state.error}
    now = _run(instance, bytes(state.input or b"null"))
    if canonical(was) == canonical(now):
        return Verdict(True)
    return Verdict(False, first_difference(was, now))


def _instance(past: Recorded, program: type[Program]) -> Program | None:
    """The program on the recorded assignment, or None when nobody knows its values."""
    from dspex.core.errors import InvalidAssignment
    from dspex.core.space import Assignment

    wanted = past.state.assignment
    if program.space().default().hash == wanted:
        return program()
    values = past.known.get(wanted)
    if values is None:
        return None
    try:
        found = program(assignment=Assignment.from_json(values))
    except InvalidAssignment:
        return None
    return found if found.assignment.hash == wanted else None


def _run(program: Program, body: bytes) -> dict[str, Any]:
    """What running it gives: `{"output"}`, or `{"error"}` with the error's kind."""
    from dspex.core.errors import TaskError

    # What the program prints is no part of what we print.
    with contextlib.redirect_stdout(sys.stderr):
        try:
            return {"output": json.loads(program(program.decode(body)).encode())}
        except TaskError as error:
            return {"error": error.type}
        except (Exception, SystemExit) as error:
            return {"error": type(error).__name__}


def first_difference(expected: Any, found: Any, path: str = "") -> dict[str, Any] | None:
    """The first place where two JSON values differ, in the order of their names: `{"path", "expected", "found"}`."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in sorted(expected.keys() | found.keys()):
            where = f"{path}.{name}" if path else name
            if name not in expected or name not in found:
                return {"path": where, "expected": expected.get(name), "found": found.get(name)}
            if difference := first_difference(expected[name], found[name], where):
                return difference
        return None
    if isinstance(expected, list) and isinstance(found, list):
        for number, (one, other) in enumerate(zip(expected, found, strict=False)):
            if difference := first_difference(one, other, f"{path}[{number}]"):
                return difference
        if len(expected) != len(found):
            return {"path": f"{path} length", "expected": len(expected), "found": len(found)}
        return None
    if type(expected) is type(found) and expected == found:
        return None
    return {"path": path, "expected": expected, "found": found}


def _find(past: Recorded, app: str | None, options: Options) -> type[Program] | str:
    """The program's class: from --app, from the settings, from where it was when it was registered; or why not."""
    from dspex.compose.app import load_app, split_app
    from dspex.core.errors import ConfigurationError

    name = past.program
    configured = options.settings().programs.get(name)
    place = app or (configured.app if configured else past.app)
    hint = f"say where it is: dspex replay {past.task} --app FILE.py"
    if not app and (not place or not split_app(place)[0].is_file()):
        return f"the code of {name} is not {f'at {place}' if place else 'known'}; {hint}"
    if not Path(place).suffix and not split_app(place)[0].is_file():
        raise ConfigurationError(f"there is no file {place}")
    with contextlib.redirect_stdout(sys.stderr):
        found = {program.name: program for program in load_app(place)}
    if name not in found:
        if app:
            raise ConfigurationError(f"{place} has no program {name}; it has {', '.join(found)}")
        return f"{place} has no program {name} now; {hint}"
    return found[name]


def _show(past: Recorded, verdict: Verdict) -> None:
    state = past.state
    lines = EventLines()
    mine = {(event.aggregate, event.version) for event in past.events}
    for shown in past.shown:
        later = shown["aggregate"].startswith("task.") and (shown["aggregate"], shown["version"]) not in mine
        lines.show(shown, faded=later)
    click.echo()
    fields = [("task", f"{past.task} of {past.program}"), ("version", f"{state.head.version} of {past.versions}")]
    fields += [("state", f"{state.status}, {state.attempts} attempt{'' if state.attempts == 1 else 's'}")]
    about = state_of(state)
    if about["input"] is not None:
        fields.append(("input", compact(about["input"])))
    if state.output is not None:
        fields.append(("output", compact(about["output"])))
    if state.error:
        fields.append(("error", f"{state.code} {state.error}: {state.message}"))
    if state.ended:
        fields.append(("took", duration(state.seconds)))
    print_fields(fields)
    click.echo()
    if verdict.same is None:
        click.echo(f"{bold('not run again')}: {verdict.why}")
    elif verdict.same:
        click.echo(f"{green('same')}: run again on the recorded input, the {_what(state)} is the same")
    else:
        difference = verdict.difference or {}
        click.echo(f"{yellow('different')} at {difference['path']}")
        click.echo(f"  recorded  {compact(difference['expected'])}")
        click.echo(f"  today     {compact(difference['found'])}")


def _what(state: TaskState) -> str:
    return "output" if state.output is not None else "failure"
