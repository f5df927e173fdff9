"""Forks from Python, in a script or a notebook: what `dspex fork` does.

A fork is an ordinary submission with the parent's input and a header that names the parent and one of its events. The
agent that takes it copies what it shares; nothing is ever written to the parent.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from dspex.bus.client import Client
from dspex.compose.caller import Caller
from dspex.compose.replays import opened, wait_for
from dspex.compose.settings import load_settings
from dspex.compose.story import BusSource, Source, Story, instance_of, story_of
from dspex.core import headers as h
from dspex.core.dry import DryReport, dry_run
from dspex.core.errors import ConfigurationError, InvalidInput, task_error
from dspex.core.fork import separated, with_input
from dspex.core.program import Program
from dspex.core.subjects import Subjects
from dspex.core.task import TaskState

if TYPE_CHECKING:
    from dspex.agents.registered import Registered

__all__ = ["Fork", "Forking", "afork", "fork", "planned", "rehearsed", "submitted", "worked_on"]


class Fork(Struct, frozen=True):
    """A task that shares the first `at` events of its `parent`. `assignment` is the hash of the values it runs on,
    `code` the version of the code when it is not that of the agents, `output` what came of it when that was waited for.
    """

    task: str
    parent: str
    at: int
    program: str
    assignment: str = ""
    code: str = ""
    output: Any = None


@dataclass(frozen=True)
class Forking:
    """What a fork is to be: of whom, from which event on, with which input, and which values on top of the parent's."""

    story: Story
    at: int
    body: bytes
    values: dict[str, Any]


@overload
def fork(
    task: str | int, *, at: int | None = None, values: dict[str, Any] | None = None,
    program: type[Program] | None = None, url: str | None = None, wait: float | None = None,
    dry: Literal[False] = False,
) -> Fork: ...  # fmt: skip
@overload
def fork(
    task: str | int, *, at: int | None = None, values: dict[str, Any] | None = None,
    program: type[Program], url: str | None = None, log: str | Path | None = None, dry: Literal[True],
) -> DryReport: ...  # fmt: skip
def fork(task: str | int, **how: Any) -> Fork | DryReport:
    """Begin a new task that shares the first `at` events of another one (all of them, unless told), and goes on live.

    `values` sets variables by path, and fields of the input as `"input.<field>"`. `program` is a class to run in this
    process in place of the agents' code; it then runs to its end. `wait` is how many seconds to wait for the output.
    With `dry` the program is run here, up to the first effect that would go outside; that needs no system when `log` is
    a file. Raises NotFound, InvalidInput, InvalidAssignment, ConnectionFailed, LogError, and TaskError as the fork
    ended, when that was waited for.
    """
    made: Fork | DryReport = wait_for(afork(task, **how))
    return made


@overload
async def afork(
    task: str | int, *, at: int | None = None, values: dict[str, Any] | None = None,
    program: type[Program] | None = None, url: str | None = None, wait: float | None = None,
    dry: Literal[False] = False,
) -> Fork: ...  # fmt: skip
@overload
async def afork(
    task: str | int, *, at: int | None = None, values: dict[str, Any] | None = None,
    program: type[Program], url: str | None = None, log: str | Path | None = None, dry: Literal[True],
) -> DryReport: ...  # fmt: skip
async def afork(
    task: str | int, *, at: int | None = None, values: dict[str, Any] | None = None,
    program: type[Program] | None = None, url: str | None = None, log: str | Path | None = None,
    wait: float | None = None, dry: bool = False,
) -> Fork | DryReport:  # fmt: skip
    """Like `fork`, to be awaited."""
    if dry and program is None:
        raise InvalidInput("a dry run runs the program here: give its class, program=…")
    if log is not None and not dry:
        raise InvalidInput("a fork goes on live, and nothing runs in a file; dry=True runs it up to the first effect")
    async with opened(log, url) as source:
        forking = await planned(source, str(task), at, values or {}, program)
        if dry and program is not None:
            return await rehearsed(forking, program)
        assert isinstance(source, BusSource)
        made = await submitted(source.caller, forking, program)
        if program is not None:
            state = await worked_on(source.caller, made, program, master=load_settings({}).privacy.key)
            return replace(made, output=output_of(state, made.task))
        if wait is not None:
            body = await source.caller.result(made.program, made.task, timeout=wait)
            return replace(made, output=msgspec.json.decode(body))
        return made


async def planned(
    source: Source, task: str, at: int | None, values: dict[str, Any], program: type[Program] | None = None
) -> Forking:
    """What a fork of a task would be. Raises NotFound, and InvalidInput for what cannot be forked so."""
    story = await story_of(source, task)
    if program is not None and program.name != story.program:
        raise InvalidInput(f"task {task} is one of {story.program}, and {program.__name__} is {program.name}")
    if story.missing:
        raise InvalidInput(story.missing)
    at = story.versions if at is None else at
    story.at(at)  # refuses a version that is not there
    given = story.state.input
    if given is None or bytes(given)[:1] != b"{":
        raise InvalidInput(f"the input of task {task} is not at hand, so it cannot be forked")
    fields = program.Input.model_fields if program else await _fields(source, story.program)
    inputs, variables = separated(values, fields)
    return Forking(story, at, with_input(bytes(given), inputs), variables)


async def _fields(source: Source, program: str) -> list[str]:
    """The fields of a program's input, as it was last registered."""
    fields: list[str] = []
    async for event in source.events(aggregate=f"program.{program}.0"):
        if event["type"] == "ProgramRegistered":
            fields = list(event["data"]["input_schema"].get("properties", {}))
    return fields


async def rehearsed(forking: Forking, program: type[Program]) -> DryReport:
    """Run a fork dry. Raises InvalidInput, InvalidAssignment."""
    story = forking.story
    return await dry_run(_instance(forking, program), story.events, story.task, forking.at, forking.body)


async def submitted(caller: Caller, forking: Forking, program: type[Program] | None = None) -> Fork:
    """Submit a fork, to be run by the agents, or by whoever has the code of `program`. Raises InvalidInput,
    NotFound."""
    story = forking.story
    headers = {h.FORK: f"{story.task}@{forking.at}", h.PARENT: story.task, h.CAUSATION: story.task}
    made = Fork("", story.task, forking.at, story.program)
    if program is not None:
        from dspex.agents.code import code_of

        instance = _instance(forking, program)
        instance.decode(forking.body)
        # Code without a file has no version of its own; a made-up one keeps the agents from taking the task.
        made = replace(made, assignment=instance.assignment.hash, code=code_of(program) or secrets.token_hex(6))
        headers[h.CODE] = made.code
        await _record(caller, instance, f"for a fork of task {story.task}")
    elif forking.values or story.state.assignment:
        why = f"for a fork of task {story.task}"
        answer = await caller.propose(story.program, forking.values, base=story.state.assignment or None, why=why)
        made = replace(made, assignment=answer["assignment"])
    if made.assignment:
        headers[h.ASSIGNMENT] = made.assignment
    return replace(made, task=await caller.submit(story.program, forking.body, headers=headers, checked=not made.code))


async def worked_on(
    caller: Caller, made: Fork, program: type[Program], *, again: bool = False, master: str = ""
) -> TaskState:
    """Run a fork in this process, with the code of `program`, until it has ended. `again`: another process has begun it
    and died; `master` refers to the master key of private values."""
    from dspex.agents.solo import work_alone
    from dspex.agents.vault import master_from

    async with _as_agent(caller, program) as (client, subjects):
        place = await _place(caller)
        instance = program()
        if made.assignment and instance.assignment.hash != made.assignment:
            from dspex.agents.assignments import Assignments

            known = Assignments(instance, place.log(client, subjects, program.name), subjects, "/fork")
            instance = program(assignment=await known.find(made.assignment))
        return await work_alone(
            made.task, instance, code=made.code, client=client, place=place, subjects=subjects, again=again,
            master=master_from(master),
        )  # fmt: skip


def output_of(state: TaskState, task: str) -> Any:
    """What came of a task that has ended. Raises TaskError as it did."""
    if state.output is None:
        raise task_error(state.code, state.message or f"task {task} is {state.status}", type=state.error, task=task)
    return msgspec.json.decode(state.output)


async def _place(caller: Caller) -> Registered:
    """Where the log is. It gives this process no tasks, so it needs no consumer."""
    from dspex.agents.registered import Registered

    said = await caller.log_head()
    return Registered(epoch=said["epoch"], stream="", consumer="", served=said["log"] != "jetstream")


@asynccontextmanager
async def _as_agent(caller: Caller, program: type[Program]) -> AsyncIterator[tuple[Client, Subjects]]:
    """Who writes the events of a program: on a system with access rules an agent of it, whose seed is beside the
    console's. Raises ConfigurationError."""
    from dspex.bus.identity import subjects_of

    client, subjects = caller.client, caller.subjects
    if not client.identity.secured:
        yield client, subjects
        return
    context = Path(client.credentials or "").with_name(f"agent-{program.name}.json")
    if not context.is_file():
        raise ConfigurationError(f"{program.name} runs here only as one of its agents, and {context} is not there")
    async with await Client.connect(client.url, name="dspex fork", credentials=str(context)) as own:
        yield own, subjects_of(subjects.prefix, str(context))


async def _record(caller: Caller, instance: Program, why: str) -> None:
    """Have the values of an instance in the log; agents with other code could not judge them."""
    from dspex.agents.assignments import Assignments

    async with _as_agent(caller, type(instance)) as (client, subjects):
        log = (await _place(caller)).log(client, subjects, instance.name)
        known = Assignments(instance, log, subjects, "/fork")
        await known.record(instance.assignment, who="dspex fork", why=why)


def _instance(forking: Forking, program: type[Program]) -> Program:
    found = instance_of(program, forking.story, forking.values)
    if found is None:
        ran = forking.story.state.assignment[:8]
        task = forking.story.task
        raise InvalidInput(f"task {task} ran on values {ran}, which the code at hand does not have; set those it needs")
    return found
