"""Queues that are full and doors that are closed: refused in words, with a time, and never half stored."""

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

import nats
import pytest
from tests.e2e.plain import WRONG, Plain, Reply
from tests.e2e.running import Running
from tests.store.disks import fill

from dspex.compose.caller import Caller
from dspex.core.errors import LimitExceeded

PRESSING = Path(__file__).parent / "pressing.py"
LOGS = ["jetstream", "sqlite"]
SIZE = 60 << 20


async def ask_until(plain: Plain, program: str, code: int, body: object) -> Reply:
    """Ask until it is refused with that code."""
    async with asyncio.timeout(60):
        while (reply := await plain.ask(program, body)).code != code:
            await asyncio.sleep(0.1)
    return reply


def wait_of(reply: Reply) -> float:
    return float(reply.headers["Dspex-Retry-After"])


async def test_an_ask_beyond_the_queue_is_refused_with_a_time_to_try_again(
    systems: Callable[..., Running], tmp_path: Path
) -> None:
    gate = tmp_path / "gate"
    system = systems((f"{PRESSING}:Gated", 1)).start()
    async with await system.plain() as plain:
        held = [await plain.submit("gated", {"gate": str(gate), "text": str(n)}) for n in range(30)]
        asking: list[asyncio.Task[Reply]] = []
        async with asyncio.timeout(60):  # those that are taken before it is known how many wait are answered at the end
            while True:
                asking.append(asyncio.create_task(plain.ask("gated", {"text": "late"}, timeout=60)))
                done, _ = await asyncio.wait(asking, timeout=0.3)
                if done:
                    break
        refused = done.pop().result()
        assert refused.code == 429 and wait_of(refused) > 0
        words = refused.json["error"]["message"]
        assert "tasks of gated wait already, and 20 may" in words and "try again in about" in words
        assert refused.json["error"] == {"type": "LimitExceeded", "message": words, "task": None}
        before = len((await plain.story()).submitted("gated"))
        assert (await plain.ask("gated", {"text": "later"})).code == 429
        assert Reply(await plain.nc.request("dspex.submit.gated", b'{"text": "later"}', timeout=30)).code == 429
        assert len((await plain.story()).submitted("gated")) == before, "what was refused was stored"
        async with await Caller.connect(system.url) as caller:
            with pytest.raises(LimitExceeded) as error:
                await caller.ask("gated", b'{"text": "once"}', timeout=30)
            assert error.value.retry_after and "20 may" in str(error.value)
            patient = asyncio.create_task(caller.ask("gated", b'{"text": "again"}', timeout=120, retries=None))
            await asyncio.sleep(0.5)
            gate.touch()
            output, _ = await patient
            assert b"again" in output
        story = await plain.until_ended("gated")
        story.check_once("gated", held)
        assert [story.outputs("gated")[task]["text"] for task in held] == [str(n) for n in range(30)]
        assert (await plain.ask("gated", {"text": "now"})).json == {"text": "now"}


async def test_a_flood_of_asks_is_served_or_refused_and_none_hangs(systems: Callable[..., Running]) -> None:
    system = systems((f"{PRESSING}:Quick", 1)).start()
    async with await system.plain() as plain:
        [agent] = system.agent_pids()
        await plain.ask("quick", {"text": "warm"})
        before = resident(agent)
        asked = [plain.ask("quick", {"text": str(n)}, timeout=60) for n in range(5000)]
        replies = await asyncio.gather(*asked)
        codes = Counter(reply.code for reply in replies)
        assert set(codes) <= {None, 429, 503}, codes
        assert codes[None] > 0 and codes[429] > 0, codes
        assert all(wait_of(reply) > 0 for reply in replies if reply.code)
        assert all(reply.json["text"] == str(n) for n, reply in enumerate(replies) if reply.code is None)
        assert resident(agent) - before < 128 << 20, "what was refused was kept"
        story = await plain.until_ended("quick")
        story.check_once("quick", [])
        assert len(story.submitted("quick")) == codes[None] + 1


def resident(pid: int) -> int:
    """Bytes of memory that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def is_closed(plain: Plain, door: str, program: str, body: object) -> bool:
    """Whether nobody listens at a stored door."""
    try:
        await plain.nc.request(f"dspex.{door}.{program}", json.dumps(body).encode(), timeout=10)
    except nats.errors.NoRespondersError:
        return True
    except nats.errors.TimeoutError:  # somebody listens, and has no time
        return False
    return False


@pytest.mark.parametrize("log", LOGS)
async def test_without_room_the_doors_close_and_what_runs_ends(
    small_disk: Callable[[int], Path], systems: Callable[..., Running], tmp_path: Path, log: str
) -> None:
    disk, gate = small_disk(SIZE), tmp_path / "gate"
    plans = [(f"{PRESSING}:Gated", 1), (f"{PRESSING}:Signalled", 1)]
    system = systems(*plans, folder=f"{disk.name}/data", log=log).start()
    async with await system.plain() as plain:
        running = [await plain.submit("gated", {"gate": str(gate), "text": str(n)}) for n in range(6)]
        asleep = await plain.submit("signalled", {})
        await plain.until(lambda story: story.types(f"task.signalled.{asleep}")[-1:] == ["TaskSleeping"])
        filler = fill(disk, leave=SIZE // 10 - (1 << 20))
        story = await plain.until(lambda story: story.types("doors.ALL.0"), patience=60)
        said = story.events("doors.ALL.0")[0]["data"]
        assert said["reason"] == "room" and "no new tasks are taken now" in said["message"]
        async with asyncio.timeout(60):
            while not await is_closed(plain, "task", "gated", {"text": "no"}):
                await asyncio.sleep(0.05)
        stored = len((await plain.story()).submitted("gated"))
        assert await is_closed(plain, "outcome", "gated", {"task": running[0], "score": 1})
        refused = await plain.ask("gated", {"text": "no"})
        assert refused.code == 503 and wait_of(refused) > 0
        assert refused.json["error"]["message"] == said["message"]
        done = await asyncio.to_thread(dspex, "submit", "gated", "text=no", "--nats", system.url)
        assert done.returncode == 1 and "no new tasks are taken now" in done.stderr

        registrar = system.registrar()
        os.kill(registrar, signal.SIGKILL)  # whoever leads after it knows that they are closed
        async with asyncio.timeout(60):
            while not await registrar_answers(system, registrar):
                await asyncio.sleep(0.1)
        assert await is_closed(plain, "task", "gated", {"text": "no"})
        assert await is_closed(plain, "task", "signalled", {})

        gate.touch()  # running tasks record effects, sleep, wake and end
        await plain.store("signal", "signalled", {"task": asleep, "name": "go", "value": "gone"})
        story = await plain.until_ended("gated", running)
        assert [story.outputs("gated")[task]["text"] for task in running] == [str(n) for n in range(6)]
        story = await plain.until_ended("signalled", [asleep])
        assert story.outputs("signalled")[asleep] == {"text": "gone"}
        assert len(story.submitted("gated")) == stored, "something was stored behind closed doors"
        assert story.types("doors.ALL.0") == ["DoorsClosed"]

        filler.unlink()
        await plain.until(lambda story: story.types("doors.ALL.0") == ["DoorsClosed", "DoorsOpened"], patience=60)
        late = await _submitted(plain)
        story = await plain.until_ended("gated", [late])
        story.check_once("gated", [*running, late])


async def registrar_answers(system: Running, before: int) -> bool:
    """Whether another registrar than that one leads."""
    try:
        if system.registrar() == before:
            return False
        async with await Caller.connect(system.url) as caller:
            told = await caller._guards.told("gated")
            return bool(told and told.closed)
    except StopIteration:
        return False


async def _submitted(plain: Plain) -> int:
    async with asyncio.timeout(60):
        while True:
            try:
                return await plain.submit("gated", {"text": "after"}, timeout=1.0)
            except WRONG:
                await asyncio.sleep(0.1)


def dspex(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dspex", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("log", LOGS)
async def test_too_many_open_tasks_of_one_program_close_its_door_only(
    systems: Callable[..., Running], tmp_path: Path, log: str
) -> None:
    gate = tmp_path / "gate"
    plans = [(f"{PRESSING}:Gated", 1), (f"{PRESSING}:Quick", 1)]
    system = systems(*plans, log=log, marks={"max_open": 10}).start()
    async with await system.plain() as plain:
        taken: list[int] = []
        async with asyncio.timeout(60):
            while not await is_closed_after(plain, taken, gate):
                await asyncio.sleep(0.05)
        assert len(taken) > 10
        assert (await plain.ask("quick", {"text": "a"})).json == {"text": "a"}
        [why] = (await plain.story()).events("doors.gated.0")
        assert "wait or run, and 10 may" in why["data"]["message"] and why["data"]["program"] == "gated"
        gate.touch()
        await plain.until(lambda story: story.types("doors.gated.0")[-1:] == ["DoorsOpened"], patience=60)
        taken.append(await _submitted(plain))
        (await plain.until_ended("gated", taken)).check_once("gated", taken)


async def is_closed_after(plain: Plain, taken: list[int], gate: Path) -> bool:
    try:
        taken.append(await plain.submit("gated", {"gate": str(gate)}, timeout=5))
    except WRONG:
        return True
    return False
