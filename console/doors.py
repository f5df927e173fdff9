"""The doors from the shell: ask, submit, result, score, signal."""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import sys
import time
from typing import TYPE_CHECKING

import click

from dspex.console.bodies import BODY_HELP, body_of, is_id, lines_of, loosely, request_headers
from dspex.console.options import Options, common
from dspex.console.programs import check_program, known, program_names
from dspex.console.render import compact, dim, duration, is_terminal, print_fields, print_json

if TYPE_CHECKING:
    from dspex.compose.caller import Caller
    from dspex.core.errors import TaskError

__all__ = ["ask", "result", "score", "signal", "submit"]

IN_FLIGHT = 256


_program = click.argument("program", shell_complete=program_names)
_body = click.argument("body", nargs=-1)
_key = click.option("--key", metavar="KEY", help="The same program and key never run twice.")
_deadline = click.option("--deadline", metavar="WHEN", help="Seconds from now (2.5), or a time (2026-11-23T10:00:00Z).")


@click.command(epilog=BODY_HELP, short_help="Run a task and wait for its output.")
@_program
@_body
@_key
@_deadline
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), default=60.0, show_default=True, help="Seconds to wait."
)
@click.option("--retry", is_flag=True, help="While there is no room for the task, ask again until the timeout.")
@common
def ask(
    options: Options, program: str, body: tuple[str, ...], key: str | None, deadline: str | None, timeout: float,
    retry: bool,
) -> None:  # fmt: skip
    """Run a task and wait for its output.

    Prints the output; as JSON when piped: {"task": "42", "output": {...}}.
    """
    from dspex.core import headers as h

    content, headers = body_of(body), request_headers(key, deadline)
    mark = headers[h.CORRELATION] = f"ask-{secrets.token_hex(8)}"

    async def work() -> tuple[bytes, str, float]:
        async with options.connect() as caller:
            after = await _head(caller)
            started = time.perf_counter()
            retries = None if retry else 0
            asking = caller.ask(program, content, timeout=timeout, headers=headers, retries=retries)
            try:
                output, task = await known(caller, program, asking)
            except TaskError as error:
                if error.type != "NoAnswer" or after is None:
                    raise
                raise await _unanswered(caller, program, after, mark, error) from None
            return output, task, time.perf_counter() - started

    from dspex.core.errors import TaskError

    output, task, seconds = options.run(work())
    _show_output(options, output, task, f"task {task}, {duration(seconds)}")


async def _head(caller: Caller) -> int | None:
    """Where the log ends before we ask; None when nobody reads it for us now."""
    from dspex.core.errors import TaskError

    try:
        return await caller.head()
    except TaskError:
        return None


async def _unanswered(caller: Caller, program: str, after: int, mark: str, error: TaskError) -> TaskError:
    """What to say of an ask whose answer did not come in time: the task goes on, if it was stored."""
    from dspex.core.errors import TaskError, task_error

    try:
        task = await caller.asked(program, after, mark)
    except TaskError:
        return error
    if task is None:
        return task_error(error.code, f"{error.message}, and no task was stored: ask again", type=error.type)
    text = f"{error.message}; task {task} goes on, and `dspex result {task}` waits for its output"
    return task_error(error.code, text, type=error.type, task=task)


@click.command(epilog=BODY_HELP, short_help="Store tasks; they cannot be lost from then on.")
@_program
@_body
@_key
@_deadline
@click.option(
    "--file", "file", metavar="FILE", help="A task per line, as JSON; - is the input. With --key: KEY-1, KEY-2, …"
)
@common
def submit(
    options: Options, program: str, body: tuple[str, ...], key: str | None, deadline: str | None, file: str | None
) -> None:
    """Store a task and print its id. From then on it cannot be lost.

    Its output: dspex result TASK.
    """
    if file is not None and body:
        raise click.UsageError("--file and a body were given; one of them is due")
    if file is None:
        content, headers = body_of(body), request_headers(key, deadline)

        async def one() -> str:
            async with options.connect() as caller:
                return await known(caller, program, caller.submit(program, content, headers=headers))

        _show_task(options, options.run(one()))
        return
    bodies = lines_of(file)
    options.run(_submit_all(options, program, bodies, key, deadline))


async def _submit_all(
    options: Options, program: str, bodies: list[bytes], key: str | None, deadline: str | None
) -> None:
    """Store many, a few hundred on their way at a time; print the ids in the order of the lines."""
    from dspex.core.errors import DspexError

    async with options.connect() as caller:
        free = asyncio.Semaphore(IN_FLIGHT)

        async def store(number: int, content: bytes) -> str:
            async with free:
                headers = request_headers(f"{key}-{number}" if key else None, deadline)
                return await known(caller, program, caller.submit(program, content, headers=headers))

        work = [asyncio.create_task(store(number, content)) for number, content in enumerate(bodies, 1)]
        stored = 0
        hidden = not is_terminal(sys.stderr) or len(bodies) < 2
        bar = click.progressbar(work, label=f"{len(bodies):,} tasks", file=sys.stderr, hidden=hidden, width=30)
        try:
            with bar as steps:
                for step in steps:
                    task = await step
                    stored += 1
                    if hidden or not is_terminal():
                        _show_task(options, task)
        except DspexError as error:
            if stored:
                click.echo(f"dspex: the first {stored:,} of {len(bodies):,} are stored", err=True)
            raise error
        finally:
            for step in work:
                step.cancel()
            await asyncio.gather(*work, return_exceptions=True)
        if not hidden and is_terminal():
            ids = [step.result() for step in work]
            click.echo(f"tasks {ids[0]} to {ids[-1]}" if len(ids) > 1 else ids[0])


@click.command(short_help="Wait for the output of a task.")
@click.argument("program_and_task", nargs=-1, metavar="[PROGRAM] TASK|KEY")
@click.option(
    "--wait", type=click.FloatRange(0), default=60.0, show_default=True, help="Seconds to wait for it to end."
)
@common
def result(options: Options, program_and_task: tuple[str, ...], wait: float) -> None:
    """Print the output of a task, waiting for it.

    A task's id is enough; a key needs its program.
    """
    if not 1 <= len(program_and_task) <= 2:
        raise click.UsageError("a task is due, or a program and a task or key")
    *named, task = program_and_task
    if not named and not is_id(task):
        raise click.UsageError(f"{task} is no task's id; for a key give the program first: dspex result PROGRAM {task}")

    async def work() -> tuple[bytes, str]:
        async with options.connect() as caller:
            if named:
                from dspex.compose.story import BusSource

                await check_program(BusSource(caller), named[0])
            program = named[0] if named else await caller.program_of(task)
            return await caller.find(program, task, timeout=wait)

    output, found = options.run(work())
    _show_output(options, output, found, f"task {found}")


@click.command(context_settings={"ignore_unknown_options": True}, short_help="Say how good a task's output was.")
@click.argument("task")
@click.argument("score", type=float)
@click.option("--feedback", default="", metavar="TEXT", help="Why, in words.")
@click.option("--program", metavar="PROGRAM", help="Needed when TASK is a key.", shell_complete=program_names)
@common
def score(options: Options, task: str, score: float, feedback: str, program: str | None) -> None:
    """Say how good a task's output was; more than once is fine."""
    if not math.isfinite(score):
        raise click.UsageError(f"the score is {score}; a finite number is due")

    async def work() -> int:
        async with options.connect() as caller:
            name = program or await _program_of(caller, task)
            return await known(caller, name, caller.score(name, task, score, feedback))

    position = options.run(work())
    if options.json:
        print_json({"task": task, "score": score, "position": position})
    elif is_terminal():
        click.echo(f"task {task} scored {score:g}")


@click.command(context_settings={"ignore_unknown_options": True}, short_help="Tell a task something.")
@click.argument("task")
@click.argument("name")
@click.argument("value", default="null")
@click.option("--program", metavar="PROGRAM", help="Needed when TASK is a key.", shell_complete=program_names)
@common
def signal(options: Options, task: str, name: str, value: str, program: str | None) -> None:
    """Tell a task something: a name, and a value (JSON, or a plain string)."""

    async def work() -> int:
        async with options.connect() as caller:
            owner = program or await _program_of(caller, task)
            await known(caller, owner, _check_open(caller, owner, task))
            return await known(caller, owner, caller.signal(owner, task, name, loosely(value)))

    position = options.run(work())
    if options.json:
        print_json({"task": task, "name": name, "value": loosely(value), "position": position})
    elif is_terminal():
        click.echo(f"task {task} was told {name}")


async def _check_open(caller: Caller, program: str, task: str) -> None:
    """Raise what says that a task is unknown, or that it has ended and hears nothing any more."""
    from dspex.core.errors import Conflict, NotFound, TaskError

    try:
        await caller.find(program, task, timeout=0.0)
    except TaskError as error:
        if error.code in (202, 503) or error.type == "NoAnswer":
            return  # not done; or nobody is there to say, and then the signal waits in the log
        if isinstance(error, NotFound) and "has no task" in error.message:
            raise
    raise Conflict(f"task {task} has ended, and hears no signal any more; `dspex result {task}` says how", task=task)


async def _program_of(caller: Caller, task: str) -> str:
    if not is_id(task):
        raise click.UsageError(f"{task} is no task's id; for a key add --program PROGRAM")
    return await caller.program_of(task)


# -- what comes out


def _show_output(options: Options, output: bytes, task: str, footer: str) -> None:
    value = json.loads(output)
    if options.json or not is_terminal():
        print_json({"task": task, "output": value})
        return
    if isinstance(value, dict):
        print_fields((name, compact(field)) for name, field in value.items())
    else:
        click.echo(compact(value))
    if footer:
        click.echo(dim(footer))


def _show_task(options: Options, task: str) -> None:
    if options.json:
        print_json({"task": task})
    else:
        click.echo(task)
