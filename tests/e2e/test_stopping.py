"""Cancellations and deadlines reach what is under way; retries of effects are counted in the log."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.conftest import Launch
from tests.e2e.plain import Plain, Story
from tests.e2e.running import Running

APP = Path(__file__).parent / "stopping.py"
PLANS = [(f"{APP}:Loop", 1), (f"{APP}:Thread", 1)]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    file = tmp_path / "book"
    file.touch()
    return file


def noted(book: Path, word: str = "") -> list[str]:
    return [line for line in book.read_text().splitlines() if line.startswith(word)]


async def until_noted(book: Path, word: str, times: int = 1) -> list[str]:
    for _ in range(6000):
        if len(found := noted(book, word)) >= times:
            return found
        await asyncio.sleep(0.01)
    raise AssertionError(f"no {times} times {word} in {noted(book)}")


async def cancel(plain: Plain, program: str, task: int) -> None:
    await plain.store("signal", program, {"task": task, "name": "cancel", "value": "no need"})


def data_of(story: Story, aggregate: str, kind: str) -> list[dict[str, Any]]:
    return [event["data"] for event in story.events(aggregate) if event["type"] == kind]


# -- cancelled


@pytest.mark.parametrize(
    ("program", "do", "notices"),
    [("loop", "slow", "cancelled"), ("loop", "plain", "told"), ("thread", "plain", "told"), ("thread", "look", "told")],
)
async def test_a_cancelled_task_is_told_wherever_it_is(
    shared: Running, plain: Plain, book: Path, program: str, do: str, notices: str
) -> None:
    task = await plain.submit(program, {"book": str(book), "do": do})
    [began] = await until_noted(book, "began")
    await cancel(plain, program, task)
    assert (await until_noted(book, notices))[0].endswith("True")
    reply = await plain.final(program, task)
    assert (reply.code, reply.error["type"]) == (409, "TaskCancelled")
    if do != "look":
        story = await plain.until(lambda s: s.types(f"dlq.{program}.{task}"))
        [told] = data_of(story, f"dlq.{program}.{task}", "EffectsInterrupted")
        [effect] = told["effects"]
        assert (effect["name"], effect["idempotency_key"]) == (do, began.split()[1])
        assert not noted(book, "after"), "an effect's end is not the end of a cancelled program"
    story = await plain.story()
    assert story.endings(program)[task] == ["TaskCancelled"]


async def test_the_connection_of_a_cancelled_request_is_closed(shared: Running, plain: Plain, book: Path) -> None:
    asked, closed = asyncio.Event(), asyncio.Event()

    async def never(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await reader.read()
        closed.set()
        writer.close()

    server = await asyncio.start_server(never, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        task = await plain.submit("loop", {"book": str(book), "do": "http", "url": url})
        await asyncio.wait_for(asked.wait(), 60)
        await cancel(plain, "loop", task)
        await asyncio.wait_for(closed.wait(), 40)  # the request itself would take 45 s
    assert (await plain.final("loop", task)).code == 409


@pytest.mark.parametrize("do", ["raise", "flaky"])
async def test_one_that_waits_for_its_retry_is_cancelled(shared: Running, plain: Plain, book: Path, do: str) -> None:
    task = await plain.submit("loop", {"book": str(book), "do": do})
    kind = "TaskRetried" if do == "raise" else "TaskSleeping"
    await plain.until(lambda s: kind in s.types(f"task.loop.{task}"))
    await cancel(plain, "loop", task)
    assert (await plain.final("loop", task)).code == 409


# -- out of time


@pytest.mark.parametrize("do", ["slow", "plain", "sleep", "signal"])
async def test_the_deadline_ends_a_task_wherever_it_is(shared: Running, plain: Plain, book: Path, do: str) -> None:
    task = await plain.submit("loop", {"book": str(book), "do": do}, {"Dspex-Deadline": "1.5"})
    reply = await plain.final("loop", task)
    assert (reply.code, reply.error["type"]) == (408, "DeadlineExceeded")
    story = await plain.until_ended("loop", [task])
    assert story.endings("loop")[task] == ["TaskFailed"]
    assert not noted(book, "after")
    if noted(book, "began"):
        story = await plain.until(lambda s: s.types(f"dlq.loop.{task}"))
        assert data_of(story, f"dlq.loop.{task}", "EffectsInterrupted")


async def test_one_that_is_over_before_its_turn_does_nothing(shared: Running, plain: Plain, book: Path) -> None:
    before = [await plain.submit("loop", {"book": str(book), "do": "nap"}) for _ in range(2)]  # all the slots
    late = await plain.submit("loop", {"book": str(book), "do": "slow"}, {"Dspex-Deadline": "0.5"})
    story = await plain.until_ended("loop", [*before, late])
    assert story.endings("loop")[late] == ["TaskFailed"] and not noted(book, "began")


@pytest.mark.parametrize("do", ["raise", "patient"])
async def test_no_retry_is_planned_beyond_the_deadline(shared: Running, plain: Plain, book: Path, do: str) -> None:
    task = await plain.submit("loop", {"book": str(book), "do": do}, {"Dspex-Deadline": "45"})
    reply = await plain.final("loop", task)
    assert (reply.code, reply.error["type"]) == (500, "KeyError" if do == "raise" else "ConnectionError")


async def test_a_called_program_has_the_callers_deadline(shared: Running, plain: Plain, book: Path) -> None:
    task = await plain.submit("loop", {"book": str(book), "do": "call"}, {"Dspex-Deadline": "6"})
    await until_noted(book, "told")
    assert (await plain.final("loop", task)).code == 408
    story = await plain.story()
    [called] = [
        entry for entry in story.entries
        if entry.subject == "dspex.task.thread" and entry.headers.get("Dspex-Parent") == str(task)
    ]  # fmt: skip
    assert "Dspex-Deadline" in called.headers
    assert story.endings("thread").get(called.position, ["TaskFailed"])[0] in ("TaskFailed", "TaskCancelled")


async def test_a_suspect_that_waits_to_be_alone_ends_at_its_deadline(systems: Launch, book: Path) -> None:
    with systems(PLANS[0]) as system:
        async with await system.plain() as plain:
            suspect = await plain.submit("loop", {"book": str(book), "do": "die"}, {"Dspex-Deadline": "8"})
            await plain.until(lambda s: suspect in s.endings("loop") or _deaths(s) >= 3)
            beside = await plain.submit("loop", {"book": str(book), "do": "slow"}, {"Dspex-Deadline": "7"})
            reply = await plain.final("loop", suspect)
            assert (reply.code, reply.error["type"]) == (408, "DeadlineExceeded")
            story = await plain.until_ended("loop", [suspect, beside], patience=120)
            assert story.endings("loop")[suspect] == ["TaskFailed"]


def _deaths(story: Story) -> int:
    return sum(event["type"] == "AgentCrashed" for entry in story.entries for event in entry.events)


# -- tried again


async def test_the_tries_of_an_effect_go_on_after_a_crash(systems: Launch, book: Path) -> None:
    with systems(PLANS[0]) as system:
        async with await system.plain() as plain:
            task = await plain.submit("loop", {"book": str(book), "do": "flaky"})
            await plain.until(lambda s: "TaskSleeping" in s.types(f"task.loop.{task}"))
            [pid] = (await system.agents(plain, "loop")).values()
            os.kill(pid, signal.SIGKILL)
            reply = await plain.final("loop", task, patience=120)
            assert (reply.code, reply.error["type"]) == (500, "ConnectionError")
            story = await plain.story()
            tries = data_of(story, f"task.loop.{task}", "EffectRetried")
            assert [(it["retry"], it["type"]) for it in tries] == [(n, "ConnectionError") for n in (1, 2)]
            assert len(noted(book)) == 3 and len(set(noted(book))) == 1, "one key for all tries"


async def test_an_error_that_says_when_is_not_tried_before(shared: Running, plain: Plain, book: Path) -> None:
    task = await plain.submit("loop", {"book": str(book), "do": "busy"})
    assert (await plain.final("loop", task)).json["said"] == "busy"
    first, second = (float(line.split()[1]) for line in await until_noted(book, "try", 2))
    assert second - first >= 1.9
