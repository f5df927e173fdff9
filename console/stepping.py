"""`dspex replay --step`: a task event by event, with its state, what went in and came out, and what it took."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from dspex.console.history import state_of
from dspex.console.render import bold, clock, compact, dim, duration, is_terminal, print_fields, print_json

if TYPE_CHECKING:
    from dspex.compose.story import Story
    from dspex.core.events import Event

__all__ = ["step"]


def step(story: Story, *, as_json: bool) -> None:
    """Walk through the events: on a terminal key by key, otherwise all of them."""
    steps = [_about(story, number) for number in range(len(story.events))]
    if as_json:
        for one in steps:
            print_json(one)
        return
    asks = is_terminal() and sys.stdin.isatty()
    number = 0
    while 0 <= number < len(steps):
        _show(steps[number], story)
        number += _move(number, len(steps)) if asks else 1


def _move(number: int, count: int) -> int:
    """Where to go from here, as the person says."""
    while True:
        click.echo(dim("Enter next · b back · q quit "), nl=False)
        key = click.getchar()
        click.echo("\r\033[K", nl=False)
        if key in ("q", "Q", "\x03", "\x04"):
            return count
        if key in ("b", "B", "\x1b[D"):
            return -1 if number else 0
        if key in ("\r", "\n", " ", "n", "\x1b[C"):
            return 1


def _about(story: Story, number: int) -> dict[str, Any]:
    from dspex.core.task import fold

    event = story.events[number]
    state = state_of(fold(story.events[: number + 1]))
    went_in, came_out = _said(event)
    return {
        "task": story.task, "version": event.version, "position": event.position, "type": event.type,
        "time": event.time, "since": _between(story.events[0], event), "state": state["state"],
        "attempts": state["attempts"],
        "place": getattr(event.data, "key", None), "input": went_in, "output": came_out,
        "seconds": getattr(event.data, "seconds", None),
    }  # fmt: skip


def _said(event: Event) -> tuple[Any, Any]:
    """What went in and what came out with an event."""
    from dspex.core.events import (
        EffectRecorded,
        TaskClaimed,
        TaskCompleted,
        TaskFailed,
        TaskForked,
        TaskRetried,
        TaskSleeping,
        TaskSubmitted,
    )  # fmt: skip
    from dspex.core.request import shown_request

    match event.data:
        case TaskSubmitted(input=body):
            return json.loads(bytes(body)), None
        case EffectRecorded(error=error, arguments=arguments) if error:
            words = ", ".join(map(str, arguments))
            return shown_request(event.data), f"raised {error.partition(':')[2]}: {words}"
        case EffectRecorded(result=body):
            return shown_request(event.data), json.loads(bytes(body))
        case TaskClaimed(agent=agent, attempt=attempt, assignment=assignment):
            return f"attempt {attempt} by {agent}, values {assignment[:8]}", None
        case TaskForked(parent=parent, at=at, records=records):
            return f"shares events 1 to {at} of task {parent}", f"{records} records"
        case TaskSleeping(until=until, signal=signal):
            return f"waits for {f'the signal {signal}' if signal else 'the time'}", until
        case TaskRetried(type=kind, retry=retry):
            return f"retry {retry}", f"raised {kind}"
        case TaskCompleted(output=body):
            return None, json.loads(bytes(body))
        case TaskFailed(code=code, type=kind, message=message, detail=detail):
            return None, f"{code} {kind}: {detail or message}"
        case _:
            return None, None


def _between(first: Event, event: Event) -> float:
    from datetime import datetime

    return round((datetime.fromisoformat(event.time) - datetime.fromisoformat(first.time)).total_seconds(), 6)


def _show(about: dict[str, Any], story: Story) -> None:
    click.echo(f"{bold(about['type'])}  {dim(_where(about, story))}")
    fields = [("state", f"{about['state']}, {about['attempts']} attempt{'' if about['attempts'] == 1 else 's'}")]
    if about["place"]:
        fields.append(("place", about["place"]))
    if about["input"] is not None:
        fields.append(("in", compact(about["input"])))
    if about["type"] == "TaskSleeping":
        if about["output"]:
            fields.append(("until", clock(about["output"], about["time"])))
    elif about["output"] is not None:
        fields.append(("out", compact(about["output"])))
    if (about["seconds"] or 0) >= 1e-4:
        fields.append(("took", duration(about["seconds"])))
    print_fields([(f"  {name}", value) for name, value in fields])
    click.echo()


def _where(about: dict[str, Any], story: Story) -> str:
    clock = about["time"][11:23]
    return f"version {about['version']} of {story.versions} · {clock} UTC · {duration(about['since'])} after it came"
