"""Large values and keys, in memory and in SQLite files."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.contracts.aside_contract import KeysContract, ObjectsContract

from dspex.core.errors import LogCorrupt, LogError
from dspex.store.aside import FileKeys, FileObjects, MemoryKeys, MemoryObjects


class Memory:
    def __init__(self) -> None:
        self._objects, self._keys = MemoryObjects(), MemoryKeys()

    async def objects(self) -> MemoryObjects:
        return self._objects

    async def keys(self) -> MemoryKeys:
        return self._keys


class Files:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: list[FileObjects | FileKeys] = []

    async def objects(self) -> FileObjects:
        store = FileObjects(self.folder / "objects.db")
        self.opened.append(store)
        return store

    async def keys(self) -> FileKeys:
        store = FileKeys(self.folder / "keys.db")
        self.opened.append(store)
        return store


@pytest.fixture
async def files(tmp_path: Path) -> AsyncIterator[Files]:
    place = Files(tmp_path)
    yield place
    for store in place.opened:
        await store.close()


class TestMemoryObjects(ObjectsContract):
    @pytest.fixture
    def place(self) -> Memory:
        return Memory()


class TestMemoryKeys(KeysContract):
    @pytest.fixture
    def place(self) -> Memory:
        return Memory()


class TestFileObjects(ObjectsContract):
    @pytest.fixture
    def place(self, files: Files) -> Files:
        return files


class TestFileKeys(KeysContract):
    @pytest.fixture
    def place(self, files: Files) -> Files:
        return files


async def test_a_forgotten_key_is_not_in_the_file(files: Files, tmp_path: Path) -> None:
    keys = await files.keys()
    for number in range(50):
        await keys.create(f"k{number}")
    key = await keys.create("secret", b"the-key-that-must-not-remain-!!!")
    assert key in (tmp_path / "keys.db").read_bytes()
    await keys.forget("secret")
    found = [path.name for path in tmp_path.iterdir() if key in path.read_bytes()]  # noqa: ASYNC240
    assert found == []


async def test_a_deleted_object_is_not_in_the_file(files: Files, tmp_path: Path) -> None:
    store = await files.objects()
    name = await store.put(b"what-must-not-remain" * 1000)
    await store.delete(name)
    assert b"what-must-not-remain" not in (tmp_path / "objects.db").read_bytes()


async def test_a_damaged_object_is_named(files: Files, tmp_path: Path) -> None:
    store = await files.objects()
    name = await store.put(b"whole")
    with closing(sqlite3.connect(tmp_path / "objects.db")) as file:
        file.execute("UPDATE objects SET data = ?", (b"wrong",))
        file.commit()
    with pytest.raises(LogCorrupt, match=name):
        await store.get(name)


async def test_a_file_that_is_none_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "objects.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(LogError, match="cannot be used"):
        FileObjects(tmp_path / "objects.db")
    with pytest.raises(LogError, match="cannot be used"):
        FileKeys(tmp_path / "nowhere" / "keys.db")
