"""Dead letters: listed, shown, retried once with what they recorded, dropped; on a running system and in a file."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.plain import Plain, Reply
from tests.e2e.running import Running

from dspex.console import main

APP = Path(__file__).parent / "failing.py"
PLANS = [(f"{APP}:Letter", 2), (f"{APP}:Sealed", 1)]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    return tmp_path / "book"


def cure(book: Path) -> None:
    Path(f"{book}.antidote").touch()


def lines(book: Path, word: str) -> list[str]:
    return [line for line in book.read_text().splitlines() if line.startswith(word)]


def run(system: Running, *command: str, code: int = 0) -> list[dict[str, Any]]:
    """What `dspex dlq …` prints as JSON."""
    place = [] if "--log" in command else ["--nats", system.url]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        found = main.run(["dlq", *command, "--json", "--data", str(system.data), *place])
    assert found == code, printed.getvalue()
    return [json.loads(line) for line in printed.getvalue().splitlines()]


async def dlq(system: Running, *command: str, code: int = 0) -> list[dict[str, Any]]:
    return await asyncio.to_thread(lambda: run(system, *command, code=code))


async def retried(plain: Plain, body: bytes) -> Reply:
    return Reply(await plain.nc.request("dspex.dlq.letter.retry", body, timeout=60))


async def dead(plain: Plain, book: Path, **more: object) -> int:
    task = await plain.submit("letter", {"book": str(book), **more})
    assert (await plain.final("letter", task, patience=120)).code == 500
    return task


async def test_a_retry_goes_on_with_what_was_recorded_and_runs_once(shared: Running, plain: Plain, book: Path) -> None:
    key = f"key {book}"
    task = await plain.submit("letter", {"book": str(book)}, {"Dspex-Key": key})
    reply = await plain.final("letter", task, patience=120)
    assert (reply.code, reply.error["type"]) == (500, "TaskDeadLettered") and "exit 9" in reply.error["message"]
    [found] = [it for it in await dlq(shared, "ls", "letter") if it["task"] == str(task)]
    assert (found["state"], found["retried"], found["deaths"] >= 2) == ("dead", None, True)
    assert found["agent"].startswith("letter-") and found["input"]["book"] == str(book)

    cure(book)
    [first] = await dlq(shared, "retry", str(task))
    body = json.dumps({"task": task}).encode()
    again = await asyncio.gather(*(retried(plain, body) for _ in range(3)))
    assert first["fresh"] and [it.json["retried"] for it in again] == [first["retried"]] * 3
    for name in (str(task), json.dumps(key), first["retried"]):
        answer = await plain.final("letter", name)
        assert (answer.code, answer.json["said"], answer.task) == (None, "cured", first["retried"])
    assert len(lines(book, "paid")) == 1, "what was recorded is not done again"
    assert len(set(lines(book, "deadly"))) == 1, "what was under way has the same idempotency key"
    story = await plain.until_ended("letter", [int(first["retried"])])
    assert story.types(f"dlq.letter.{task}") == ["TaskResubmitted"]
    [found] = [it for it in await dlq(shared, "ls", "letter") if it["task"] == str(task)]
    assert found["retried"] == first["retried"]


async def test_a_clean_retry_begins_anew_with_keys_of_its_own(shared: Running, plain: Plain, book: Path) -> None:
    task = await dead(plain, book, do="down")
    cure(book)
    [made] = await dlq(shared, "retry", str(task), "--clean")
    assert (await plain.final("letter", made["retried"])).json["said"] == "up"
    assert len(set(lines(book, "paid"))) == 2 and len(set(lines(book, "down"))) == 2


async def test_a_retry_may_set_input_and_variables(shared: Running, plain: Plain, book: Path) -> None:
    task = await dead(plain, book, do="raise")
    [made] = await dlq(shared, "retry", str(task), "--set", "input.do=sung", "--set", "style=full")
    answer = await plain.final("letter", made["retried"])
    assert (answer.json["said"], answer.json["style"]) == ("sung", "full")
    [refused] = await dlq(shared, "retry", str(task), "--set", "input.nothing=1", code=1)
    assert refused["error"]["code"] == 400


async def test_what_failed_after_its_retries_is_one_too_and_what_failed_is_done_again(
    shared: Running, plain: Plain, book: Path
) -> None:
    task = await dead(plain, book, do="down")
    assert str(task) not in [it["task"] for it in await dlq(shared, "ls", "letter")]
    [found] = [it for it in await dlq(shared, "ls", "letter", "--failed") if it["task"] == str(task)]
    assert (found["state"], found["retries"], found["type"]) == ("failed", 1, "ConnectionError")
    cure(book)
    [made] = await dlq(shared, "retry", str(task))
    assert (await plain.final("letter", made["retried"])).json["said"] == "up"
    assert len(lines(book, "paid")) == 1 and len(lines(book, "down")) == 3 and len(set(lines(book, "down"))) == 1


async def test_a_dropped_one_leaves_the_list_and_the_log_says_who_and_why(
    shared: Running, plain: Plain, book: Path
) -> None:
    task = await dead(plain, book, do="down")
    assert str(task) in [it["task"] for it in await dlq(shared, "ls", "--failed")]
    [done] = await dlq(shared, "drop", str(task), "--why", "nobody wants it")
    [again] = await dlq(shared, "drop", str(task), "--why", "really nobody")
    assert (done["fresh"], again["fresh"]) == (True, False)
    assert str(task) not in [it["task"] for it in await dlq(shared, "ls", "--failed")]
    [found] = [it for it in await dlq(shared, "ls", "--failed", "--all") if it["task"] == str(task)]
    assert found["dropped"].endswith("nobody wants it")
    story = await plain.story()
    [event] = story.events(f"dlq.letter.{task}")
    assert event["type"] == "TaskDropped" and event["data"]["actor"]


async def test_only_who_ended_without_an_output_is_retried_or_dropped(
    shared: Running, plain: Plain, book: Path
) -> None:
    cure(book)
    good = await plain.submit("letter", {"book": str(book)})
    await plain.final("letter", good)
    for command in (("retry", str(good)), ("drop", str(good), "--why", "x"), ("retry", "999999999")):
        [refused] = await dlq(shared, *command, code=1)
        assert refused["error"]["code"] == (404 if "999999999" in command else 409)
    assert (await retried(plain, b'{"task": 1, "tsk": 2}')).code == 400


async def test_the_history_names_every_attempt_and_how_it_ended(shared: Running, plain: Plain, book: Path) -> None:
    task = await dead(plain, book)
    [found] = await dlq(shared, "show", str(task))
    ends = [it["end"] for it in found["attempts"]]
    assert set(ends) <= {"exit 9", "lost"} and ends.count("exit 9") >= 2
    assert any(it["alone"] for it in found["attempts"]) and found["attempts"][0]["effects"] == 1
    assert [event["type"] for event in found["events"]][-1] == "TaskDeadLettered"
    await dlq(shared, "drop", str(task), "--why", "it would kill again")
    raised = await dead(plain, book, do="raise")
    [found] = await dlq(shared, "show", str(raised))
    assert [(it["end"], it["where"]) for it in found["attempts"]] == [("500 ProgramFailed", "it is not to be")]


async def test_a_private_input_is_not_shown_and_a_retry_has_it(shared: Running, plain: Plain, book: Path) -> None:
    task = await plain.submit("sealed", {"name": "Rumpelstilzchen", "book": str(book)})
    assert (await plain.final("sealed", task, patience=120)).code == 500
    told = [*await dlq(shared, "ls", "sealed"), *await dlq(shared, "show", str(task))]
    assert "Rumpelstilzchen" not in json.dumps(told)
    cure(book)
    [made] = await dlq(shared, "retry", str(task))
    assert (await plain.final("sealed", made["retried"])).json["said"] == "Rumpelstilzchen cured"


async def test_all_of_a_program_are_retried_at_once_and_a_file_is_read_without_a_system(
    shared: Running, plain: Plain, book: Path
) -> None:
    task = await dead(plain, book, do="down")
    cure(book)
    made = {it["task"]: it["retried"] for it in await dlq(shared, "retry", "--all", "letter", "--failed")}
    assert str(task) in made
    assert (await plain.final("letter", made[str(task)])).json["said"] == "up"
    assert made.keys().isdisjoint(it["task"] for it in await dlq(shared, "retry", "--all", "letter", "--failed"))
    file = shared.log_file or shared.data / "archive.db"
    for _ in range(300):
        offline = {it["task"]: it["retried"] for it in await dlq(shared, "ls", "letter", "--failed", "--log", str(file))}
        if made.items() <= offline.items():
            break
        await asyncio.sleep(0.1)
    assert made.items() <= offline.items()
    [shown] = await dlq(shared, "show", str(task), "--log", str(file))
    assert shown["retried"] == made[str(task)]
