"""`dspex cancel`: end a task that nobody wants any more."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import click

from dspex.console.bodies import is_id
from dspex.console.options import Options, common
from dspex.console.programs import program_names
from dspex.console.render import is_terminal, print_json

if TYPE_CHECKING:
    from dspex.compose.caller import Caller
    from dspex.core.task import TaskState

__all__ = ["cancel"]

WAIT = 5.0
"""Seconds to wait for an agent that takes the cancellation."""


@click.command(short_help="End a task that nobody wants any more.")
@click.argument("task")
@click.option("--reason", default="", metavar="TEXT", help="Why, for the log and for who waits for the task.")
@click.option("--program", metavar="PROGRAM", help="Needed when TASK is a key.", shell_complete=program_names)
@common
def cancel(options: Options, task: str, reason: str, program: str | None) -> None:
    """End a task that nobody wants any more.

    A task that waits or sleeps ends at once; one that runs is stopped where it stands, and so is what it has called.
    What it did before is in the log and stays. A task that has ended is left as it is (exit 1).
    """
    if not is_id(task) and not program:
        raise click.UsageError(f"{task} is no task's id; for a key add --program PROGRAM")

    async def work() -> tuple[str, TaskState]:
        from dspex.core.errors import TaskError, task_error

        async with options.connect() as caller:
            id = task if is_id(task) else await _id_of(caller, str(program), task)
            name, state = await _look(caller, id)
            if state.ended:
                raise task_error(409, f"task {id} has ended already: it is {state.status}", type="TaskEnded", task=id)
            await caller.signal(name, id, "cancel", reason or None)
            with suppress(TaskError):  # whatever it ended in: the log says it in one word
                await caller.find(name, id, timeout=WAIT)
            _, state = await _look(caller, id)
            if state.ended and state.status != "cancelled":
                raise task_error(409, f"task {id} ended before that: it is {state.status}", type="TaskEnded", task=id)
            return id, state

    id, state = options.run(work())
    if options.json:
        print_json({"task": id, "state": state.status})
    elif not state.ended:
        click.echo(f"stored; task {id} is {state.status}, and the next agent of its program ends it")
    elif is_terminal():
        click.echo(f"task {id} is cancelled")


async def _id_of(caller: Caller, program: str, key: str) -> str:
    from dspex.console.programs import known
    from dspex.core.errors import TaskError

    try:
        return (await known(caller, program, caller.find(program, key, timeout=0.0)))[1]
    except TaskError as error:
        if error.task is None:
            raise
        return error.task


async def _look(caller: Caller, task: str) -> tuple[str, TaskState]:
    """The program of a task, and where it stands."""
    from dspex.compose.story import BusSource, story_of

    story = await story_of(BusSource(caller), task)
    return story.program, story.state
