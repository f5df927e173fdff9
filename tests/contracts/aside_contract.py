"""What every object store and every store of keys does, whatever it is built on."""

from __future__ import annotations

import asyncio
import hashlib
import time
from typing import Protocol

import pytest

from dspex.core.errors import Forgotten, LogError, NotFound
from dspex.core.ports import Keys, Objects

__all__ = ["KeysContract", "ObjectsContract"]


class ObjectsPlace(Protocol):
    async def objects(self) -> Objects: ...


class KeysPlace(Protocol):
    async def keys(self) -> Keys: ...


class ObjectsContract:
    """A subclass gives the fixture `place`; `objects()` opens the same store each time."""

    async def test_a_value_is_found_by_the_hash_of_what_it_holds(self, place: ObjectsPlace) -> None:
        store = await place.objects()
        for data in (b"", b"x", b"y" * 1_000_000):
            name = await store.put(data)
            assert name == hashlib.sha256(data).hexdigest()
            assert await (await place.objects()).get(name) == data
        assert sorted(each.size for each in await store.list()) == [0, 1, 1_000_000]

    async def test_what_was_never_put_is_not_there(self, place: ObjectsPlace) -> None:
        store = await place.objects()
        assert await store.get("0" * 64) is None
        assert await store.delete("0" * 64) is False
        assert await store.list() == []
        assert await store.tidy(time.time()) == 0

    async def test_putting_it_again_makes_it_young_again(self, place: ObjectsPlace) -> None:
        store = await place.objects()
        name = await store.put(b"again" * 100_000)
        [first] = await store.list()
        await asyncio.sleep(0.02)
        assert await store.put(b"again" * 100_000) == name
        [second] = await store.list()
        assert second.time > first.time
        assert await store.delete(name, before=first.time) is False, "it was put again since"
        assert await store.get(name) == b"again" * 100_000
        assert await store.delete(name, before=second.time + 1) is True
        assert await store.get(name) is None
        assert await store.list() == []

    async def test_the_same_value_from_many_at_once(self, place: ObjectsPlace) -> None:
        store = await place.objects()
        data = b"z" * 300_000
        names = await asyncio.gather(*(store.put(data) for _ in range(5)))
        assert len(set(names)) == 1
        assert await store.get(names[0]) == data
        await store.tidy(time.time() + 1)
        assert await store.get(names[0]) == data

    async def test_what_is_too_large_is_refused(self, place: ObjectsPlace) -> None:
        store = await place.objects()
        with pytest.raises(LogError, match="67,108,865 bytes"):
            await store.put(bytes((64 << 20) + 1))


class KeysContract:
    """A subclass gives the fixture `place`; `keys()` opens the same store each time."""

    async def test_a_key_is_made_once(self, place: KeysPlace) -> None:
        keys = await place.keys()
        key = await keys.create("k-1")
        assert len(key) == 32
        assert await keys.create("k-1") == key
        assert await (await place.keys()).get("k-1") == key
        assert await keys.create("k-2") != key

    async def test_a_key_that_is_not_there_is_named(self, place: KeysPlace) -> None:
        with pytest.raises(NotFound, match="the key nobody is not here"):
            await (await place.keys()).get("nobody")

    async def test_a_key_may_be_given(self, place: KeysPlace) -> None:
        keys = await place.keys()
        assert await keys.create("k", b"k" * 32) == b"k" * 32
        assert await keys.create("k", b"l" * 32) == b"k" * 32

    async def test_what_was_forgotten_stays_forgotten(self, place: KeysPlace) -> None:
        keys = await place.keys()
        await keys.create("k")
        assert await keys.forget("k") is True
        assert await keys.forget("k") is False
        for again in (keys.get("k"), keys.create("k"), keys.create("k", b"k" * 32)):
            with pytest.raises(Forgotten, match="the key k was forgotten"):
                await again

    async def test_a_key_can_be_forgotten_before_it_is_made(self, place: KeysPlace) -> None:
        keys = await place.keys()
        assert await keys.forget("early") is False
        with pytest.raises(Forgotten):
            await keys.create("early")

    async def test_the_changes_tell_all_of_it(self, place: KeysPlace) -> None:
        keys = await place.keys()
        assert await keys.changes(0) == []
        made = {name: await keys.create(name) for name in ("a", "b", "c")}
        first = await keys.changes(0)
        assert {change.name: change.key for change in first} == made
        await keys.forget("b")
        later = await keys.changes(first[-1].number)
        assert [(change.name, change.key) for change in later] == [("b", None)]
        assert {change.name: change.key for change in await keys.changes(0)} == {**made, "b": None}
        assert len(await keys.changes(0, 1)) == 1

    async def test_many_who_make_the_same_key_have_the_same(self, place: KeysPlace) -> None:
        keys = await place.keys()
        assert len({*await asyncio.gather(*(keys.create("one") for _ in range(10)))}) == 1

    async def test_a_name_that_is_no_token_is_refused(self, place: KeysPlace) -> None:
        with pytest.raises(ValueError, match="cannot be a key's name"):
            await (await place.keys()).create("a.b")
