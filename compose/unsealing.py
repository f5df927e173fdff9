"""What a story holds, brought back from where it is: keys and objects of a running system, or those in a file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from dspex.agents.beside import KEYS, OBJECTS
from dspex.agents.results import said_forgotten
from dspex.agents.vault import Vault, held_of, master_from, submission_of
from dspex.bus.client import Client
from dspex.bus.objects import NatsKeys, NatsObjects
from dspex.core.codec import events_of
from dspex.core.errors import ConfigurationError, Forgotten, LogCorrupt, NotFound
from dspex.core.events import Event, TaskForgotten, TaskSubmitted
from dspex.core.ports import Keys, Objects
from dspex.core.subjects import Subjects
from dspex.store.aside import FileKeys, FileObjects, MemoryKeys, MemoryObjects, has_aside

if TYPE_CHECKING:
    from dspex.compose.story import Source, Story

__all__ = ["brought_back", "carry", "close_vault", "vault_of_bus", "vault_of_file", "with_submission"]


def vault_of_bus(client: Client, subjects: Subjects, program: str, master: str = "") -> Vault:
    """Keys and objects of a program of a running system; `master` refers to its master key, when it has one."""
    objects = NatsObjects(client, subjects, program=program)
    return Vault(NatsKeys(client, subjects), objects, master=master_from(master))


def vault_of_file(path: Path | None, master: str = "") -> Vault:
    """Those that an export carries, or that stand beside an archive; none where there are none. An export's keys need
    no master key, so one that leads to nothing here is no mistake."""
    objects: Objects = MemoryObjects()
    keys: Keys = MemoryKeys()
    for file in (path, path and path.parent / OBJECTS):
        if file and has_aside(file, "objects"):
            objects = FileObjects(file, readonly=True)
            break
    for file in (path, path and path.parent / KEYS):
        if file and has_aside(file, "keys"):
            keys = FileKeys(file, readonly=True)
            break
    with contextlib.suppress(ConfigurationError):
        return Vault(keys, objects, master=master_from(master))
    return Vault(keys, objects)


async def close_vault(vault: Vault) -> None:
    """Give back the files that a vault has open."""
    for each in (vault.keys, vault.objects):
        if isinstance(each, FileKeys | FileObjects):
            await each.close()


async def brought_back(story: Story, source: Source) -> Story:
    """The story with all that its events hold, or with the reason why it cannot be had."""
    if not any(held_of(event.data) for event in story.events):
        return story
    try:
        vault = await source.vault(story.program)
        return dataclasses.replace(story, events=await vault.bring_back(story.events))
    except (ConfigurationError, Forgotten, NotFound, LogCorrupt) as error:
        words = [event for event in story.every if isinstance(event.data, TaskForgotten)]
        said = str(said_forgotten(story.task, words[0]) if words else error)
        return dataclasses.replace(story, missing=said)


def with_submission(task: str, events: list[Event]) -> list[Event]:
    """A task's events, with its submission in front when its message was erased and its own events keep it."""
    if isinstance(events[0].data, TaskSubmitted):
        return events
    submission = submission_of(task, events, Subjects())
    return events if submission is None else [events_of(submission, Subjects())[0], *events]


async def carry(events: Iterable[Event], source: Source, path: Path, *, keys: bool) -> int:
    """Put the objects that events name into a new file of a log, and with `keys` the keys that seal them; how many.
    What was forgotten meanwhile is left out. When it cannot be done, there is no file."""
    try:
        return await _carry(events, source, path, keys=keys)
    except BaseException:
        path.unlink(missing_ok=True)  # noqa: ASYNC240  (one short call)
        raise


async def _carry(events: Iterable[Event], source: Source, path: Path, *, keys: bool) -> int:
    held = [(event.aggregate.split(".")[1], found) for event in events if (found := held_of(event.data))]
    vaults = {program: await source.vault(program) for program in {program for program, _ in held}}
    blobs = sorted({(each.blob, program) for program, each in held if each.blob})
    names = sorted({(each.key, program) for program, each in held if each.key}) if keys else []
    count = 0
    if blobs:
        async with FileObjects(path) as objects:
            for name, program in blobs:
                data = await vaults[program].objects.get(name)
                if data is not None:
                    await objects.put(data)
                    count += 1
    if names:
        async with FileKeys(path) as ring:
            for name, program in names:
                try:
                    await ring.create(name, await vaults[program].find(name))
                    count += 1
                except (Forgotten, NotFound):
                    pass
    return count
