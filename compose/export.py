"""Tasks taken out of a log into a file that goes anywhere: `dspex export`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from dspex.compose.story import Source, to_event
from dspex.core.codec import encode_commit
from dspex.core.events import OutcomeReported, SignalSent, TaskSubmitted
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects
from dspex.store.export import import_entries

__all__ = ["export"]


async def export(
    source: Source, path: Path | str, *, tasks: Iterable[str] = (), programs: Iterable[str] = (), prefix: str = "dspex"
) -> int:
    """Write these tasks and all tasks of these programs to a new file, or the whole log when none is named; give how
    many entries. What is about a task goes along: its outcomes, signals, where its program was, and what its values
    were. Raises NotFound for a task that is not there, LogError when the file cannot be written."""
    subjects = Subjects(prefix)
    found: dict[int, list[dict[str, Any]]] = {}
    wanted = list(programs)
    queries: list[dict[str, Any]] = [{"program": program} for program in wanted]
    for task in tasks:
        shown = [event async for event in source.events(task=task)]
        _take(found, shown)
        program = str(shown[0]["data"]["program"])
        queries.append({"aggregate": f"inbox.{program}.{task}"})
        wanted.append(program)
    for program in dict.fromkeys(wanted):
        queries += [{"aggregate": f"program.{program}.0"}, {"aggregate": f"variables.{program}.0"}]
    for query in queries if wanted else [{}]:
        _take(found, [event async for event in source.events(**query)])
    entries = [_entry(position, shown, subjects) for position, shown in sorted(found.items())]
    return import_entries(path, [entry for entry in entries if entry], epoch="")


def _take(found: dict[int, list[dict[str, Any]]], shown: list[dict[str, Any]]) -> None:
    for position, events in groupby(shown, key=lambda event: int(event["position"])):
        found.setdefault(position, list(events))


def _entry(position: int, shown: list[dict[str, Any]], subjects: Subjects) -> Entry | None:
    """The entry that these events were; None for one that nobody of ours has written."""
    events = [to_event(event) for event in shown]
    first, time = events[0], _seconds(events[0].time)
    if not first.aggregate:
        return None
    headers: dict[str, str] = {}
    match first.data:
        case TaskSubmitted(program=program, input=raw):
            subject, body, headers = subjects.door("task", program), bytes(raw), first.data.headers
        case OutcomeReported(program=program, outcome=raw):
            subject, body = subjects.door("outcome", program), bytes(raw)
        case SignalSent(program=program, signal=raw):
            subject, body = subjects.door("signal", program), bytes(raw)
        case _:
            subject, body = subjects.event(first.aggregate), encode_commit(events)
    return Entry(position=position, time=time, subject=subject, body=body, headers=headers)


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
