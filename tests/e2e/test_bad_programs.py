"""Programs that misbehave: a clear error with the right code, the task ends in the log, and nobody else waits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from tests.e2e.plain import Plain, Reply
from tests.e2e.running import Running

PLANS = [("Work", 2), ("Thread", 2)]

KIND = pytest.mark.parametrize("program", ["work", "thread"])

MISBEHAVIOURS: dict[str, tuple[int, str, str]] = {
    "raise": (500, "ValueError", "raised ValueError"),
    "surrogate": (500, "ValueError", "raised ValueError"),
    "refuse": (400, "InvalidInput", "the text is not one of mine"),
    "missing": (404, "NotFound", "there is no such page"),
    "fail": (500, "Mood", "the model is not in the mood"),
    "cancel": (500, "CancelledError", "raised CancelledError"),
    "stop": (500, "", "raised"),
    "leave": (500, "SystemExit", "raised SystemExit"),
    "nothing": (500, "ProgramFailed", "nothing"),
    "wrong": (500, "ProgramFailed", "Output"),
    "other": (500, "ProgramFailed", "Output"),
    "large": (500, "ProgramFailed", "bytes"),
    "never": (408, "DeadlineExceeded", "not done"),
}  # fmt: skip


@KIND
@pytest.mark.parametrize("do", MISBEHAVIOURS)
async def test_it_is_answered_with_the_right_code_and_words(plain: Plain, program: str, do: str) -> None:
    code, kind, word = MISBEHAVIOURS[do]
    reply = await plain.ask(program, {"do": do, "text": "hunter2"})
    assert reply.code == code
    assert reply.error["type"] == (kind or reply.error["type"]) and word in reply.error["message"]
    assert reply.error["task"] == reply.task
    await check_ended(plain, program, int(reply.task), reply)


async def check_ended(plain: Plain, program: str, task: int, reply: Reply) -> dict[str, Any]:
    """One TaskFailed in the log, in the same words; `result` says the same; the agent goes on."""
    story = await plain.until_ended(program, [task])
    assert story.types(f"task.{program}.{task}")[-1] == "TaskFailed"
    data: dict[str, Any] = story.events(f"task.{program}.{task}")[-1]["data"]
    assert (data["code"], data["type"], data["message"]) == (reply.code, reply.error["type"], reply.error["message"])
    again = await plain.result(program, task)
    assert (again.code, again.error) == (reply.code, reply.error)
    assert (await plain.ask(program, {"text": "on"})).json["text"] == "on"
    return data


@KIND
async def test_what_the_exception_says_is_in_the_log_and_not_in_the_reply(plain: Plain, program: str) -> None:
    reply = await plain.ask(program, {"do": "raise", "text": "hunter2"})
    everything = reply.body.decode() + str(reply.headers)
    assert "hunter2" not in everything and "Traceback" not in everything and ".py" not in everything
    data = await check_ended(plain, program, int(reply.task), reply)
    assert "hunter2" in data["detail"] and "programs.py:" in data["detail"]


@KIND
async def test_an_endless_message_is_cut(plain: Plain, program: str) -> None:
    reply = await plain.ask(program, {"do": "shout", "text": "x" * 1000})
    assert reply.code == 500 and 1000 < len(reply.error["message"]) < 5000
    await check_ended(plain, program, int(reply.task), reply)


@KIND
async def test_others_go_on_while_one_never_returns(plain: Plain, program: str) -> None:
    stuck = await plain.submit(program, {"do": "never"})
    for n in range(20):
        assert (await plain.ask(program, {"text": str(n)})).json["text"] == str(n)
    story = await plain.story()
    assert stuck not in story.endings(program)
    assert (await plain.result(program, stuck)).code == 408


@KIND
async def test_a_deadline_ends_a_task_before_the_programs_own_timeout(plain: Plain, program: str) -> None:
    reply = await plain.ask(program, {"do": "never"}, {"Dspex-Deadline": "0.3"})
    assert reply.code == 408
    seconds = float(reply.error["message"].split()[-2])
    assert seconds < 1.9, reply.error


@KIND
async def test_one_that_exits_the_process_is_set_aside_after_its_attempts(plain: Plain, program: str) -> None:
    task = await plain.submit(program, {"do": "exit"})
    reply = await plain.final(program, task)
    assert reply.code == 500 and reply.error["type"] == "TaskDeadLettered"
    story = await plain.until_ended(program, [task])
    types = story.types(f"task.{program}.{task}")
    assert types[-1] == "TaskDeadLettered" and types.count("AttemptDied") >= 3
    reason = story.events(f"task.{program}.{task}")[-1]["data"]["reason"]
    assert "exit 3 (3 times) with nothing else in its process" in reason
    assert (await plain.ask(program, {"text": "on"})).json["text"] == "on"


@KIND
async def test_the_neighbours_of_one_that_exits_the_process_complete(plain: Plain, program: str) -> None:
    """They die with it each time, but not of it."""
    before = [await plain.submit(program, {"text": "before", "seconds": 0.2}) for _ in range(4)]
    poison = await plain.submit(program, {"do": "exit"})
    after = [await plain.submit(program, {"text": "after", "seconds": 0.2}) for _ in range(4)]
    story = await plain.until_ended(program, [*before, poison, *after])
    endings = story.endings(program)
    assert endings[poison] == ["TaskDeadLettered"]
    assert {task: endings[task] for task in before + after} == {task: ["TaskCompleted"] for task in before + after}


async def test_an_ask_of_one_that_exits_the_process_is_answered(plain: Plain) -> None:
    reply = await plain.ask("work", {"do": "exit"}, timeout=60)
    assert reply.code == 500 and reply.error["type"] == "TaskDeadLettered"


async def test_one_that_blocks_the_event_loop_ends_and_its_process_is_replaced(
    shared: Running, plain: Plain
) -> None:
    before = await shared.agents(plain, "work")
    crashes = len((await plain.story()).all_of("AgentCrashed"))
    task = await plain.submit("work", {"do": "block"})
    others = [await plain.submit("work", {"text": "other"}) for _ in range(20)]
    story = await plain.until_ended("work", others)
    assert task not in story.endings("work"), "the others had to wait for it"
    reply = await plain.final("work", task)
    assert reply.code == 408 and reply.error["type"] == "DeadlineExceeded"
    data = (await plain.until_ended("work", [task])).events(f"task.work.{task}")[-1]["data"]
    assert "programs.py" in data["detail"]
    await plain.until(lambda story: len(story.all_of("AgentCrashed")) > crashes)
    await until_replaced(shared, plain, "work", before)


async def until_replaced(shared: Running, plain: Plain, program: str, before: dict[str, int]) -> None:
    for _ in range(1000):
        now = await shared.agents(plain, program)
        if now != before:
            assert set(now) == set(before)
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"{before} is still {now}")


async def test_asks_are_answered_by_others_while_one_agent_is_blocked(plain: Plain) -> None:
    """The blocked one still has its place in the queue group; it has to lose it soon."""
    task = await plain.submit("work", {"do": "block"})
    await asyncio.sleep(1.5)  # the loop counts as blocked after a second
    answers = await asyncio.gather(*(plain.ask("work", {"text": "x"}, timeout=20) for _ in range(20)))
    assert all(answer.json["text"] == "x" for answer in answers)
    assert (await plain.final("work", task)).code == 408


@pytest.mark.parametrize(("program", "do"), [("work", "stubborn"), ("thread", "never")])
async def test_an_agent_with_a_run_that_cannot_be_stopped_is_replaced(
    shared: Running, plain: Plain, program: str, do: str
) -> None:
    before = await shared.agents(plain, program)
    crashes = len((await plain.story()).all_of("AgentCrashed"))
    assert (await plain.ask(program, {"do": do})).code == 408
    await until_replaced(shared, plain, program, before)
    assert (await plain.ask(program, {"text": "on"})).json["text"] == "on"
    story = await plain.story()
    assert len(story.all_of("AgentCrashed")) == crashes, "being replaced is no crash"
    assert any("cannot be stopped" in event["data"]["reason"] for event in story.all_of("AgentStopped"))


async def test_what_runs_beside_a_run_that_cannot_be_stopped_is_not_cut_off(
    systems: Callable[..., Running],
) -> None:
    with systems(("Thread", 1)) as system:
        async with await system.plain() as plain:
            stuck = await plain.submit("thread", {"do": "never"}, {"Dspex-Deadline": "0.5"})
            others = [await plain.submit("thread", {"text": "x", "seconds": 1.0}) for _ in range(4)]
            story = await plain.until_ended("thread", [stuck, *others])
            assert [story.endings("thread")[task] for task in others] == [["TaskCompleted"]] * 4
            claims = [event["data"]["attempt"] for event in story.all_of("TaskClaimed")]
            assert claims == [1] * 5
