"""Private values: never on disk in the open once their task has ended, through whatever door they came."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.e2e.conftest import Launch
from tests.e2e.private import Clerk, Vetting
from tests.e2e.running import Running

from dspex import Conflict, Forgotten, InvalidInput, NotFound, ProgramFailed, Replay, TaskError
from dspex.bus.client import Client
from dspex.bus.objects import NatsKeys
from dspex.bus.server import Server
from dspex.compose.caller import Caller
from dspex.compose.export import export
from dspex.compose.forks import afork
from dspex.compose.story import BusSource, stories, story_of
from dspex.core.subjects import Subjects
from dspex.store.verify import verify

HERE = Path(__file__).parent / "private.py"
PLANS = [(f"{HERE}:{name}", count) for name, count in (("Vetting", 2), ("Clerk", 1), ("Lender", 1))]
WORD = b"SECRET"


def body(book: Path, **fields: Any) -> bytes:
    return json.dumps({"name": "Ann-in-the-open", "ssn": "SECRET-123", "book": str(book), **fields}).encode()


def found_in(folder: Path, *words: bytes) -> list[str]:
    """The files that hold one of the words, as it is or in base64, whatever it begins at."""
    wanted = list(words)
    for word in words:
        wanted += [base64.b64encode(b"x" * shift + word)[4 if shift else 0 : -4] for shift in range(3)]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(word in path.read_bytes() for word in wanted)]


async def stored(caller: Caller, program: str, content: bytes, door: str = "task") -> str:
    """What any NATS client does: publish it at the stored door, in the open."""
    reply = await caller.client.request(f"dspex.{door}.{program}", content)
    return str(json.loads(reply.data)["seq"])


async def erased(caller: Caller, position: str) -> None:
    for _ in range(200):
        reply = await caller.client.request("$JS.API.STREAM.MSG.GET.DSPEX", json.dumps({"seq": int(position)}).encode())
        if b'"error"' in reply.data:
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"position {position} is still there: {reply.data!r}")


async def archived(caller: Caller) -> None:
    """Wait until the archive has all that the log has, and what stands beside it."""
    head = (await caller.read_log(limit=1))["head"]
    for _ in range(300):
        said = [answer["data"] for answer in await caller.gather() if answer["data"].get("role") == "archivist"]
        if said and said[0]["position"] >= head:
            await asyncio.sleep(1.3)
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the archivist does not come after")


@pytest.mark.parametrize("log", ["jetstream", "sqlite"])
async def test_nothing_private_is_on_disk_whatever_the_door(systems: Launch, tmp_path: Path, log: str) -> None:
    book = tmp_path / "book"
    system = systems(*PLANS, log=log).start()
    due = b'{"verdict":"SECRET-record-of-SECRET-123 of Ann-in-the-open","size":27}'
    async with await Caller.connect(system.url) as caller:
        output, _ = await caller.ask("vetting", body(book))
        assert output == due
        submitted = await caller.submit("vetting", body(book), key="k-1")
        assert await caller.result("vetting", submitted) == due
        assert await caller.submit("vetting", body(book, do="raise"), key="k-1") != submitted
        assert await caller.result("vetting", "k-1") == due
        in_the_open = await stored(caller, "vetting", body(book))
        assert await caller.result("vetting", in_the_open) == due
        await erased(caller, in_the_open)
        assert await caller.result("vetting", in_the_open) == due, "its result stays"
        assert await caller.program_of(in_the_open) == "vetting"
        waiting = await stored(caller, "vetting", body(book, do="wait"))
        await asyncio.sleep(0.5)  # asleep
        sent = await caller.signal("vetting", waiting, "word", "SECRET-word")
        assert b"SECRET-123SECRET-word of" in await caller.result("vetting", waiting)
        await erased(caller, str(sent))
        await erased(caller, waiting)
        large, _ = await caller.ask("vetting", body(book, do="large"))
        assert len(large) > 1_200_000
        assert json.loads((await caller.ask("clerk", json.dumps({"book": str(book)}).encode()))[0])["size"] > 30
        with pytest.raises(ProgramFailed, match="raised ValueError; its events have the details"):
            await caller.ask("vetting", body(book, do="raise"))
        with pytest.raises(ProgramFailed, match="no to SECRET-record"):
            await caller.ask("vetting", body(book, do="say"))
        with pytest.raises(InvalidInput, match="ssn: a string is due; what came is private and not shown"):
            await caller.ask("vetting", body(book, ssn=["SECRET-list"]))
        wrong = await stored(caller, "vetting", body(book, ssn=["SECRET-list"]))
        with pytest.raises(InvalidInput):
            await caller.result("vetting", wrong)
        await erased(caller, wrong)
        with pytest.raises(InvalidInput):
            await caller.result("vetting", wrong)

        shown = [event async for event in caller.events()]
        assert WORD.decode() not in json.dumps(shown)
        types = [event["type"] for event in shown if event["aggregate"] == f"task.vetting.{in_the_open}"]
        assert ("InputSealed" in types) == (log == "jetstream"), "the log process seals it before it writes it"
        assert WORD.decode() not in json.dumps(await caller.gather())
        await archived(caller)
        same = await Replay.aof(in_the_open, Vetting, url=system.url)
        assert (await same.areport()).same is True
        for story in await stories(BusSource(caller), "vetting"):
            assert story.missing == ""
        replays = await Replay.aevery(Vetting, url=system.url)
        reports = [await each.areport() for each in replays]
        assert [report.difference for report in reports] == [None] * len(reports)
        assert (await (await Replay.aevery(Clerk, url=system.url))[0].areport()).same
        assert (await caller.forget(in_the_open))["keys"] == 1
        with pytest.raises(Forgotten, match=f"what task {in_the_open} held was forgotten"):
            await caller.result("vetting", in_the_open)
    assert found_in(system.data, WORD) == [], "while it runs"
    assert found_in(system.data, b"Ann-in-the-open"), "what is open can be found"
    assert WORD.decode() not in system.words
    assert system.stop() == 0
    assert found_in(system.data, WORD) == []
    assert verify(system.data / ("archive.db" if log == "jetstream" else "log.db")).ok


@pytest.mark.parametrize("log", ["jetstream", "sqlite"])
async def test_a_secret_in_a_references_place_is_kept_nowhere(systems: Launch, log: str) -> None:
    system = systems(PLANS[2], log=log).start()
    async with await Caller.connect(system.url) as caller:
        with pytest.raises(InvalidInput, match="token: a reference such as"):
            await caller.ask("lender", b'{"token": "SECRET-token"}')
        task = await stored(caller, "lender", b'{"token": "SECRET-token"}')
        with pytest.raises(InvalidInput, match="token: a reference such as"):
            await caller.result("lender", task)
        await erased(caller, task)
        assert await caller.ask("lender", b'{"token": "env:LENDER"}')
        await archived(caller)
    assert found_in(system.data, WORD) == []
    system.stop()
    assert found_in(system.data, WORD) == []


async def test_a_killed_agents_private_task_goes_on_elsewhere(systems: Launch, tmp_path: Path) -> None:
    book = tmp_path / "book"
    system = systems((f"{HERE}:Vetting", 2)).start()
    async with await Caller.connect(system.url) as caller:
        sealed = await caller.submit("vetting", body(book, seconds=0.6))
        in_the_open = await stored(caller, "vetting", body(book, seconds=0.6))
        await asyncio.sleep(0.9)  # the first effect is recorded, the second under way
        for pid in system.below_supervisor()[2:]:  # all but registrar and archivist
            os.kill(pid, signal.SIGKILL)
        for task in (sealed, in_the_open):
            assert b"SECRET-record-of-SECRET-123" in await caller.result("vetting", task)
        await erased(caller, in_the_open)
        lines = book.read_text().split()
        assert lines.count("look_up") == 2, "what was recorded is not done again"
        types = [event["type"] async for event in caller.events(task=in_the_open)]
        assert types.count("InputSealed") == 1
        assert types[0] == "TaskSubmitted"
    system.stop()
    assert found_in(system.data, WORD) == []


async def test_an_export_carries_keys_only_when_told(systems: Launch, tmp_path: Path) -> None:
    book = tmp_path / "book"
    system = systems((f"{HERE}:Vetting", 1)).start()
    async with await Caller.connect(system.url) as caller:
        asked = (await caller.ask("vetting", body(book, do="large")))[1]
        in_the_open = await stored(caller, "vetting", body(book))
        await caller.result("vetting", in_the_open)
        await erased(caller, in_the_open)
        source = BusSource(caller)
        await export(source, tmp_path / "sealed.db", programs=["vetting"])
        await export(source, tmp_path / "open.db", tasks=[asked, in_the_open], keys=True)
    system.stop()
    assert found_in(tmp_path, WORD) == []
    for task in (asked, in_the_open):
        report = await (await Replay.aof(task, Vetting, log=tmp_path / "sealed.db")).areport()
        assert report.same is None
        assert f"task {task} holds private values: the key" in report.why
        assert (await (await Replay.aof(task, Vetting, log=tmp_path / "open.db")).areport()).same is True


async def forgotten_system(system: Running, book: Path) -> tuple[str, str, str, list[bytes]]:
    """Two tasks of each kind, of which one is forgotten: that one, the ones that stay, and its keys."""
    async with await Caller.connect(system.url) as caller:
        task = (await caller.ask("vetting", body(book, do="large")))[1]
        other = await stored(caller, "vetting", body(book))
        kept = (await caller.ask("vetting", body(book)))[1]
        await caller.result("vetting", other)
        await erased(caller, other)
        running = await caller.submit("vetting", body(book, do="wait"))
        await asyncio.sleep(0.3)
        await archived(caller)
        keys = NatsKeys(caller.client, caller.subjects)
        names = {change.name: change.key for change in await keys.changes(0)}
        shown = [event async for event in caller.events(task=task)]
        name = shown[0]["data"]["headers"]["Dspex-Sealed"]
        own = next(key for key in names if key.endswith(f"-{other}"))
        gone = [names[name], names[own]]
        assert found_in(system.data, *(key or b"" for key in gone)), "they are there before"

        with pytest.raises(Conflict, match=f"task {running} has not ended"):
            await caller.forget(running)
        with pytest.raises(NotFound, match="has a task 999999"):
            await caller.forget("999999")
        said = await caller.forget(task, "she asked", actor="eve")
        assert (said["keys"], said["later"]) == (1, 1)
        assert (await caller.forget(other))["keys"] == 1
        assert (await caller.forget(task))["keys"] == 0, "twice is fine"
        forced = await caller.forget(running, force=True)
        assert forced["keys"] == 1
        await caller.signal("vetting", running, "word", "SECRET-word")
        with pytest.raises(Forgotten):
            await caller.result("vetting", running, timeout=10)
        with pytest.raises(Forgotten, match=f"what task {task} held was forgotten by eve on .*: she asked"):
            await caller.result("vetting", task)
        assert b"SECRET" in await caller.result("vetting", kept)
        types = [event["type"] async for event in caller.events(task=task)]
        assert types[-1] == "TaskForgotten"
        report = await (await Replay.aof(task, Vetting, url=system.url)).areport()
        assert (report.same, report.why.startswith(f"what task {task} held was forgotten by eve")) == (None, True)
        await archived(caller)
    return task, other, kept, [key for key in gone if key]


async def test_what_is_forgotten_is_gone_and_the_chain_holds(systems: Launch, tmp_path: Path) -> None:
    system = systems((f"{HERE}:Vetting", 1)).start()
    old = tmp_path / "old"
    task, other, kept, keys = await forgotten_system(system, tmp_path / "book")
    assert found_in(system.data, *keys) == []
    assert verify(system.data / "archive.db").ok
    assert system.stop() == 0
    assert found_in(system.data, *keys) == []

    # A restore brings back what is not forgotten, and only that; also when the keys are from before.
    old.mkdir()
    for name in ("archive.db", "archive.head", "keys.db", "objects.db"):
        shutil.copy(system.data / name, old / name)
    with closing(sqlite3.connect(old / "keys.db")) as ring:
        epoch = sqlite3.connect(old / "archive.db").execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()[0]
        ring.execute("DELETE FROM keys WHERE name = ?", (f"{epoch}-{other}",))
        ring.execute("INSERT INTO keys (name, key) VALUES (?, ?)", (f"{epoch}-{other}", keys[1]))
        ring.commit()
    from dspex.agents.restoring import restore

    with Server(tmp_path / "new" / "server") as server:
        async with await Client.connect(server.url, wait=10) as client:
            await restore(old / "archive.db", client, Subjects(), replicas=1)
    again = systems((f"{HERE}:Vetting", 1), folder="new").start()
    async with await Caller.connect(again.url) as caller:
        assert b"SECRET" in await caller.result("vetting", kept)
        for gone in (task, other):
            with pytest.raises(Forgotten):
                await caller.result("vetting", gone)
        story = await story_of(BusSource(caller), other)
        assert "was forgotten" in story.missing
    again.stop()
    assert found_in(again.data, *keys) == []


async def test_a_body_that_only_says_it_is_sealed_fails(systems: Launch, tmp_path: Path) -> None:
    system = systems((f"{HERE}:Vetting", 1)).start()
    async with await Caller.connect(system.url) as caller:
        for content, key in ((body(tmp_path / "book"), "nokey"), (b'{"open": {}, "sealed": "AAAA"}', "nokey")):
            reply = await caller.client.request("dspex.task.vetting", content, headers={"Dspex-Sealed": key})
            with pytest.raises(TaskError, match="the key nokey is not here"):
                await caller.result("vetting", str(json.loads(reply.data)["seq"]))
        # The values of one place do not open in another.
        asked = (await caller.ask("vetting", body(tmp_path / "book")))[1]
        shown = [event async for event in caller.events(task=asked)]
        name = shown[0]["data"]["headers"]["Dspex-Sealed"]
        output = shown[-1]["data"]["held"]["sealed"]
        moved = json.dumps({"open": {}, "sealed": output}).encode()
        reply = await caller.client.request("dspex.task.vetting", moved, headers={"Dspex-Sealed": name})
        with pytest.raises(InvalidInput, match="does not open with its key"):
            await caller.result("vetting", str(json.loads(reply.data)["seq"]))
        # A field that looks like one of ours is only a value.
        looks = body(tmp_path / "book", name='{"held": {"blob": "00"}}')
        assert b'{\\"held\\"' in (await caller.ask("vetting", looks))[0]


async def test_a_fork_shares_what_is_sealed_and_what_is_forgotten(systems: Launch, tmp_path: Path) -> None:
    book = tmp_path / "book"
    system = systems((f"{HERE}:Vetting", 1)).start()
    async with await Caller.connect(system.url) as caller:
        parent = await stored(caller, "vetting", body(book))
        due = await caller.result("vetting", parent)
        await erased(caller, parent)
        made = await afork(parent, at=3, url=system.url, wait=30)
        assert made.output == json.loads(due)
        lines = book.read_text().split()
        assert (lines.count("look_up"), lines.count("judge")) == (1, 2), "what is shared is not done again"
        assert (await (await Replay.aof(made.task, Vetting, url=system.url)).areport()).same is True
        events = (await Replay.aof(made.task, Vetting, url=system.url)).events
        copies = [event.causation for event in events if "/" in event.causation]
        assert copies == [f"task.vetting.{parent}/{version}" for version in range(3, 3 + len(copies))] and copies
        await archived(caller)
        await caller.forget(parent)
        report = await (await Replay.aof(made.task, Vetting, url=system.url)).areport()
        assert f"what task {made.task} held was forgotten" in report.why
        with pytest.raises(InvalidInput, match=f"what task {parent} held was forgotten"):
            await afork(parent, url=system.url)
    system.stop()
    assert found_in(system.data, WORD) == []


async def test_agents_killed_at_random_leave_nothing_in_the_open(systems: Launch, tmp_path: Path) -> None:
    book, random = tmp_path / "book", Random(7)
    system = systems((f"{HERE}:Vetting", 3)).start()
    async with await Caller.connect(system.url) as caller:
        tasks = [await stored(caller, "vetting", body(book, seconds=random.random() / 20)) for _ in range(40)]
        for _ in range(5):
            await asyncio.sleep(random.random() / 2)
            for pid in system.below_supervisor()[2:4]:
                os.kill(pid, signal.SIGKILL)
        for task in tasks:
            assert b"SECRET-record" in await caller.result("vetting", task)
        for task in tasks:
            await erased(caller, task)
        await archived(caller)
        wanted = json.dumps({"against_log": True}).encode()
        reply = await caller.client.request("dspex.archive.verify", wanted, timeout=30)
        assert json.loads(reply.data)["report"]["faults"] == []
        for task in tasks:
            types = [event["type"] async for event in caller.events(task=task)]
            assert (types.count("InputSealed"), types.count("TaskCompleted")) == (1, 1)
    system.stop()
    assert found_in(system.data, WORD) == []
