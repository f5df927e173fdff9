"""Tasks taken out of a log into a file that goes anywhere: `dspex export`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

from dspex.agents.vault import held_of
from dspex.compose.story import Source, to_event
from dspex.compose.story import shown as as_shown
from dspex.compose.unsealing import carry, with_submission
from dspex.core.codec import encode_commit, sealed_body
from dspex.core.events import OutcomeReported, SignalSent, TaskSubmitted
from dspex.core.headers import SEALED
from dspex.core.ports import Entry
from dspex.core.subjects import Subjects
from dspex.store.export import import_entries

__all__ = ["export"]


async def export(
    source: Source, path: Path | str, *, tasks: Iterable[str] = (), programs: Iterable[str] = (), prefix: str = "dspex",
    keys: bool = False,
) -> int:  # fmt: skip
    """Write these tasks and all tasks of these programs to a new file, or the whole log when none is named; give how
    many entries. What is about a task goes along: its outcomes, signals, where its program was, and what its values
    were. Raises NotFound for a task that is not there, LogError when the file cannot be written. Large values go along;
    the keys of private ones only with `keys`."""
    subjects = Subjects(prefix)
    found: dict[int, list[dict[str, Any]]] = {}
    wanted = list(programs)
    queries: list[dict[str, Any]] = [{"program": program} for program in wanted]
    for task in tasks:
        shown = [event async for event in source.events(task=task)]
        _take(found, shown)
        program = str(shown[0]["data"]["program"])
        queries += [{"aggregate": f"{kind}.{program}.{task}"} for kind in ("inbox", "privacy")]
        wanted.append(program)
    for program in dict.fromkeys(wanted):
        queries += [{"aggregate": f"program.{program}.0"}, {"aggregate": f"variables.{program}.0"}]
    for query in queries if wanted else [{}]:
        _take(found, [event async for event in source.events(**query)])
    _restore_submissions(found)
    entries = [_entry(position, shown, subjects) for position, shown in sorted(found.items())]
    count = import_entries(path, [entry for entry in entries if entry], epoch="")
    events = [to_event(event) for shown in found.values() for event in shown if event["aggregate"]]
    await carry(events, source, Path(path), keys=keys)
    return count


def _restore_submissions(found: dict[int, list[dict[str, Any]]]) -> None:
    """Put back the submissions whose messages were erased, as their tasks keep them, sealed."""
    for shown in list(found.values()):
        for event in shown:
            task = str(event["aggregate"]).rpartition(".")[2]
            if event["type"] == "InputSealed" and int(task) not in found:
                found[int(task)] = [as_shown(each) for each in with_submission(task, [to_event(event)])[:1]]


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
            if held := held_of(first.data):
                body = sealed_body(raw, held.sealed)
        case OutcomeReported(program=program, outcome=raw):
            subject, body = subjects.door("outcome", program), bytes(raw)
        case SignalSent(program=program, signal=raw):
            subject, body = subjects.door("signal", program), bytes(raw)
            if held := held_of(first.data):
                body, headers = sealed_body(raw, held.sealed), {SEALED: held.key}
        case _:
            subject, body = subjects.event(first.aggregate), encode_commit(events)
    return Entry(position=position, time=time, subject=subject, body=body, headers=headers)


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()
