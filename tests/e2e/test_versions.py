"""Values of a task's own, and code that changes under tasks that are under way."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.plain import Plain, Reply, Story
from tests.e2e.running import Running

from dspex.agents.code import code_of
from dspex.compose.app import load_app

APP = Path(__file__).parent / "forking.py"
PLANS = [(f"{APP}:Trip", 2)]


async def propose(plain: Plain, body: object, who: str = "ada") -> Reply:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Reply(await plain.nc.request("dspex.variables.trip.propose", data, timeout=10, headers={"Dspex-Actor": who}))


# -- values


async def test_a_task_runs_on_values_that_were_proposed(shared: Running, plain: Plain, tmp_path: Path) -> None:
    (book := tmp_path / "book").touch()
    made = await propose(plain, {"values": {"nights": 7}, "why": "a long stay"})
    assert made.code is None and made.json["values"] == {"nights": 7} and made.json["fresh"]
    again = await propose(plain, {"values": {"nights": 7.0}}, who="eve")
    assert (again.json["assignment"], again.json["fresh"]) == (made.json["assignment"], False)
    story = await plain.story()
    proposals = [it["data"] for it in story.events("variables.trip.0") if it["data"]["values"] == {"nights": 7}]
    assert proposals == [
        {"assignment": made.json["assignment"], "values": {"nights": 7}, "who": "ada", "why": "a long stay"}
    ]
    headers = {"Dspex-Assignment": made.json["assignment"]}
    replies = await asyncio.gather(*(plain.ask("trip", {"book": str(book)}, headers=headers) for _ in range(4)))
    assert {len(reply.json["trail"]) for reply in replies} == {4 + 7}
    plainly = await plain.ask("trip", {"book": str(book)})
    assert len(plainly.json["trail"]) == 4 + 2, "other tasks run on the values in force"
    story = await plain.story()
    claims = [it["data"]["assignment"] for it in story.all_of("TaskClaimed")]
    assert claims.count(made.json["assignment"]) == 4
    unknown = await plain.ask("trip", {"book": str(book)}, headers={"Dspex-Assignment": "0" * 32})
    assert unknown.code == 404 and "knows no assignment '000" in str(unknown.error)


async def test_values_that_cannot_be_are_refused(shared: Running, plain: Plain) -> None:
    before = (await plain.story()).types("variables.trip.0")
    for body, code, words in (
        ({"values": {"nights": 99}}, 400, "nights = 99: it must be from 1 to 9"),
        ({"values": {"knights": 9}}, 400, "no such variable, did you mean nights?"),
        ({"values": {"nights": "x"}}, 400, "an integer is due"),
        ({"values": {"nights": [1]}}, 400, "a proposal is"),
        ({"valeus": {}}, 400, "a proposal is"),
        (b"nonsense \xff", 400, "a proposal is"),
        ({"values": {}, "base": "feed"}, 404, "knows no assignment 'feed'"),
    ):  # fmt: skip
        reply = await propose(plain, body)
        assert (reply.code, words in str(reply.error)) == (code, True), (body, reply.error)
    assert (await plain.story()).types("variables.trip.0") == before


async def test_a_task_keeps_its_values_when_its_agent_dies(systems: Callable[..., Running], tmp_path: Path) -> None:
    (book := tmp_path / "book").touch()
    with systems((f"{APP}:Trip", 1)) as system:
        async with await system.plain() as plain:
            made = (await propose(plain, {"values": {"nights": 3}})).json["assignment"]
            headers = {"Dspex-Assignment": made}
            task = await plain.submit("trip", {"book": str(book), "seconds": 0.3}, headers=headers)
            await plain.until(lambda story: "EffectRecorded" in story.types(f"task.trip.{task}"))
            os.kill(system.below_supervisor()[-1], signal.SIGKILL)
            assert len((await plain.final("trip", task)).json["trail"]) == 4 + 3
            story = await plain.story()
            claims = [it["data"] for it in story.events(f"task.trip.{task}") if it["type"] == "TaskClaimed"]
            assert len(claims) == 2 and {claim["assignment"] for claim in claims} == {made}


# -- code

async def test_a_task_is_taken_by_the_code_that_it_names_and_waits_for_any_other(
    shared: Running, plain: Plain, tmp_path: Path
) -> None:
    (book := tmp_path / "book").touch()
    [program] = load_app(f"{APP}:Trip")
    ours = await plain.ask("trip", {"book": str(book)}, headers={"Dspex-Code": code_of(program)})
    assert ours.code is None, "an agent that is started with that very code would have finished it, too"
    other = await plain.submit("trip", {"book": str(book)}, headers={"Dspex-Code": "feedfacefeed"})
    late = await plain.submit("trip", {"book": str(book)}, headers={"Dspex-Code": "feedface", "Dspex-Deadline": "1"})
    reply = await plain.final("trip", late)
    assert reply.code == 408 and "waited for an agent with code feedface" in str(reply.error)
    assert (await plain.result("trip", other, wait="0")).json["state"] == "submitted"
    assert len(book.read_text().splitlines()) == 6
    await plain.store("signal", "trip", {"task": other, "name": "cancel"})
    assert (await plain.final("trip", other)).code == 409


SOURCE = """
from dspex import Program, Schema, effect
@effect
async def fetch(n: int) -> int:
    return n
class Moving(Program):
    on_change = "POLICY"
    drain_time = 2.0
    class Input(Schema):
        n: int
    class Output(Schema):
        n: int
    async def predict(self, input: Input) -> Output:
        first = await fetch(input.n CHANGE)
        await self.signal("go")
        return self.Output(n=100 * first + await fetch(input.n))
"""


@pytest.mark.parametrize("policy", ["finish", "drain"])
async def test_code_that_changes_under_a_waiting_task(
    systems: Callable[..., Running], tmp_path: Path, policy: str
) -> None:
    app, source = tmp_path / "moving.py", SOURCE.replace("POLICY", policy)
    app.write_text(source.replace("CHANGE", ""))
    with systems((f"{app}:Moving", 1)) as system:
        async with await system.plain() as plain:
            tasks = [await plain.submit("moving", {"n": 5}) for _ in range(2)]
            first = await plain.until(lambda s: all("TaskSleeping" in s.types(f"task.moving.{t}") for t in tasks))
    app.write_text(source.replace("CHANGE", "+ 1"))
    with systems((f"{app}:Moving", 1)) as system:
        async with await system.plain() as plain:
            await plain.store("signal", "moving", {"task": tasks[0], "name": "go", "value": 1})
            reply = await plain.final("moving", tasks[0])
            story = await plain.story(first)
            old = claims(story, tasks[0])[0]["code"]
            new = (await plain.discover("STATS.moving", enough=1))[0]["data"]["code"]
            assert old and new and old != new
            if policy == "finish":
                assert reply.json == {"n": 505}
                assert "the record counts" in system.words and f"task {tasks[0]}" in system.words
            else:
                assert reply.code == 500 and reply.error["type"] == "CodeUnavailable"
                assert f"needs code {old} of moving, the agents here run {new}" in reply.error["message"]
                assert f"task {tasks[0]} of moving waits for an agent with code {old}" in system.words
                assert len(claims(story, tasks[0])) == 1, "no other code has begun it"
    if policy != "drain":
        return
    app.write_text(source.replace("CHANGE", ""))
    with systems((f"{app}:Moving", 1)) as system:
        async with await system.plain() as plain:
            await plain.store("signal", "moving", {"task": tasks[1], "name": "go", "value": 1})
            assert (await plain.final("moving", tasks[1])).json == {"n": 505}, "its own code is back"


def claims(story: Story, task: int) -> list[dict[str, Any]]:
    return [it["data"] for it in story.events(f"task.moving.{task}") if it["type"] == "TaskClaimed"]
