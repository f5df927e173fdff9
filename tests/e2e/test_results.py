"""The result door, and what else can be asked about a task."""

from __future__ import annotations

import asyncio
import json

from tests.e2e.plain import Plain

PLANS = [("Nap", 2), ("Work", 1)]


async def test_a_result_is_found_by_id_in_every_form(plain: Plain) -> None:
    task = await plain.submit("nap", {"n": 1})
    for form in (f"{task}", f'"{task}"', f'{{"task": {task}}}', f'{{"task": "{task}"}}', f" {task}\n"):
        reply = await plain.result("nap", form)
        assert (reply.json["n"], reply.task) == (1, str(task))


async def test_a_result_is_found_by_key_in_every_form(plain: Plain) -> None:
    task = await plain.submit("nap", {"n": 2}, {"Dspex-Key": "order ü 7"})
    await plain.until_ended("nap", [task])
    for form in ("order ü 7", '"order ü 7"', '{"key": "order ü 7"}'):
        reply = await plain.result("nap", form)
        assert (reply.json["n"], reply.task) == (2, str(task))


async def test_a_key_made_of_digits_is_found_when_it_is_called_a_key(plain: Plain) -> None:
    task = await plain.submit("nap", {"n": 3}, {"Dspex-Key": "20261123"})
    await plain.until_ended("nap", [task])
    assert (await plain.result("nap", '{"key": "20261123"}')).task == str(task)


async def test_a_result_waits_for_the_task(plain: Plain) -> None:
    task = await plain.submit("nap", {"n": 4, "seconds": 0.5})
    assert (await plain.result("nap", task)).json["n"] == 4


async def test_a_result_that_is_not_there_yet_says_how_the_task_stands(plain: Plain) -> None:
    task = await plain.submit("nap", {"n": 5, "seconds": 1.0})
    reply = await plain.result("nap", task, wait="0.05")
    assert reply.code == 202 and reply.task == str(task)
    assert reply.json == {"task": str(task), "state": "submitted"}
    assert (await plain.result("nap", task)).code is None


async def test_the_result_of_a_failed_task_is_its_error(plain: Plain) -> None:
    task = await plain.submit("nap", {"n": "one"})
    reply = await plain.result("nap", task)
    assert (reply.code, reply.task) == (400, str(task))
    assert reply.error["task"] == str(task) and "n:" in reply.error["message"]


async def test_a_task_of_another_program_is_not_found(plain: Plain) -> None:
    task = await plain.submit("work", {"text": "a"})
    await plain.result("work", task)
    assert (await plain.result("nap", task)).code == 404


async def test_many_wait_for_one_result(plain: Plain) -> None:
    task = await plain.submit("nap", {"n": 6, "seconds": 0.5})
    replies = await asyncio.gather(*(plain.result("nap", task) for _ in range(50)))
    assert {reply.body for reply in replies} == {replies[0].body} and replies[0].json["n"] == 6


async def test_an_ask_names_its_task_and_its_result_is_found_again(plain: Plain) -> None:
    reply = await plain.ask("nap", {"n": 7})
    assert (await plain.result("nap", reply.task)).json == reply.json


async def test_a_task_is_scored_before_and_after_it_ends_and_more_than_once(plain: Plain) -> None:
    task = await plain.submit("nap", {"n": 8, "seconds": 0.3})
    for score in (0.25, 0.75):
        await plain.store("outcome", "nap", {"task": task, "score": score})
        await plain.result("nap", task)
    events = (await plain.read(task=task))["events"]
    scores = [event["data"]["outcome"]["score"] for event in events if event["type"] == "OutcomeReported"]
    assert scores == [0.25, 0.75]


async def test_an_outcome_that_is_rubbish_is_kept_and_harms_nothing(plain: Plain) -> None:
    task = await plain.submit("nap", {"n": 9})
    for body in (b"rubbish", b"\xff", b"[]", json.dumps({"task": task, "score": "NaN"}).encode(), b"[" * 100_000):
        await plain.store("outcome", "nap", body)
    assert (await plain.result("nap", task)).json["n"] == 9
    types = [event["type"] for event in (await plain.read(task=task))["events"]]
    assert sorted(types) == ["OutcomeReported", "TaskClaimed", "TaskCompleted", "TaskSubmitted"]


async def test_headers_arrive_in_the_log_whatever_their_case(plain: Plain) -> None:
    task = await plain.submit("nap", {"n": 10}, {"dspex-key": "case", "DSPEX-ACTOR": "somebody", "traceparent": "00-1"})
    await plain.until_ended("nap", [task])
    assert (await plain.result("nap", '{"key": "case"}')).task == str(task)
    submitted = (await plain.read(task=task))["events"][0]
    assert submitted["source"] == "somebody"
    assert submitted["data"]["headers"] == {"Dspex-Key": "case", "Dspex-Actor": "somebody", "traceparent": "00-1"}


async def test_a_tail_waits_for_something_new(plain: Plain) -> None:
    head = (await plain.read("head"))["head"]
    waiting = asyncio.create_task(plain.read("tail", after=head))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    task = await plain.submit("nap", {"n": 11})
    page = await waiting
    assert page["events"][0]["position"] == task and page["events"][0]["type"] == "TaskSubmitted"


async def test_the_log_of_one_program_has_nothing_of_another(plain: Plain) -> None:
    mine, other = await plain.submit("nap", {"n": 12}), await plain.submit("work", {"text": "a"})
    await plain.until_ended("nap", [mine])
    await plain.until_ended("work", [other])
    positions = set()
    after = 0
    while True:
        page = await plain.read(program="nap", after=after, limit=50)
        positions |= {event["position"] for event in page["events"]}
        assert all(".nap." in event["aggregate"] for event in page["events"])
        if page["next"] >= page["head"]:
            break
        after = page["next"]
    assert mine in positions and other not in positions
