"""Dead letters under access rules: deaths are found there too, and everybody has a hand in their own tasks only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.guarded import connect, identities
from tests.e2e.plain import Plain, Reply
from tests.e2e.running import Running

from dspex.core.access import Role

APP = f"{Path(__file__).parent / 'poisonous.py'}:Careful"


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("letters") / "data"
    identities(data, "alice", "bob")
    with Running(data, (APP, 1), secure=True) as system:
        yield system


async def _asked(client: Plain, verb: str, task: int, **more: object) -> Reply:
    body = json.dumps({"task": task, "actor": "mallory", **more}).encode()
    return Reply(await client.nc.request(f"dspex.dlq.careful.{verb}", body, timeout=60))


async def test_a_client_retries_and_drops_its_own_and_nobody_elses(system: Running) -> None:
    own = identities(system.data)
    async with (
        await connect(system.url, own.context(Role.CLIENT, "alice")) as alice,
        await connect(system.url, own.context(Role.CLIENT, "bob")) as bob,
        await connect(system.url, own.context(Role.CONSOLE)) as console,
    ):
        task = await alice.submit("careful", {"n": 1, "do": "exit"})
        reply = await alice.final("careful", task, patience=120)
        assert (reply.code, reply.error["type"]) == (500, "TaskDeadLettered")
        assert "with nothing else in its process" in reply.error["message"], "the deaths could be read"
        for verb in ("retry", "drop"):
            assert (await _asked(bob, verb, task, why="mine now")).code == 404
        refused = await _asked(alice, "retry", task, set={"n": 5})
        assert refused.code == 400 and "only the console" in refused.error["message"]
        made = (await _asked(alice, "retry", task, set={"input.do": ""})).json
        answer = await alice.final("careful", task)
        assert (answer.json, answer.task) == ({"n": 1}, made["retried"])
        assert (await bob.final("careful", made["retried"])).code == 404, "the new one is alice's, too"
        assert (await _asked(console, "drop", task, why="seen to")).json["fresh"] is True
        story = await console.nc.request("dspex.log.read", json.dumps({"task": task}).encode(), timeout=60)
        [again, dropped] = json.loads(story.data)["events"][-2:]
        assert (again["type"], again["data"]["actor"]) == ("TaskResubmitted", "CLIENT_alice"), "proven, not claimed"
        assert (dropped["type"], dropped["data"]["actor"]) == ("TaskDropped", "CONSOLE")
