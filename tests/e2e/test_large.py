"""Values too large for a message: they travel by their hash, and are there again wherever they are asked for."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import nats
import pytest
from tests.e2e.conftest import Launch
from tests.e2e.private import Large
from tests.e2e.running import Running

from dspex import NotFound, ProgramFailed, Replay
from dspex.bus.objects import NatsObjects
from dspex.compose.caller import Caller
from dspex.compose.export import export
from dspex.compose.story import BusSource

HERE = Path(__file__).parent / "private.py"
PLANS = [(f"{HERE}:Large", 1)]
MIB = 1 << 20


@pytest.fixture
async def caller(shared: Running) -> AsyncIterator[Caller]:
    async with await Caller.connect(shared.url) as caller:
        yield caller


def wanted(output: int = 0, effect: int = 0) -> bytes:
    return json.dumps({"output": output, "effect": effect}).encode()


async def test_an_output_of_5_mib_is_answered_whole(caller: Caller) -> None:
    output, task = await caller.ask("large", wanted(5 * MIB))
    assert len(json.loads(output)["text"]) == 5 * MIB
    assert await caller.result("large", task) == output
    end = [event async for event in caller.events(task=task)][-1]
    assert end["data"]["output"] is None
    assert end["data"]["held"] == {"blob": hashlib.sha256(output).hexdigest(), "size": len(output)}


async def test_an_effect_of_20_mib_is_recorded_and_replayed(caller: Caller, shared: Running, tmp_path: Path) -> None:
    output, task = await caller.ask("large", wanted(0, 20 * MIB))
    assert json.loads(output)["size"] == 20 * MIB
    await export(BusSource(caller), tmp_path / "large.db", tasks=[task])
    assert (tmp_path / "large.db").stat().st_size > 20 * MIB
    offline = await Replay.aof(task, Large, log=tmp_path / "large.db")
    assert (await offline.areport()).same is True
    assert (await (await Replay.aof(task, Large, url=shared.url)).areport()).same is True


async def test_an_output_no_message_can_hold_is_fetched(caller: Caller, shared: Running) -> None:
    output, task = await caller.ask("large", wanted(12 * MIB))
    assert len(json.loads(output)["text"]) == 12 * MIB
    plain = await nats.connect(shared.url)
    try:
        reply = await plain.request("dspex.result.large", task.encode(), timeout=30)
        assert reply.headers is not None
        assert reply.headers["Nats-Service-Error-Code"] == "303"
        where = json.loads(reply.data)["object"]
        assert f"nats object get dspex {where['name']}" in reply.headers["Nats-Service-Error"]
        bucket = await plain.jetstream().object_store(where["bucket"])
        found = (await bucket.get(where["name"])).data
        assert found == output
    finally:
        await plain.close()


async def test_what_is_larger_than_an_object_fails_in_words(caller: Caller) -> None:
    with pytest.raises(ProgramFailed, match=r"the output of large has 67,108,8.. bytes; 66,060,288 are allowed"):
        await caller.ask("large", wanted(64 * MIB))


async def test_an_object_that_is_gone_is_named(caller: Caller, shared: Running) -> None:
    output, task = await caller.ask("large", wanted(3 * MIB))
    name = hashlib.sha256(output).hexdigest()
    assert await NatsObjects(caller.client, caller.subjects).delete(name)
    with pytest.raises(NotFound, match=f"TaskCompleted of task {task} names the object {name}, which is not in"):
        await caller.result("large", task)
    report = await (await Replay.aof(task, Large, url=shared.url)).areport()
    assert f"names the object {name}" in report.why


async def test_a_large_effect_survives_the_death_of_its_agent(systems: Launch) -> None:
    system = systems((f"{HERE}:Slow", 1)).start()
    async with await Caller.connect(system.url) as caller:
        task = await caller.submit("slow", b"{}")
        for _ in range(200):
            types = [event["type"] async for event in caller.events(task=task)]
            if "EffectRecorded" in types:
                break
            await asyncio.sleep(0.02)
        for pid in system.below_supervisor()[2:]:  # all but registrar and archivist
            os.kill(pid, signal.SIGKILL)
        assert json.loads(await caller.result("slow", task)) == {"size": 2 * MIB, "grown": 1}
