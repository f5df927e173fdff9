"""Large values and keys on three replicas."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from tests.bus.test_objects import Place
from tests.contracts.aside_contract import KeysContract, ObjectsContract

from dspex.bus.client import Client

if TYPE_CHECKING:
    from tests.clusters import Cluster


@pytest.fixture
async def place(cluster: Cluster) -> AsyncIterator[Place]:
    async with await Client.connect(cluster.url) as client:
        place = Place(client)
        yield place
        for stream in (f"OBJ_{place.subjects.bucket}", place.subjects.key_stream):
            await client.request(f"$JS.API.STREAM.DELETE.{stream}", b"")


class TestNatsObjectsCluster(ObjectsContract):
    """The suite of the port."""

    async def test_three_servers_keep_it(self, place: Place) -> None:
        await (await place.objects()).put(b"kept")
        info = await place.client.request(f"$JS.API.STREAM.INFO.OBJ_{place.subjects.bucket}", b"")
        assert json.loads(info.data)["config"]["num_replicas"] == 3


class TestNatsKeysCluster(KeysContract):
    """The suite of the port."""
