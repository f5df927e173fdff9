"""Damage to the files of a running system's server: what was lost is said, and what is known comes back."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.e2e.running import Running, gone, until
from tests.e2e.test_archivist import archived, archivist, dspex, log_of

from dspex.bus.blocks import stream_folder
from dspex.compose.caller import Caller
from dspex.store.verify import verify

ROOT = Path(__file__).resolve().parents[2]


def the_log(system: Running) -> Path:
    folder = stream_folder(system.data / "server", "DSPEX")
    assert folder
    return folder


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


async def some_tasks(caller: Caller, count: int = 20) -> list[str]:
    tasks = [await caller.submit("work", b'{"text": "mark %d"}' % number) for number in range(count)]
    for task in tasks:
        await caller.result("work", task)
    return tasks


async def test_a_damaged_log_is_replaced_by_its_archive(systems: Callable[..., Running]) -> None:
    system = systems(("Work", 1)).start()
    async with await Caller.connect(system.url) as caller:
        await archivist(caller)
        tasks = await some_tasks(caller)
    assert system.stop() == 0  # what is new is archived at the end
    [block] = the_log(system).glob("msgs/*.blk")
    flip(block, block.read_bytes().index(b"mark 10") + 2)
    data = ("--data", str(system.data))
    code, [said] = await asyncio.to_thread(dspex, "verify", *data, "--against-log")
    assert (code, said["first"]["position"]) == (1, int(tasks[10]))
    file = str(system.data / "archive.db")
    assert dspex("restore", file, *data)[0] == 1
    assert dspex("restore", file, *data, "--replace")[0] == 0
    assert (system.data / "server" / "damaged-1" / "msgs").is_dir()
    assert dspex("verify", *data, "--against-log")[0] == 0
    system.start()
    async with await Caller.connect(system.url) as caller:
        for number, task in enumerate(tasks):
            assert b"mark %d" % number in await caller.result("work", task)


async def test_a_log_whose_description_is_damaged_is_the_same_log(systems: Callable[..., Running]) -> None:
    system = systems(("Work", 1)).start()
    async with await Caller.connect(system.url) as caller:
        tasks = await some_tasks(caller)
        epoch = (await log_of(caller)).epoch
        await archived(caller, await log_of(caller))
    assert system.stop() == 0
    flip(the_log(system) / "meta.sum", 3)
    system.start()
    async with await Caller.connect(system.url) as caller:
        log = await log_of(caller)
        assert log.epoch == epoch
        for number, task in enumerate(tasks):
            assert b"mark %d" % number in await caller.result("work", task)
        await archived(caller, log)
        assert not (await archivist(caller))["trouble"]


async def test_a_log_that_is_gone_is_not_begun_anew_beside_its_archive(systems: Callable[..., Running]) -> None:
    system = systems(("Work", 1)).start()
    async with await Caller.connect(system.url) as caller:
        tasks = await some_tasks(caller, 3)
        await archived(caller, await log_of(caller))
    assert system.stop() == 0
    shutil.rmtree(system.data / "server")
    system.launch()
    assert await asyncio.to_thread(system.wait) == 1
    assert any("`dspex restore` makes it again" in event.get("reason", "") for event in system.events)
    assert dspex("restore", str(system.data / "archive.db"), "--data", str(system.data))[0] == 0
    system.start()
    async with await Caller.connect(system.url) as caller:
        assert b"mark 1" in await caller.result("work", tasks[1])


async def test_what_was_lost_before_it_was_archived_is_a_gap(systems: Callable[..., Running]) -> None:
    system = systems(("Work", 1)).start()
    async with await Caller.connect(system.url) as caller:
        first = await some_tasks(caller, 5)
        await archived(caller, await log_of(caller))
        os.kill(system.archivist(), signal.SIGSTOP)
        late = await some_tasks(caller)
        top = await (await log_of(caller)).head()
        stopped, server = system.archivist(), system.server()
        os.kill(system.supervisor(), signal.SIGKILL)  # so that no other archivist begins
        os.kill(system.root, signal.SIGKILL)
        os.kill(stopped, signal.SIGKILL)
        system.kill()
    until(lambda: gone(stopped) and gone(server))
    [block] = the_log(system).glob("msgs/*.blk")
    data = block.read_bytes()
    hole = data.index(b"mark 8", data.index(b"mark 4") + 500)
    block.write_bytes(data[:hole] + bytes(600) + data[hole + 600 :])
    (the_log(system) / "msgs" / "index.db").unlink(missing_ok=True)  # as after a loss of power
    system.start()
    said = system.event("trouble")["reason"]
    end = int(re.search(r"to (\d+)\.", said)[1])  # type: ignore[index]
    assert int(late[-1]) < end >= top
    async with await Caller.connect(system.url) as caller:
        new = await caller.submit("work", b'{"text": "new"}')
        assert int(new) > end, "a position that was given once is nobody else's"
        assert b"new" in await caller.result("work", new)
        for task in (*first, late[0]):
            assert await caller.result("work", task)
        await archived(caller, await log_of(caller))
    assert system.stop() == 0
    report = verify(system.data / "archive.db")
    assert report.ok
    assert any(gap.first <= int(late[-1]) <= gap.last for gap in report.gaps)


def test_whatever_is_damaged_is_noticed_and_comes_back() -> None:
    command = [sys.executable, "benchmarks/damage.py", "--short", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["trials"] == 11 and found["archived_lost"] > 100
    assert found["archived_unnoticed"] == found["archived_unrestored"] == found["new_unnamed"] == 0
