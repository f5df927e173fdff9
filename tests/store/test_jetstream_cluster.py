"""The log in JetStream on three replicas."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
from tests.store.test_jetstream import Stream

from dspex.bus.client import Client
from dspex.bus.streams import ensure_log
from dspex.core.events import Head
from dspex.core.ports import Appended
from dspex.core.subjects import Subjects
from dspex.store import JetStreamLog
from dspex.store.contract import LogContract, commit

if TYPE_CHECKING:
    from tests.clusters import Cluster


class TestJetStreamCluster(LogContract):
    @pytest.fixture
    async def place(self, cluster: Cluster) -> AsyncIterator[Stream]:
        place = Stream(cluster.url, replicas=3)
        yield place
        await place.close()

    async def test_kill_9_of_the_leader_loses_and_doubles_nothing(self, cluster: Cluster) -> None:
        subjects = Subjects("failover")
        async with await Client.connect(cluster.url, name="tests") as client:
            log = JetStreamLog(client, subjects, await ensure_log(client, subjects, ["qabot"], replicas=3))
            names = [f"task.qabot.{i}" for i in range(32)]
            acknowledged = 0
            heads: dict[str, Head] = {}
            info = json.loads((await client.request(f"$JS.API.STREAM.INFO.{subjects.stream}", b"")).data)
            assert len(info["cluster"]["replicas"]) == 2
            leader = cluster.member(info["cluster"]["leader"])

            async def write(name: str) -> None:
                nonlocal acknowledged
                head = Head()
                for _ in range(20):
                    result = await log.append(name, commit(name, after=head.version, mark=name), head)
                    assert isinstance(result, Appended), "no one else writes here"
                    head = heads[name] = result.head
                    acknowledged += 1
                    if acknowledged == 150:
                        await asyncio.to_thread(leader.kill)

            async def follow() -> int:
                seen = 0
                async for entry in log.tail(0):
                    seen += 1
                    assert entry.position == seen
                    if seen == 32 * 20:
                        break
                return seen

            following = asyncio.create_task(follow())
            await asyncio.gather(*map(write, names))
            assert await following == 32 * 20
            await asyncio.to_thread(leader.start)
            await asyncio.to_thread(cluster.wait_for_leader)
            assert len(await log.scan(0, 5000)) == 32 * 20
            for name in names:
                kept = await log.read(name)
                assert len(kept) == 20 and kept[-1].position == heads[name].position
