"""Large values in the NATS object store, and keys in their stream."""

from __future__ import annotations

import base64
import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from tests.contracts.aside_contract import KeysContract, ObjectsContract

from dspex.bus.client import Client
from dspex.bus.objects import NatsKeys, NatsObjects, erase_message
from dspex.bus.server import Server
from dspex.bus.streams import ensure_log
from dspex.core.errors import LogError
from dspex.core.subjects import Subjects

_numbers = itertools.count(1)


class Place:
    def __init__(self, client: Client) -> None:
        self.client, self.subjects = client, Subjects(f"o{next(_numbers)}")

    async def objects(self) -> NatsObjects:
        return NatsObjects(self.client, self.subjects)

    async def keys(self) -> NatsKeys:
        return NatsKeys(self.client, self.subjects)


@pytest.fixture
async def place(shared_server: Server) -> AsyncIterator[Place]:
    async with await Client.connect(shared_server.url) as client:
        yield Place(client)


class TestNatsObjects(ObjectsContract):
    """The suite of the port."""


class TestNatsKeys(KeysContract):
    """The suite of the port."""


async def test_any_client_reads_an_object(place: Place, shared_server: Server) -> None:
    data = bytes(range(256)) * 2000
    name = await (await place.objects()).put(data)
    plain = await nats.connect(shared_server.url)
    try:
        bucket = await plain.jetstream().object_store(place.subjects.bucket)
        found = await bucket.get(name)
        assert (found.data, found.info.size, found.info.chunks) == (data, len(data), 4)
    finally:
        await plain.close()


async def test_what_a_cut_off_put_has_left_is_tidied_away(place: Place) -> None:
    store = await place.objects()
    name = await store.put(b"kept" * 100_000)
    bucket = place.subjects.bucket
    await place.client.request(f"$O.{bucket}.C.loose", b"half a value")
    stream = f"$JS.API.STREAM.INFO.OBJ_{bucket}"
    assert await store.tidy(0.0) == 0, "it is young"
    assert await store.tidy(4e9) == 1
    assert await store.tidy(4e9) == 0
    assert await store.get(name) == b"kept" * 100_000
    assert b'"messages":5' in (await place.client.request(stream, b"")).data


async def test_what_is_forgotten_is_overwritten_on_disk(place: Place, shared_server: Server) -> None:
    keys, store = await place.keys(), await place.objects()
    key = b"the-key-that-must-not-remain-!!!"
    await keys.create("secret", key)
    name = await store.put(b"what-must-not-remain" * 10_000)
    marks = [base64.b64encode(key), b"what-must-not-remain"]
    await keys.create("other")  # so that the block is written
    assert all(_found(shared_server.data, mark) for mark in marks)
    assert await keys.forget("secret")
    assert await store.delete(name)
    assert not any(_found(shared_server.data, mark) for mark in marks)


def _found(folder: Path, mark: bytes) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and mark in path.read_bytes()]


async def test_a_message_is_erased_and_a_stream_that_is_not_there_is_said(place: Place, shared_server: Server) -> None:
    stream = place.subjects.stream
    await ensure_log(place.client, place.subjects, ["p"])
    reply = await place.client.request(f"{place.subjects.prefix}.task.p", b"words-that-must-not-remain")
    assert b'"seq":1' in reply.data.replace(b" ", b"")
    assert _found(shared_server.data, b"words-that-must-not-remain")
    await erase_message(place.client, stream, 1)
    await erase_message(place.client, stream, 1)
    assert not _found(shared_server.data, b"words-that-must-not-remain")
    with pytest.raises(LogError, match="did not erase position 1"):
        await erase_message(place.client, "NO_SUCH_STREAM", 1)
