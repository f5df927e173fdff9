"""Forks, live: what is shared is not done again, what comes after is done once, and the parent stays as it is."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.plain import Plain, Story
from tests.e2e.running import Running, until

from dspex import InvalidInput, NotFound, Replay, adiff, afork
from dspex.compose.app import load_app

APP = Path(__file__).parent / "forking.py"
PLANS = [(f"{APP}:Trip", 2)]
ENDED = {"TaskCompleted", "TaskFailed", "TaskDeadLettered"}
AFTER_BRIDGE = 4
"""The version of a trip's last event before its sides."""


class Book:
    """What the effects wrote down."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    @property
    def lines(self) -> list[tuple[str, str]]:
        """Place and idempotency key."""
        return [(line.split()[0], line.split()[1]) for line in self.path.read_text().splitlines()]

    def since(self, before: list[tuple[str, str]]) -> dict[str, int]:
        """What was done since then, and how often; no place under two keys, or under one that was there before."""
        new = self.lines[len(before) :]
        assert not {key for _, key in new} & {key for _, key in before}, "a fork has keys of its own"
        keys = {(place, key) for place, key in new}
        assert len(keys) == len({place for place, _ in new}), "an effect was done under two keys"
        return Counter(place for place, _ in new)


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "book")


async def bytes_of(plain: Plain, task: int) -> list[tuple[int, bytes]]:
    """Everything that the log has of a task, byte for byte."""
    story = await plain.story()
    return [
        (it.position, it.body) for it in story.entries
        if it.position == task or it.subject == f"dspex.event.task.trip.{task}"
    ]  # fmt: skip


async def ended(plain: Plain, task: int) -> Any:
    reply = await plain.final("trip", task)
    assert reply.code is None, reply.error
    return reply.json


def dspex(*arguments: object, url: str, check: int = 0) -> Any:
    """What a command prints with --json."""
    done = subprocess.run(command(*arguments, url=url), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == check, done.stdout + done.stderr
    return json.loads(done.stdout)


def command(*arguments: object, url: str) -> list[str]:
    return [sys.executable, "-m", "dspex", *map(str, arguments), "--json", "--nats", url]


async def run(*arguments: object, url: str, check: int = 0) -> Any:
    return await asyncio.to_thread(dspex, *arguments, url=url, check=check)


@pytest.mark.parametrize(
    ("at", "values", "again", "trail"),
    [
        (9, {}, [], ["gate in Rome", "bridge in any", "side0 in Rome", "side1 in Rome", "night0 in Rome", "night1 in Rome"]),
        (AFTER_BRIDGE, {"nights": 1, "input.city": "Oslo"}, ["side0", "side1", "night0"],
         ["gate in Rome", "bridge in any", "side0 in Oslo", "side1 in Oslo", "night0 in Oslo"]),
        (9, {"nights": 3}, ["night2"],
         ["gate in Rome", "bridge in any", "side0 in Rome", "side1 in Rome", "night0 in Rome", "night1 in Rome", "night2 in Rome"]),
        (0, {"nights": 1}, ["gate", "bridge", "side0", "side1", "night0"],
         ["gate in Rome", "bridge in any", "side0 in Rome", "side1 in Rome", "night0 in Rome"]),
    ],
)  # fmt: skip
async def test_a_completed_task_goes_on_otherwise(
    shared: Running, plain: Plain, book: Book, at: int, values: dict[str, Any], again: list[str], trail: list[str]
) -> None:
    parent = await plain.submit("trip", {"book": str(book.path)})
    output = await ended(plain, parent)
    before, theirs = await bytes_of(plain, parent), book.lines
    assert len(theirs) == 6
    made = await afork(parent, at=at, values=values, url=shared.url, wait=30)
    assert made.output["trail"] == trail
    assert book.since(theirs) == dict.fromkeys(again, 1)
    if at:
        assert (made.output["drawn"], made.output["began"]) == (output["drawn"], output["began"])
    assert await bytes_of(plain, parent) == before
    story = await plain.story()
    story.check_versions()
    events = story.events(f"task.trip.{made.task}")
    assert events[0]["type"] == "TaskForked" and events[0]["data"]["parent"] == str(parent)
    assert story.types(f"task.trip.{made.task}").count("EffectRecorded") == len(trail) + 1
    # It is a task like any other: it runs again on its record, and is compared with its parent.
    [program] = load_app(f"{APP}:Trip")
    report = await (await Replay.aof(made.task, program, url=shared.url)).areport()
    assert report.same, report
    left = [(row.left.version, row.same) for row in await adiff(parent, made.task, url=shared.url) if row.left]
    assert all(same for version, same in left if 1 < version <= at and version < 9), "what is shared is the same"


async def test_a_fork_outlives_the_death_of_its_agents(systems: Callable[..., Running], book: Book) -> None:
    with systems((f"{APP}:Trip", 2)) as system:
        async with await system.plain() as plain:
            parent = await plain.submit("trip", {"book": str(book.path)})
            await ended(plain, parent)
            before, theirs = await bytes_of(plain, parent), book.lines
            values = {"input.seconds": 0.3, "nights": 3}
            made = await afork(parent, at=AFTER_BRIDGE, values=values, url=system.url)
            for _ in range(3):
                await asyncio.sleep(0.35)
                for pid in system.below_supervisor()[2:]:
                    os.kill(pid, signal.SIGKILL)
            output = await ended(plain, int(made.task))
            assert output["trail"][0] == "gate in Rome" and len(output["trail"]) == 7
            done = book.since(theirs)
            assert set(done) == {"side0", "side1", "night0", "night1", "night2"}
            story = await plain.story()
            records = [it["data"]["key"] for it in story.events(f"task.trip.{made.task}") if it["type"] == "EffectRecorded"]
            assert max(Counter(records).values()) == 1, "an effect was recorded twice"
            assert sum(done.values()) <= 5 + 3 * 2, "only what was under way was done again"
            assert await bytes_of(plain, parent) == before


async def test_tasks_that_wait_and_tasks_that_failed_are_forked(shared: Running, plain: Plain, book: Book) -> None:
    body = {"book": str(book.path)}
    waits = await plain.submit("trip", body | {"wait": "go"})
    await plain.until(lambda story: "TaskSleeping" in story.types(f"task.trip.{waits}"))
    theirs = book.lines
    made = await afork(waits, url=shared.url)
    await plain.until(lambda story: "TaskSleeping" in story.types(f"task.trip.{made.task}"))
    assert book.since(theirs) == {}
    await plain.store("signal", "trip", {"task": int(made.task), "name": "go", "value": "left"})
    assert "left" in (await ended(plain, int(made.task)))["trail"]
    assert (await plain.result("trip", waits, wait="0")).code == 202, "the parent waits on"
    await plain.store("signal", "trip", {"task": waits, "name": "go", "value": "right"})
    assert "right" in (await ended(plain, waits))["trail"]
    # What the parent was told before the fork is shared; so is the end of a sleep that is under way.
    told = await afork(waits, values={"nights": 1}, url=shared.url, wait=30)
    assert "right" in told.output["trail"]
    sleeps = await plain.submit("trip", body | {"wait": "sleep"})
    story = await plain.until(lambda story: "TaskSleeping" in story.types(f"task.trip.{sleeps}"))
    until_ = next(it["data"]["until"] for it in story.events(f"task.trip.{sleeps}") if it["type"] == "TaskSleeping")
    napping = await afork(sleeps, url=shared.url)
    story = await plain.until(lambda story: "TaskSleeping" in story.types(f"task.trip.{napping.task}"))
    mine = next(it["data"] for it in story.events(f"task.trip.{napping.task}") if it["type"] == "TaskSleeping")
    assert mine["until"] == until_
    dated = await plain.submit("trip", body | {"wait": "never"}, headers={"Dspex-Deadline": "1"})
    assert (await plain.final("trip", dated)).code == 408
    story = await plain.story()
    waited = story.types(f"task.trip.{dated}").index("TaskSleeping")
    done = await afork(dated, at=waited, values={"input.wait": ""}, url=shared.url, wait=30)
    assert len(done.output["trail"]) == 6
    await ended(plain, int(napping.task))


async def test_a_fork_of_a_fork_shares_what_both_have_done(
    shared: Running, plain: Plain, book: Book, tmp_path: Path
) -> None:
    parent = await plain.submit("trip", {"book": str(book.path)})
    first = await ended(plain, parent)
    second = await afork(parent, at=AFTER_BRIDGE, values={"input.city": "Oslo"}, url=shared.url, wait=30)
    theirs = book.lines
    third = await afork(second.task, at=8, values={"nights": 4}, url=shared.url, wait=30)
    assert third.output["trail"][:4] == ["gate in Rome", "bridge in any", "side0 in Oslo", "side1 in Oslo"]
    assert third.output["drawn"] == first["drawn"]
    assert set(book.since(theirs)) >= {"night2", "night3"} and "side0" not in book.since(theirs)
    # Taken out of the log alone, it is whole: the records, and the values that it ran on.
    file = tmp_path / "alone.db"
    export = [sys.executable, "-m", "dspex", "export", str(file), "--task", third.task, "--nats", shared.url]
    await asyncio.to_thread(subprocess.run, export, check=True, capture_output=True)
    [program] = load_app(f"{APP}:Trip")
    report = await (await Replay.aof(third.task, program, log=file)).areport()
    assert report.same and report.effects == 9, report


async def test_what_cannot_be_forked_is_refused_with_words(shared: Running, plain: Plain, book: Book) -> None:
    parent = await plain.submit("trip", {"book": str(book.path)})
    await ended(plain, parent)
    head = (await plain.story()).head
    for wanted, words in (
        ({"at": 99}, "has versions 0 to 9, there is no 99"),
        ({"values": {"nigths": 3}}, "no such variable, did you mean nights"),
        ({"values": {"nights": 30}}, "it must be from 1 to 9"),
        ({"values": {"input.town": "x"}}, "the input has no field 'town'; it has book, city"),
    ):
        with pytest.raises(InvalidInput, match=words):
            await afork(parent, url=shared.url, **wanted)  # type: ignore[call-overload]
    with pytest.raises(NotFound, match="the log has no task 999999"):
        await afork(999999, url=shared.url)
    [other] = load_app(f"{APP.parent / 'programs.py'}:Nap")
    with pytest.raises(InvalidInput, match=f"task {parent} is one of trip, and Nap is nap"):
        await afork(parent, url=shared.url, program=other)
    with pytest.raises(InvalidInput, match="nothing runs in a file"):
        await afork(parent, log="tasks.db")  # type: ignore[call-overload]
    with pytest.raises(InvalidInput, match="a dry run runs the program here: give its class"):
        await afork(parent, url=shared.url, dry=True)  # type: ignore[call-overload]
    assert (await plain.story()).head == head, "nothing was written"
    tasks = (await plain.story()).submitted("trip")
    with pytest.raises(InvalidInput, match="book: a string is due, 3 came"):
        await afork(parent, url=shared.url, values={"input.book": 3})
    assert (await plain.story()).submitted("trip") == tasks, "it is no task that fails, it is refused"
    # The same from a client that asks nobody before.
    for text, code, words in (
        (f"{parent}@99", 400, "versions 0 to 9"), ("nonsense", 400, "42@7"), ("999999@1", 404, "no task 999999 to fork"),
    ):  # fmt: skip
        reply = await plain.ask("trip", {"book": str(book.path)}, headers={"Dspex-Fork": text})
        assert (reply.code, words in str(reply.error)) == (code, True), reply.error


async def test_a_dry_fork_performs_nothing_and_needs_no_system(
    shared: Running, plain: Plain, book: Book, tmp_path: Path
) -> None:
    parent = await plain.submit("trip", {"book": str(book.path)})
    await ended(plain, parent)
    theirs, head = book.lines, (await plain.story()).head
    wanted = (parent, "--dry", "--at", AFTER_BRIDGE, "--set", "input.city=Oslo")
    live = await run("fork", *wanted, url=shared.url)
    assert live["outside"]["name"] == "visit" and "'side0', 'Oslo'" in live["outside"]["request"]
    assert (live["performed"], live["shared"]) == (0, 3)
    [other] = live["changed"]
    assert other["place"] == "trip.visit#0" and "'Rome'" in other["recorded"] and "'Oslo'" in other["asked"]
    file = tmp_path / "recorded.db"
    await asyncio.to_thread(subprocess.run, [
        sys.executable, "-m", "dspex", "export", str(file), "--task", str(parent), "--nats", shared.url,
    ], check=True, capture_output=True)  # fmt: skip
    offline = await run("fork", *wanted, "--log", file, url="nats://127.0.0.1:1")
    assert offline["outside"] == live["outside"]
    [program] = load_app(f"{APP}:Trip")
    seen = await afork(parent, program=program, values={"nights": 3}, log=file, dry=True)
    assert seen.outside and "'night2'" in seen.outside.request
    assert book.lines == theirs and (await plain.story()).head == head


async def test_a_person_sees_what_was_forked(shared: Running, plain: Plain, book: Book) -> None:
    def said(*arguments: object) -> str:
        words = [sys.executable, "-m", "dspex", *map(str, arguments), "--nats", shared.url]
        return subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout

    parent = await plain.submit("trip", {"book": str(book.path)})
    await ended(plain, parent)
    first = (await asyncio.to_thread(said, "fork", parent, "--at", 2, "--set", "nights=1", "--wait")).splitlines()
    task = first[0].split()[1]
    assert first[0] == f"task {task} shares events 1 to 2 (of 9) of task {parent}"
    assert first[1] == f"compare them: dspex diff {parent} {task}"
    assert first[2].startswith("trail  [")
    state = await asyncio.to_thread(said, "replay", task, "--to", 3)
    assert f"fork of  task {parent}, up to its event 2" in state
    events = await asyncio.to_thread(said, "events", task)
    assert f"a fork of {parent}@2" in events and f"shares events 1 to 2 of task {parent}: 1 record" in events
    assert f"(from {parent}@2) trip.now#0" in events
    assert [line.split()[1] for line in events.splitlines()[1:5]] == ["0", "1", "2", "3"], "versions, for --at"
    await asyncio.to_thread(until, lambda: f"fork of {parent}@2: " in said("tasks", "trip"))  # once it is archived
    proposed = await asyncio.to_thread(said, "vars", "trip", "propose", "nights=6", "--why", "to rest")
    history = await asyncio.to_thread(said, "vars", "trip", "history")
    assert proposed.strip() in history and "to rest" in history and "for a fork of task" in history
    assert "proposed: dspex vars trip history" in await asyncio.to_thread(said, "vars", "trip")
    dry = await asyncio.to_thread(said, "fork", parent, "--at", 2, "--dry")
    assert dry.startswith("would go outside: 1 of 1 shared record asked for, 0 performed") and "visit(" in dry


# -- other code


def changed(tmp_path: Path) -> Path:
    """Another version of the program: it stays for days, not for nights."""
    file = tmp_path / "changed.py"
    file.write_text(APP.read_text().replace('f"night{night}"', 'f"day{night}"'))
    return file


async def test_a_fork_with_other_code_runs_here_and_the_agents_leave_it(
    shared: Running, plain: Plain, book: Book, tmp_path: Path
) -> None:
    parent = await plain.submit("trip", {"book": str(book.path)})
    await ended(plain, parent)
    before, theirs = await bytes_of(plain, parent), book.lines
    made = await run("fork", parent, "--at", AFTER_BRIDGE, "--code", changed(tmp_path), "--set", "nights=3", url=shared.url)
    assert made["output"]["trail"][-3:] == ["day0 in Rome", "day1 in Rome", "day2 in Rome"]
    assert book.since(theirs) == dict.fromkeys(["side0", "side1", "day0", "day1", "day2"], 1)
    story = await plain.story()
    [claim] = [it["data"] for it in story.events(f"task.trip.{made['task']}") if it["type"] == "TaskClaimed"]
    assert claim["code"] == made["code"] and "-fork-" in claim["agent"]
    assert await bytes_of(plain, parent) == before
    assert (await ended(plain, int(made["task"])))["trail"] == made["output"]["trail"]


async def test_a_fork_that_nobody_finishes_fails_in_time(
    systems: Callable[..., Running], book: Book, tmp_path: Path
) -> None:
    app = tmp_path / "impatient.py"
    app.write_text(APP.read_text().replace("    attempts = 1000\n", "    timeout = 3.0\n    drain_time = 1.0\n"))
    with systems((f"{app}:Trip", 1)) as system:
        async with await system.plain() as plain:
            parent = await plain.submit("trip", {"book": str(book.path)})
            await ended(plain, parent)
            theirs, code = book.lines, changed(tmp_path)
            sets = [f"--set=input.{name}" for name in ("seconds=1.0", "wait=go")]
            arguments = command("fork", parent, "--at", AFTER_BRIDGE, "--code", code, *sets, url=system.url)
            process = await asyncio.create_subprocess_exec(*arguments, stdout=-1, stderr=-1)
            story = await plain.until(lambda story: "TaskSleeping" in story.types(f"task.trip.{newest(story)}"))
            task = newest(story)
            await plain.store("signal", "trip", {"task": task, "name": "go", "value": 1})
            await asyncio.to_thread(until, lambda: len(book.lines) > len(theirs))  # awake again, and at work
            process.kill()
            await process.communicate()
            reply = await plain.final("trip", task)
            story = await plain.story()
            claimed = [it["data"]["code"] for it in story.all_of("TaskClaimed")]
            assert reply.code == 500 and reply.error["type"] == "CodeUnavailable"
            assert f"needs code {claimed[-1]} of trip, the agents here run {claimed[0]}" in reply.error["message"]


def newest(story: Story) -> int:
    return story.submitted("trip")[-1]


async def test_a_fork_whose_process_was_killed_is_finished_by_another(
    shared: Running, plain: Plain, book: Book, tmp_path: Path
) -> None:
    parent = await plain.submit("trip", {"book": str(book.path)})
    await ended(plain, parent)
    theirs, code = book.lines, changed(tmp_path)
    arguments = ("fork", parent, "--at", AFTER_BRIDGE, "--code", code, "--set", "input.seconds=0.5")
    process = await asyncio.create_subprocess_exec(*command(*arguments, url=shared.url), stdout=-1, stderr=-1)
    await asyncio.to_thread(until, lambda: any(place == "day0" for place, _ in book.lines))
    process.kill()
    await process.communicate()
    story = await plain.story()
    task = story.submitted("trip")[-1]
    assert not set(story.types(f"task.trip.{task}")) & ENDED
    refused = await run("fork", task, "--resume", "--code", APP, url=shared.url, check=1)
    assert "needs code" in refused["error"]["message"]
    made = await run("fork", task, "--resume", "--code", code, url=shared.url)
    assert made["output"]["trail"][-2:] == ["day0 in Rome", "day1 in Rome"]
    done = book.since(theirs)
    assert (done["side0"], done["side1"], done["day1"]) == (1, 1, 1) and done["day0"] <= 2
    (await plain.story()).check_versions()
