"""What stands beside the archive, on a real server: copies, what is collected, and what a crash leaves."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from msgspec import Raw

from dspex.agents.beside import Beside
from dspex.agents.vault import task_key
from dspex.bus.client import Client
from dspex.bus.objects import NatsKeys, NatsObjects
from dspex.bus.server import Server
from dspex.bus.streams import ensure_log
from dspex.core.errors import Forgotten
from dspex.core.events import Event, Head, Held, Payload, TaskCompleted, TaskForgotten
from dspex.core.ports import Appended
from dspex.core.subjects import Subjects
from dspex.store.archive import Archive
from dspex.store.jetstream import JetStreamLog

_numbers = itertools.count(1)
WHOLE = "0" * 64


class Place:
    """A log, its archive, and what is kept beside it; `again` is what follows after a death."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client, self.folder = client, folder
        self.subjects = Subjects(f"k{next(_numbers)}")
        self.objects, self.keys = NatsObjects(client, self.subjects), NatsKeys(client, self.subjects)
        self.opened: list[Beside] = []

    async def begin(self) -> Place:
        epoch = await ensure_log(self.client, self.subjects, ["p"])
        self.log = JetStreamLog(self.client, self.subjects, epoch)
        self.archive = await Archive.open(self.folder / "archive.db", epoch=epoch, subjects=self.subjects)
        self.beside = self.again()
        return self

    def again(self, guard: float = 0.0) -> Beside:
        self.beside = Beside(self.client, self.subjects, self.log, self.archive, guard=guard)
        self.opened.append(self.beside)
        return self.beside

    async def write(self, aggregate: str, payload: Payload) -> int:
        event = Event(aggregate, 1, "2026-11-23T10:00:00.000000Z", "t", "1", "1", payload)
        stored = await self.log.append(aggregate, [event], Head())
        assert isinstance(stored, Appended)
        return stored.head.position

    async def ended(self, task: int, blob: str) -> int:
        return await self.write(f"task.p.{task}", TaskCompleted(output=Raw(b"null"), held=Held(blob=blob, size=1)))

    async def walk(self) -> None:
        await self.archive.add(await self.log.scan(self.archive.position), self.log)
        await self.beside.once()

    async def close(self) -> None:
        for keeping in self.opened:
            await keeping.close()
        await self.archive.close()


@pytest.fixture
async def place(shared_server: Server, tmp_path: Path) -> AsyncIterator[Place]:
    async with await Client.connect(shared_server.url) as client:
        place = await Place(client, tmp_path).begin()
        yield place
        await place.close()


async def test_what_an_archived_row_names_is_copied(place: Place) -> None:
    name = await place.objects.put(b"large")
    key = await place.keys.create("k")
    await place.ended(1, name)
    await place.walk()
    assert await place.beside.objects.get(name) == b"large"
    assert await place.beside.keys.get("k") == key
    await place.keys.forget("k")
    await place.beside.once()
    with pytest.raises(Forgotten):
        await place.beside.keys.get("k")


async def test_what_nothing_names_is_collected_and_the_rest_stays(place: Place) -> None:
    named, loose = await place.objects.put(b"named"), await place.objects.put(b"loose")
    await place.ended(1, named)
    await place.walk()
    assert await place.beside.sweep() == 0, "the first look only notes how far the log is"
    assert await place.beside.sweep() == 1
    assert await place.objects.get(loose) is None
    assert await place.objects.get(named) == b"named"


async def test_what_was_just_put_is_left_alone(place: Place) -> None:
    """Its commit may be under way."""
    keeping = place.again(guard=600)
    loose = await place.objects.put(b"loose")
    await place.walk()
    await keeping.sweep()
    assert await keeping.sweep() == 0
    assert await place.objects.get(loose) == b"loose"


async def test_nothing_is_collected_while_the_archive_is_behind(place: Place) -> None:
    late = await place.objects.put(b"late")
    await place.walk()
    await place.ended(1, late)
    await place.beside.sweep()
    assert await place.beside.sweep() == 0, "the row that names it is not archived yet"
    await place.walk()
    await place.beside.sweep()
    assert await place.beside.sweep() == 0
    assert await place.objects.get(late) == b"late"


async def test_what_only_the_archive_still_names_leaves_the_store(place: Place) -> None:
    name = await place.objects.put(b"old")
    position = await place.ended(1, name)
    await place.ended(2, WHOLE)
    await place.walk()
    await place.client.request(f"$JS.API.STREAM.MSG.DELETE.{place.subjects.stream}", b'{"seq": %d}' % position)
    await place.beside.sweep()
    assert await place.beside.sweep() == 1
    assert await place.objects.get(name) is None
    assert await place.beside.objects.get(name) == b"old"


async def test_forgetting_takes_only_what_the_task_alone_names(place: Place) -> None:
    own, both = await place.objects.put(b"own"), await place.objects.put(b"both")
    await place.ended(1, own)
    await place.ended(2, both)
    await place.ended(3, both)
    await place.keys.create(task_key(place.log.epoch, "2"))
    await place.walk()
    assert (await place.beside.forget("p", "1")).objects == 1
    gone = await place.beside.forget("p", "2")
    assert (gone.keys, gone.objects) == (1, 0)
    assert await place.objects.get(own) is None
    assert await place.beside.objects.get(own) is None
    assert await place.objects.get(both) == b"both"
    assert (await place.beside.forget("p", "3")).objects == 1
    assert await place.beside.objects.get(both) is None


async def test_whoever_dies_after_the_word_is_followed_by_one_who_forgets(place: Place) -> None:
    name = await place.objects.put(b"own")
    await place.keys.create(task_key(place.log.epoch, "1"))
    await place.ended(1, name)
    await place.walk()
    await place.write("privacy.p.1", TaskForgotten(task="1", actor="eve"))
    place.again()
    await place.walk()
    assert await place.objects.get(name) is None
    with pytest.raises(Forgotten):
        await place.keys.get(task_key(place.log.epoch, "1"))
    with pytest.raises(Forgotten):
        await place.beside.keys.get(task_key(place.log.epoch, "1"))


async def test_an_object_that_is_nowhere_stops_nobody(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    await place.ended(1, WHOLE)
    name = await place.objects.put(b"there")
    await place.ended(2, name)
    await place.walk()
    assert f"names the object {WHOLE}, which is not there" in caplog.text
    assert await place.beside.objects.get(name) == b"there"


async def test_a_walk_that_was_cut_off_is_walked_again(place: Place) -> None:
    names = [await place.objects.put(os.urandom(100)) for _ in range(3)]
    for task, name in enumerate(names, 1):
        await place.ended(task, name)
    await place.archive.add(await place.log.scan(0), place.log)
    place.beside.objects.put = _dying(place.beside.objects.put)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="dies"):
        await place.beside.once()
    await place.again().once()
    assert [await place.beside.objects.get(name) is not None for name in names] == [True] * 3


def _dying(put: Callable[[bytes], Awaitable[str]]) -> Callable[[bytes], Awaitable[str]]:
    """Dies at the second object."""
    calls = itertools.count(1)

    async def dying(data: bytes) -> str:
        if next(calls) == 2:
            raise RuntimeError("dies")
        return await put(data)

    return dying
