"""What the archivist keeps beside the archive: large values, keys, and who names what; and what it has forgotten.

It walks over the archived rows, copies the objects that they name and the keys as they are made, forgets what is to be
forgotten, and removes from the object store what nothing names. Each step may be done twice: whoever dies in between,
the rows are walked over again from the last one that was noted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from msgspec import Struct

from dspex.agents.guards import can_erase
from dspex.agents.vault import held_of, task_key
from dspex.bus.client import Client
from dspex.bus.objects import NatsKeys, NatsObjects, ensure_aside, erase_message
from dspex.bus.streams import stream_names
from dspex.core import headers as h
from dspex.core.codec import decode_commit
from dspex.core.errors import ConnectionFailed, Forgotten, LogCorrupt, LogError
from dspex.core.events import TaskForgotten
from dspex.core.ports import Entry, Log
from dspex.core.subjects import Subjects, aggregate
from dspex.core.task import fold
from dspex.store.archive import Archive
from dspex.store.aside import FileKeys, FileNames, FileObjects, has_aside

__all__ = ["KEYS", "OBJECTS", "Beside", "Gone", "put_back", "task_is_sealed"]

logger = logging.getLogger("dspex.agents")

OBJECTS, KEYS = "objects.db", "keys.db"
EVERY = 1.0
"""Seconds between looks at what is new."""
SWEEP = 60.0
"""Seconds between looks for objects that nothing names."""
GUARD = 600.0
"""Seconds that an object is left alone after it was put, although nothing names it: its commit may be under way."""
PAGE = 500
STRIDE = 10_000
"""Positions walked over in one go: nobody writes the archive meanwhile."""
SWEPT = 200
"""Objects of which is asked at one sweep whether the log still has what names them."""
NOTE = "kept"
"""Under this name and a log's epoch the names' file has the position up to which its rows were walked over."""


class Gone(Struct, frozen=True):
    """What forgetting a task took away: keys and objects; `later` are objects so young that they go a little later."""

    keys: int = 0
    objects: int = 0
    later: int = 0


class Beside:
    """Works on one archive while it is open; `close` it afterwards."""

    def __init__(self, client: Client, subjects: Subjects, log: Log, archive: Archive, *, guard: float = GUARD) -> None:
        folder = archive.file.parent
        self._client, self._subjects, self._log, self._archive, self._age = client, subjects, log, archive, guard
        self._keys = NatsKeys(client, subjects)
        self.keys, self.objects = FileKeys(folder / KEYS), FileObjects(folder / OBJECTS)
        self.names = FileNames(folder / OBJECTS)
        self._one = asyncio.Lock()
        self._copied: dict[str, int] = {}
        self._turn = 0
        self._seen = (0, 0.0)
        self._swept = time.monotonic()

    async def close(self) -> None:
        """Give the files back."""
        for file in (self.keys, self.objects, self.names):
            await file.close()

    async def go_on(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            try:
                await self.once()
                if time.monotonic() - self._swept > SWEEP:
                    await self.sweep()
                    self._swept = time.monotonic()
            except (LogError, ConnectionFailed, TimeoutError) as error:
                logger.warning("what stands beside the archive could not be kept: %s", error)
            await asyncio.sleep(EVERY)

    async def once(self) -> None:
        """Copy what is new, and forget what is to be forgotten."""
        async with self._one:
            await self._copy_keys()
            after = await self._walked()
            until = self._archive.position
            privacy = self._subjects.event("privacy.")
            while after < until:
                # The file finds what matters, which is nearly nothing: most rows are never looked at here.
                top = min(after + STRIDE, until)
                for entry in await self._archive.marked(after, top, privacy, b'"blob"'):
                    await self._look_at(entry)
                after = top
                await self.names.note(f"{NOTE}.{self._log.epoch}", after)

    async def _walked(self) -> int:
        return await self.names.noted(f"{NOTE}.{self._log.epoch}")

    def _objects(self, program: str) -> NatsObjects:
        return NatsObjects(self._client, self._subjects, program=program)

    async def _programs(self) -> list[str]:
        """Whose keys and objects there are: everybody's together, or those of each program for itself."""
        if not self._subjects.tenants:
            return [""]
        start = f"{self._subjects.key_stream}_"
        names = await stream_names(self._client, f"{self._subjects.prefix}.key.>")
        return [name.removeprefix(start) for name in names if name.startswith(start)]

    async def _copy_keys(self) -> None:
        for program in await self._programs():
            await self._copy_keys_of(program)

    async def _copy_keys_of(self, program: str) -> None:
        while changes := await self._keys.changes(self._copied.get(program, 0), PAGE, program):
            for change in changes:
                if change.key is None:
                    await self.keys.forget(change.name)
                else:
                    try:
                        await self.keys.create(change.name, change.key)
                    except Forgotten:  # the one in the stream came back from somewhere
                        await self._keys.forget(change.name)
                self._copied[program] = change.number

    async def _look_at(self, entry: Entry) -> None:
        name = self._subjects.aggregate_of(entry.subject) or ""
        kind, _, rest = name.partition(".")
        forgotten = kind == "privacy"
        if not forgotten and not (kind in ("task", "inbox") and b'"blob"' in entry.body):
            return
        program, _, task = rest.partition(".")
        try:
            events = decode_commit(entry.body, entry.position)
        except LogCorrupt:
            return
        for event in events:
            held = held_of(event.data)
            if held and held.blob:
                await self._keep(held.blob, program, task, entry.position)
            if forgotten and isinstance(event.data, TaskForgotten):
                await self._forget(program, task)

    async def _keep(self, name: str, program: str, task: str, position: int) -> None:
        await self.names.add(self._log.epoch, program, task, name, position)
        if await self.objects.get(name) is None:
            data = await self._objects(program).get(name)
            if data is None:
                logger.warning("task %s of %s names the object %s, which is not there", task, program, name)
            else:
                await self.objects.put(data)

    # -- forgetting

    async def forget(self, program: str, task: str, write_down: Callable[[], Awaitable[object]] | None = None) -> Gone:
        """Have it written down, then destroy the keys of a task here and in the bus, erase what came of it in the open,
        and remove the objects that only it names. Raises LogError."""
        await self.once()
        async with self._one:  # so that nobody comes upon what was written down before us
            if write_down is not None:
                await write_down()
            return await self._forget(program, task)

    async def _forget(self, program: str, task: str) -> Gone:
        epoch = self._log.epoch
        names = [task_key(epoch, task, program if self._subjects.tenants else "")]
        submission = await self._archive.entry(int(task)) or await self._log.entry(int(task))
        own = h.sealed(submission.headers) if submission else None
        if own and own not in names:
            names.append(own)
        stored = await self._log.entry(int(task))
        last = await self._log.last(aggregate("task", program, task))
        ended = last is None or fold(decode_commit(last.body, last.position)).ended
        # One that has not ended must still be delivered again; whoever ends it erases it.
        door = ("task", program)
        exposed = stored and self._subjects.door_of(stored.subject) == door and not h.sealed(stored.headers)
        if exposed and ended and can_erase(self._log):
            await erase_message(self._client, self._subjects.stream, int(task))
        keys = 0
        for name in names:
            keys += await self._keys.forget(name)
            await self.keys.forget(name)
        objects = later = 0
        for name in await self.names.of_task(epoch, program, task):
            others = await self.names.positions(name)
            if len(others) > 1:
                continue
            await self.objects.delete(name)
            if await self._objects(program).delete(name, before=time.time() - self._age):
                objects += 1
            else:
                later += 1
        await self.names.drop(epoch, program, task)
        return Gone(keys, objects, later)

    # -- collecting

    async def sweep(self) -> int:
        """Remove objects that nothing names from the object store; how many. What the log has forgotten and the archive
        keeps goes there, too: the copy beside the archive stays."""
        now, head = time.time(), await self._log.head()
        walked = await self._walked()
        seen, when = self._seen
        if not when or walked >= seen:
            self._seen = (head, now)
        if not when or walked < seen:
            return 0  # what names an object may not have been looked at yet
        gone = asked = 0
        stores = [self._objects(program) for program in await self._programs()]
        stored = [(store, each) for store in stores for each in sorted(await store.list(), key=lambda it: it.name)]
        self._turn = self._turn if self._turn < len(stored) else 0
        for number, (store, each) in enumerate(stored):
            before = min(when, now) - self._age
            if each.time > before:
                continue
            named = await self.names.positions(each.name)
            if named:
                if not self._turn <= number < self._turn + SWEPT or await self.objects.get(each.name) is None:
                    continue
                asked += 1
                if await self._still_named(named):
                    continue
            gone += await store.delete(each.name, before=before)
        self._turn += SWEPT
        return gone + sum([await store.tidy(now - self._age) for store in stores])

    async def _still_named(self, named: list[tuple[str, int]]) -> bool:
        for epoch, position in named:
            if epoch == self._log.epoch and await self._log.entry(position) is not None:
                return True
        return False


async def task_is_sealed(archive: Archive, subjects: Subjects, program: str, task: str) -> bool:
    """Whether a task holds anything that can be forgotten."""
    submission = await archive.entry(int(task))
    if submission is not None and h.sealed(submission.headers):
        return True
    for kind in ("task", "inbox"):
        for entry in await archive.read(aggregate(kind, program, task)):
            if any(held_of(event.data) for event in decode_commit(entry.body, entry.position)):
                return True
    return False


async def put_back(archive: Archive, client: Client, subjects: Subjects) -> None:
    """Give a log that is restored the objects and keys that stand beside its archive; none of what was forgotten, also
    when the file of the keys is older than that. Doing it again is fine. Raises LogError."""
    folder = archive.file.parent
    made = {""}

    async def make(program: str) -> bool:
        """Whether the program has a place for what is its own, where there are access rules."""
        if program not in made:
            if not await archive.last(aggregate("program", program, 0)):
                return False  # a name from before there were rules
            await ensure_aside(client, subjects, program)
            made.add(program)
        return True

    if has_aside(folder / OBJECTS, "objects"):
        files = FileObjects(folder / OBJECTS, readonly=True), FileNames(folder / OBJECTS, readonly=True)
        async with files[0] as objects, files[1] as names:
            for each in await objects.list():
                data = await objects.get(each.name)
                for program in await names.programs(each.name) if subjects.tenants else [""]:
                    if data is not None and await make(program):
                        await NatsObjects(client, subjects, program=program).put(data)
    if not has_aside(folder / KEYS, "keys"):
        return
    gone = await _forgotten(archive, subjects)
    async with FileKeys(folder / KEYS, readonly=True) as ring:
        keys, after = NatsKeys(client, subjects), 0
        while changes := await ring.changes(after, PAGE):
            for change in changes:
                if not await make(subjects.owner(change.name)):
                    logger.warning("the key %s is from before there were access rules, and stays here", change.name)
                elif change.key is None or change.name in gone:
                    await keys.forget(change.name)
                else:
                    try:
                        await keys.create(change.name, change.key)
                    except Forgotten:
                        logger.info("the key %s was forgotten there, and stays so", change.name)
            after = changes[-1].number


async def _forgotten(archive: Archive, subjects: Subjects) -> set[str]:
    """The keys of all tasks that the archive says were forgotten."""
    found: set[str] = set()
    after = 0
    while entries := await archive.scan(after, PAGE, subjects.event("privacy.>")):
        for entry in entries:
            task = entry.subject.rpartition(".")[2]
            submission = await archive.entry(int(task)) if task.isdecimal() else None
            owner = entry.subject.split(".")[-2] if subjects.tenants else ""
            found |= {task_key(archive.epoch, task, owner), (submission and h.sealed(submission.headers)) or ""}
        after = entries[-1].position
    return found
