"""The doors as a Python caller uses them, on a system whose processes die."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator

import pytest
from tests.e2e.conftest import Running, shared
from tests.e2e.running import freeze

from dspex.compose.caller import Caller
from dspex.core.errors import ConnectionFailed, InvalidInput, NotFound, ProgramFailed, TaskError, Unavailable

__all__ = ["shared"]  # a fixture

PLANS = [("Nap", 2), ("Work", 1)]


@pytest.fixture
async def caller(shared: Running) -> AsyncIterator[Caller]:
    """A caller of a system that has got over what the test before did to it."""
    async with await Caller.connect(shared.url) as caller:
        async with asyncio.timeout(60):
            while True:
                try:
                    await caller.read_log(limit=1)
                    await caller.ask("nap", nap(0), timeout=5)
                    await caller.ask("work", b"{}", timeout=5)
                    break
                except TaskError:
                    await asyncio.sleep(0.1)
        yield caller


def nap(n: int, seconds: float = 0.0) -> bytes:
    return json.dumps({"n": n, "seconds": seconds}).encode()


async def test_ask_gives_the_output_and_the_task(caller: Caller) -> None:
    body, task = await caller.ask("nap", nap(1))
    assert json.loads(body)["n"] == 1 and (await caller.result("nap", task)) == body
    assert await caller.program_of(task) == "nap"


async def test_a_refusal_is_the_error_of_its_code(caller: Caller) -> None:
    with pytest.raises(InvalidInput) as refused:
        await caller.ask("nap", b"{}")
    assert refused.value.code == 400 and "n:" in str(refused.value)
    with pytest.raises(ProgramFailed) as failed:
        await caller.ask("work", b'{"do": "raise"}')
    assert (failed.value.type, failed.value.code) == ("ValueError", 500) and failed.value.task


async def test_what_is_not_there(caller: Caller) -> None:
    for name in ("nobody", "a.b", "*", "", "a b"):
        with pytest.raises((NotFound, Unavailable)):
            await caller.ask(name, b"{}")
        with pytest.raises((NotFound, Unavailable)):
            await caller.submit(name, b"{}")
    with pytest.raises(NotFound):
        await caller.result("nap", "999999")
    with pytest.raises(NotFound):
        await caller.program_of("999999")


async def test_a_result_that_is_not_there_in_time_says_so(caller: Caller) -> None:
    task = await caller.submit("nap", nap(1, seconds=2))
    with pytest.raises(TaskError) as early:
        await caller.result("nap", task, timeout=0.1)
    assert early.value.code == 202
    assert json.loads(await caller.result("nap", task))["n"] == 1


async def test_a_result_is_waited_for_over_the_death_of_who_was_to_give_it(shared: Running, caller: Caller) -> None:
    task = await caller.submit("nap", nap(1, seconds=1.0))
    waiting = [asyncio.create_task(caller.result("nap", task)) for _ in range(10)]
    await asyncio.sleep(0.2)
    for pid in shared.below_supervisor()[1:]:
        os.kill(pid, signal.SIGKILL)
    assert {json.loads(body)["n"] for body in await asyncio.gather(*waiting)} == {1}


async def test_a_result_is_waited_for_over_the_death_of_the_server(shared: Running, caller: Caller) -> None:
    task = await caller.submit("nap", nap(1, seconds=0.5))
    waiting = asyncio.create_task(caller.result("nap", task))
    await asyncio.sleep(0.1)
    os.kill(shared.server(), signal.SIGKILL)
    assert json.loads(await waiting)["n"] == 1


async def test_a_submission_that_the_server_did_not_confirm_says_so(shared: Running, caller: Caller) -> None:
    await caller.submit("nap", nap(1))  # it knows now that nothing of it is private
    server = shared.server()
    freeze(server)
    try:
        with pytest.raises(Unavailable, match="try again with a key"):
            await caller.submit("nap", nap(1))
    finally:
        os.kill(server, signal.SIGCONT)


async def test_scores_and_signals_are_stored(caller: Caller) -> None:
    _, task = await caller.ask("nap", nap(1))
    scored = await caller.score("nap", task, 0.5, "fine")
    signalled = await caller.signal("nap", task, "cancel", True)
    assert int(task) < scored < signalled
    types = [event["type"] async for event in caller.events(task=task)]
    assert types[:3] == ["TaskSubmitted", "TaskClaimed", "TaskCompleted"] and {"OutcomeReported", "SignalSent"} <= set(types)


async def test_events_come_page_by_page_and_all(caller: Caller) -> None:
    tasks = [await caller.submit("nap", nap(n)) for n in range(40)]
    for task in tasks:
        await caller.result("nap", task)
    seen = [event["position"] async for event in caller.events(limit=7)]
    assert seen == sorted(seen) and set(map(int, tasks)) <= set(seen)


async def test_everything_that_runs_is_shown_once(caller: Caller) -> None:
    processes = await caller.processes()
    names = [process["agent"] for process in processes]
    assert len(set(names)) == len(names)
    shown = [process.get("role") or process["program"] for process in processes]
    assert shown[:4] == ["root", "server", "supervisor", "registrar"] and shown[-3:] == ["nap", "nap", "work"]


async def test_a_closed_caller_says_so(shared: Running) -> None:
    caller = await Caller.connect(shared.url)
    await caller.close()
    with pytest.raises((ConnectionFailed, Unavailable)):
        await caller.ask("nap", nap(1))
