"""The archivist in a running system: nothing is missing though it is killed, a log comes back, what ended is let go."""


from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.running import HERE, PROGRAMS, Running

from dspex import afind_tasks
from dspex.agents.bounds import Bounds
from dspex.agents.restoring import restore
from dspex.agents.retention import Forgetting
from dspex.bus.client import Client
from dspex.bus.server import Server
from dspex.bus.streams import ensure_log, jetstream_api, set_doors
from dspex.compose.caller import Caller
from dspex.core.codec import events_of
from dspex.core.errors import LogError, NotFound
from dspex.core.events import Head
from dspex.core.subjects import Subjects
from dspex.core.task import TaskState, fold
from dspex.store.archive import Archive
from dspex.store.contract import commit, put
from dspex.store.jetstream import JetStreamLog
from dspex.store.mend import compare
from dspex.store.verify import Report, verify

Launch = Callable[..., Running]
SUBJECTS = Subjects()


async def archivist(caller: Caller) -> dict[str, Any]:
    """What the archivist says of itself, once it leads."""
    async with asyncio.timeout(30):
        while True:
            for answer in await caller.gather():
                data = answer.get("data") or {}
                if data.get("role") == "archivist" and data["leads"]:
                    return dict(data)


async def archived(caller: Caller, log: JetStreamLog) -> int:
    """Wait until the archive has what the log has now."""
    top = await log.head()
    async with asyncio.timeout(30):
        while (await archivist(caller))["position"] < top:
            await asyncio.sleep(0.1)
    return top


async def log_of(caller: Caller) -> JetStreamLog:
    return JetStreamLog(caller.client, SUBJECTS, await ensure_log(caller.client, SUBJECTS))


async def found(url: str) -> dict[str, tuple[str, int, int]]:
    """State, version and attempts of every task, as the views have them."""
    rows = await afind_tasks(limit=0, url=url)
    return {f"task.{row.program}.{row.task}": (row.state, row.version, row.attempts) for row in rows}


async def folded(log: JetStreamLog) -> dict[str, tuple[str, int, int]]:
    """The same, folded from the log."""
    states: dict[str, TaskState] = {}
    for entry in await log.scan(0, 1_000_000):
        for event in events_of(entry, SUBJECTS):
            if event.aggregate.startswith("task."):
                states[event.aggregate] = fold([event], states.get(event.aggregate))
    return {name: (state.status, state.head.version, state.attempts) for name, state in states.items()}


def dspex(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "-m", "dspex", *arguments, "--json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DSPEX_", "NATS_"))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


async def test_nothing_is_missing_though_the_archivist_is_killed_under_load(systems: Launch) -> None:
    system = systems(("Work", 2)).start()
    async with await Caller.connect(system.url) as caller:
        log = await log_of(caller)
        await archivist(caller)
        ended = asyncio.Event()

        async def load() -> None:
            while not ended.is_set():
                await asyncio.gather(*(caller.submit("work", b'{"text": "a"}') for _ in range(50)))
                await asyncio.sleep(0.01)

        loading = asyncio.create_task(load())
        for _ in range(6):
            pid = (await archivist(caller))["pid"]
            await asyncio.sleep(random.uniform(0.05, 0.4))
            os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.3)
        ended.set()
        await loading
        top = await archived(caller, log)
        code, [said] = await asyncio.to_thread(dspex, "verify", "--data", str(system.data), "--against-log")
        assert (code, said["faults"], said["gaps"]) == (0, [], [])
        report = Report(file="")
        await compare(system.data / "archive.db", log, report)
        assert report.ok
        async with asyncio.timeout(30):  # until no task ends between the two any more
            while await found(system.url) != await folded(log):
                await asyncio.sleep(0.2)
        archive = await Archive.open(system.data / "archive.db", readonly=True)
        assert await archive.head() >= top > 300
        assert [e.position for e in await archive.scan(0, top)] == list(range(1, top + 1))
        await archive.close()


async def test_a_damaged_archive_is_mended_while_the_system_runs(systems: Launch) -> None:
    system = systems(("Work", 1)).start()
    file = system.data / "archive.db"
    async with await Caller.connect(system.url) as caller:
        log = await log_of(caller)
        for _ in range(20):
            await caller.ask("work", b'{"text": "a"}')
        await archived(caller, log)
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("UPDATE log SET body = x'00' WHERE position = 9")
            connection.execute("DELETE FROM log WHERE position = 12")
        command = ("verify", "--data", str(system.data))
        code, [said] = await asyncio.to_thread(dspex, *command)
        assert (code, said["first"]["position"], said["bad"]) == (1, 9, 2)
        code, [said] = await asyncio.to_thread(dspex, *command, "--repair")
        assert (code, said["fetched"], said["lost"]) == (0, [9, 12], [])
        code, [said] = await asyncio.to_thread(dspex, *command, "--against-log")
        assert (code, said["ok"]) == (0, True)
        await caller.ask("work", b'{"text": "a"}')
        await archived(caller, log)
    assert system.stop() == 0
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("DELETE FROM log WHERE position = 12")
    assert dspex(*command, "--repair")[0] == 0  # the data folder's own server is started for it
    assert dspex(*command)[0] == 0


async def test_a_restored_system_goes_on(systems: Launch, tmp_path: Path) -> None:
    system = systems(("Work", 1)).start()
    async with await Caller.connect(system.url) as caller:
        log = await log_of(caller)
        done = [await caller.submit("work", b'{"text": "%d"}' % number) for number in range(30)]
        outputs = [await caller.result("work", task) for task in done]
        key = await caller.submit("work", b'{"text": "k"}', key="mine", headers={"Nats-Msg-Id": "work/mine"})
        await caller.result("work", key)
        waiting = await caller.submit("work", b'{"text": "late", "seconds": 1.5}')
        await archived(caller, log)
        epoch = log.epoch
        system.kill()
    file = system.data / "archive.db"
    before = verify(file)
    assert before.ok
    code, [said] = await asyncio.to_thread(dspex, "restore", str(file), "--data", str(tmp_path / "new"))
    assert (code, said["position"]) == (0, before.position)
    assert dspex("restore", str(file), "--data", str(tmp_path / "new"))[0] == 1  # there is a log now
    fresh = systems(("Work", 1), folder="new").start()
    async with await Caller.connect(fresh.url) as caller:
        log = await log_of(caller)
        assert log.epoch == epoch
        assert [await caller.result("work", task) for task in done] == outputs
        assert b"late" in await caller.result("work", waiting)
        assert await caller.find("work", "mine")
        report = Report(file="")
        await compare(file, log, report, restored=before.position)
        assert report.ok, report.faults
        for task in (*done, key):  # none was run again
            kinds = [event["type"] async for event in caller.events(task=task)]
            assert kinds.count("TaskClaimed") == kinds.count("TaskCompleted") == 1
        assert (await archivist(caller))["trouble"] == ""
        await archived(caller, log)


async def test_a_disk_put_back_is_told_and_the_log_restored(systems: Launch) -> None:
    system = systems(("Work", 1)).start()
    server = system.data / "server"
    async with await Caller.connect(system.url) as caller:
        await caller.ask("work", b'{"text": "a"}')
    assert system.stop() == 0
    shutil.copytree(server, system.data / "old")
    system.start()
    async with await Caller.connect(system.url) as caller:
        tasks = [await caller.submit("work", b'{"text": "b"}') for _ in range(30)]
        for task in tasks:
            await caller.result("work", task)
        await archived(caller, await log_of(caller))
    assert system.stop() == 0
    shutil.rmtree(server)
    (system.data / "old").rename(server)
    system.start()
    async with await Caller.connect(system.url) as caller:
        async with asyncio.timeout(20):
            while "lost its newest" not in (await archivist(caller))["trouble"]:
                await asyncio.sleep(0.1)
    assert dspex("doctor", "--data", str(system.data))[0] == 1
    assert system.stop() == 0
    shutil.rmtree(server)
    assert dspex("restore", str(system.data / "archive.db"), "--data", str(system.data))[0] == 0
    system.start()
    async with await Caller.connect(system.url) as caller:
        for task in tasks:
            assert await caller.result("work", task)
        await archived(caller, await log_of(caller))
        assert (await archivist(caller))["trouble"] == ""


async def test_a_flipped_bit_in_a_jetstream_block_is_named(systems: Launch) -> None:
    system = systems(("Work", 1)).start()
    async with await Caller.connect(system.url) as caller:
        tasks = [await caller.submit("work", b'{"text": "mark %d"}' % number) for number in range(40)]
        for task in tasks:
            await caller.result("work", task)
        await archived(caller, await log_of(caller))
    assert system.stop() == 0
    [block] = [path for path in system.data.glob("server/**/DSPEX/msgs/*.blk") if b"mark 20" in path.read_bytes()]
    data = bytearray(block.read_bytes())
    data[data.index(b"mark 20") + 2] ^= 1
    block.write_bytes(data)
    code, [said] = await asyncio.to_thread(dspex, "verify", "--data", str(system.data), "--against-log")
    assert code == 1
    assert said["first"]["position"] <= int(tasks[20])
    for path in system.data.glob("server/**/index.db"):
        path.unlink()  # the server reads its blocks again


async def test_gaps_are_restored_as_gaps(server: Server, tmp_path: Path) -> None:
    async with await Client.connect(server.url) as client:
        epoch = await ensure_log(client, SUBJECTS, ["qabot"])
        log = JetStreamLog(client, SUBJECTS, epoch)
        for number in range(20):
            await log.store("dspex.task.qabot", b"%d" % number, {"A": "b"})
        for position in (1, 2, 7, 8, 9, 15):
            await jetstream_api(client, "STREAM.MSG.DELETE.DSPEX", {"seq": position})
        archive = await Archive.open(tmp_path / "archive.db", epoch=epoch)
        following = asyncio.create_task(archive.follow(log))
        async with asyncio.timeout(10):
            while archive.position < 20:
                await asyncio.sleep(0.05)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await archive.close()
        had = await log.scan(0)
        with pytest.raises(LogError, match="there is a log DSPEX already"):
            await restore(archive.file, client, SUBJECTS)
        await jetstream_api(client, "STREAM.DELETE.DSPEX")
        assert await restore(archive.file, client, SUBJECTS) == 20
        got = await log.scan(0)
        assert [(e.position, e.subject, e.body, e.headers) for e in got] == [
            (e.position, e.subject, e.body, e.headers) for e in had
        ]
        assert await ensure_log(client, SUBJECTS) == epoch
        await set_doors(client, SUBJECTS, ["qabot"])
        assert await log.store("dspex.task.qabot", b"next", {}) == 21
        head = await put(log, "task.qabot.21", 1)
        assert head.position == 22


async def test_what_ended_is_forgotten_and_what_lives_is_kept(systems: Launch) -> None:
    system = systems(("Work", 1), ("Nap", 1)).start()
    async with await Caller.connect(system.url) as caller:
        log = await log_of(caller)
        done = [await caller.submit("work", b'{"text": "a"}', key=f"k{number}") for number in range(10)]
        for task in done:
            await caller.result("work", task)
        await caller.score("work", done[0], 0.5)
        alive = await caller.submit("nap", b'{"n": 7, "seconds": 8}')
        newest = await caller.submit("work", b'{"text": "newest"}')
        await caller.result("work", newest)
        await archived(caller, log)
        archive = await Archive.open(system.data / "archive.db", readonly=True)
        forgot: list[int] = []
        forgetting = Forgetting(caller.client, SUBJECTS, _Noting(archive), Bounds(count=0), forgot.append)  # type: ignore[arg-type]
        assert await forgetting.once() == 11
        assert await forgetting.once() == 0
        left = await log.scan(0)
        positions = {e.position for e in left}
        assert not positions & {int(task) for task in done}
        assert {int(alive), max(positions)} <= positions
        assert not {e.subject for e in left} & {f"dspex.event.task.work.{task}" for task in done}
        assert any(e.subject.startswith("dspex.event.program.") for e in left)
        assert sum(e.subject.startswith("dspex.event.key.") for e in left) == 10
        for name in (done[3], "k3"):
            with pytest.raises(NotFound, match="it is in the archive"):
                await caller.result("work", name, timeout=3)
        with pytest.raises(NotFound, match="it is in the archive"):
            await caller.read_log(task=done[3])
        assert b"7" in await caller.result("nap", alive)
        assert await archive.entry(int(done[3]))
        assert len(await archive.read(f"task.work.{done[3]}")) == 1
        await archive.close()
        await archived(caller, log)
        report = verify(system.data / "archive.db")
        assert (report.ok, report.gaps) == (True, [])
        code, _ = await asyncio.to_thread(dspex, "verify", "--data", str(system.data), "--against-log")
        assert code == 0


class _Noting:
    """An archive that is open for reading; its notes are written past the archivist."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def __getattr__(self, name: str) -> Any:
        return getattr(self._archive, name)

    async def note(self, name: str, value: str) -> None:
        with closing(sqlite3.connect(self._archive.file)) as connection, connection:
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"note.{name}", value))


def test_a_system_forgets_by_its_settings(tmp_path: Path) -> None:
    (tmp_path / "dspex.toml").write_text(
        f'durability = "process"\n[programs.work]\napp = "{PROGRAMS}:Work"\n[retention]\nage = "1s"\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "dspex", "up", str(tmp_path / "dspex.toml"), "--data", str(tmp_path / "data"), "--json"],
        stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1],
    )  # fmt: skip
    assert process.stdout
    try:
        url = json.loads(process.stdout.readline())["nats"]

        async def work() -> None:
            async with await Caller.connect(url) as caller:
                for _ in range(5):
                    await caller.ask("work", b'{"text": "a"}')
                await caller.ask("work", b'{"text": "a"}')
                async with asyncio.timeout(40):
                    while (await archivist(caller))["forgotten"] < 5:
                        await asyncio.sleep(0.2)

        asyncio.run(work())
    finally:
        process.terminate()
        process.wait(40)
        process.stdout.close()
    assert verify(tmp_path / "data" / "archive.db").ok


async def test_a_disk_that_lost_the_newest_entries_is_told(server: Server, tmp_path: Path) -> None:
    async with await Client.connect(server.url) as client:
        epoch = await ensure_log(client, SUBJECTS)
        log = JetStreamLog(client, SUBJECTS, epoch)
        archive = await Archive.open(tmp_path / "archive.db", epoch=epoch)
        await put(log, "task.qabot.1", 5)
        await archive.add(await log.scan(0), log)
        await jetstream_api(client, "STREAM.DELETE.DSPEX")
        config = {"name": "DSPEX", "subjects": ["dspex.event.>"], "num_replicas": 1, "allow_direct": True}
        await jetstream_api(client, "STREAM.CREATE.DSPEX", config)
        await log.append("task.qabot.7", commit("task.qabot.7"), Head())
        with pytest.raises(LogError, match="has lost its newest entries"):
            await archive.follow(log)
        await archive.close()


