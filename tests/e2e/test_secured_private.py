"""Private fields and large values on a system with access rules: as on an open one, and apart for each program."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.guarded import connect, identities, refusals
from tests.e2e.plain import Plain
from tests.e2e.private import Large, Vetting
from tests.e2e.running import Running
from tests.e2e.test_private import WORD, archived, body, found_in, stored

from dspex import Forgotten, InvalidInput, NotFound, ProgramFailed, Replay
from dspex.compose.caller import Caller
from dspex.compose.story import BusSource, stories
from dspex.console.main import run
from dspex.core.access import Role
from dspex.store.verify import verify

HERE = Path(__file__).parent / "private.py"
PLANS = tuple((f"{HERE}:{name}", count) for name, count in (("Vetting", 2), ("Clerk", 1), ("Lender", 1), ("Large", 1)))
MIB = 1 << 20
DUE = b'{"verdict":"SECRET-record-of-SECRET-123 of Ann-in-the-open","size":27}'

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("private") / "data"
    identities(data, "alice", "bob")
    with Running(data, *PLANS, secure=True) as system:
        yield system


async def as_role(system: Running, role: Role, name: str = "") -> Caller:
    return await Caller.connect(system.url, credentials=identities(system.data).context(role, name))


async def erased(system: Running, position: str) -> None:
    async with await connect(system.url, identities(system.data).context(Role.OPERATOR)) as god:
        for _ in range(600):
            reply = await god.nc.request("$JS.API.STREAM.MSG.GET.DSPEX", json.dumps({"seq": int(position)}).encode())
            if b'"error"' in reply.data:
                return
            await asyncio.sleep(0.05)
    raise AssertionError(f"position {position} is still there: {reply.data!r}")


async def test_nothing_private_is_on_disk_whatever_the_door(
    system: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = tmp_path / "book"
    alice, bob = await as_role(system, Role.CLIENT, "alice"), await as_role(system, Role.CLIENT, "bob")
    console = await as_role(system, Role.CONSOLE)
    async with alice, bob, console:
        assert (await alice.ask("vetting", body(book)))[0] == DUE
        submitted = await alice.submit("vetting", body(book), key="k-1")
        assert await alice.result("vetting", submitted) == DUE
        in_the_open = await stored(alice, "vetting", body(book))
        assert await alice.result("vetting", in_the_open) == DUE
        await erased(system, in_the_open)
        assert await alice.result("vetting", in_the_open) == DUE, "its result stays, and is hers"
        with pytest.raises(NotFound):
            await bob.result("vetting", in_the_open)
        assert await console.result("vetting", in_the_open) == DUE
        waiting = await stored(alice, "vetting", body(book, do="wait"))
        sent = await alice.signal("vetting", waiting, "word", "SECRET-word")
        assert b"SECRET-123SECRET-word of" in await alice.result("vetting", waiting)
        await erased(system, str(sent))
        await erased(system, waiting)
        assert len((await alice.ask("vetting", body(book, do="large")))[0]) > 1_200_000
        assert json.loads((await alice.ask("clerk", json.dumps({"book": str(book)}).encode()))[0])["size"] > 30
        wrong = await stored(alice, "vetting", body(book, ssn=["SECRET-list"]))
        with pytest.raises(InvalidInput):
            await alice.result("vetting", wrong)
        await erased(system, wrong)
        with pytest.raises(InvalidInput):
            await alice.result("vetting", wrong)
        with pytest.raises(NotFound):
            await bob.result("vetting", wrong)
        secret = await stored(alice, "lender", b'{"token": "SECRET-token"}')
        with pytest.raises(InvalidInput, match="token: a reference such as"):
            await alice.result("lender", secret)
        await erased(system, secret)
        with pytest.raises(InvalidInput, match="token: a reference such as"):
            await alice.result("lender", secret)
        assert WORD.decode() not in json.dumps([event async for event in console.events()])
        await archived(console)
        for story in await stories(BusSource(console), "vetting"):
            assert story.missing == ""
        monkeypatch.setenv("NATS_CREDS", identities(system.data).context(Role.CONSOLE))
        assert (await (await Replay.aof(in_the_open, Vetting, url=system.url)).areport()).same is True
        assert (await console.forget(in_the_open))["keys"] == 1
        with pytest.raises(Forgotten, match=f"what task {in_the_open} held was forgotten"):
            await alice.result("vetting", in_the_open)
    assert found_in(system.data, WORD) == []
    assert found_in(system.data, b"Ann-in-the-open"), "what is open can be found"
    assert WORD.decode() not in system.words


async def test_values_that_no_event_holds(system: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with await as_role(system, Role.CLIENT, "alice") as alice, await as_role(system, Role.CONSOLE) as console:
        output, task = await alice.ask("large", json.dumps({"output": 5 * MIB, "effect": 0}).encode())
        assert len(json.loads(output)["text"]) == 5 * MIB
        assert await alice.result("large", task) == output
        output, task = await alice.ask("large", json.dumps({"output": 0, "effect": 12 * MIB}).encode())
        assert json.loads(output)["size"] == 12 * MIB
        monkeypatch.setenv("NATS_CREDS", identities(system.data).context(Role.CONSOLE))
        assert (await (await Replay.aof(task, Large, url=system.url)).areport()).same is True
        with pytest.raises(ProgramFailed, match="bytes"):
            await alice.ask("large", json.dumps({"output": 12 * MIB, "effect": 0}).encode())
        await archived(console)


async def test_a_killed_agents_private_task_goes_on_elsewhere(system: Running, tmp_path: Path) -> None:
    book = tmp_path / "book"
    async with await as_role(system, Role.CLIENT, "alice") as alice, await as_role(system, Role.CONSOLE) as console:
        tasks = [await alice.submit("vetting", body(book, seconds=0.6)), await stored(alice, "vetting", body(book, seconds=0.6))]
        await asyncio.sleep(0.3)
        ps = [one for one in await console.processes() if one["program"] == "vetting"]
        for one in ps:
            os.kill(one["pid"], signal.SIGKILL)
        for task in tasks:
            assert await alice.result("vetting", task) == DUE
        await erased(system, tasks[1])


async def test_one_programs_keys_and_objects_are_not_anothers(system: Running) -> None:
    """With the very names in hand."""
    secured = identities(system.data)
    god = await connect(system.url, secured.context(Role.OPERATOR))
    agent = await connect(system.url, secured.context(Role.AGENT, "clerk"))
    client = await connect(system.url, secured.context(Role.CLIENT, "bob"))
    async with god, agent, client:
        for stream, subject in (("DSPEX_KEYS_vetting", "dspex.key.vetting.*"), ("OBJ_dspex-large", "$O.dspex-large.M.*")):
            kept = await god.nc.jetstream().get_last_msg(stream, subject)
            assert kept.data
            for who in (agent, client):
                for call in ("dspex.api.STREAM.MSG.GET", "$JS.API.STREAM.MSG.GET", "dspex.api.DIRECT.GET", "dspex.api.STREAM.MSG.DELETE"):
                    assert await _tried(who, f"{call}.{stream}", json.dumps({"seq": kept.seq}).encode()) is None
                assert await _tried(who, str(kept.subject), b"{}") is None
            assert (await god.nc.jetstream().get_last_msg(stream, subject)).seq == kept.seq
        mine = await agent.nc.request("dspex.api.STREAM.MSG.GET.DSPEX_KEYS_clerk", b'{"seq": 1}')
        assert b'"error"' in mine.data or b'"message"' in mine.data, "its own it reaches"


async def _tried(who: Plain, subject: str, content: bytes) -> bytes | None:
    try:
        reply = await who.nc.request(subject, content, timeout=0.3)
    except Exception:
        return None
    return reply.data


def test_the_archive_is_right_and_gives_everything_back(tmp_path: Path) -> None:
    """Last: the log is made again from the archive, and private and large values are there again, each its program's."""
    data, book = tmp_path / "data", tmp_path / "book"
    identities(data, "alice")

    async def fill(system: Running) -> list[str]:
        async with await as_role(system, Role.CLIENT, "alice") as alice, await as_role(system, Role.CONSOLE) as console:
            tasks = [await alice.submit("vetting", body(book)), await stored(alice, "vetting", body(book))]
            tasks.append((await alice.ask("large", json.dumps({"output": 2 * MIB, "effect": 0}).encode()))[1])
            for task in tasks[:2]:
                assert await alice.result("vetting", task) == DUE
            await erased(system, tasks[1])
            await archived(console)
        return tasks

    with Running(data, PLANS[0], PLANS[3], secure=True) as system:
        tasks = asyncio.run(fill(system))
    assert verify(data / "archive.db").ok
    assert run(["verify", "--against-log", "--data", str(data), "--json"]) == 0
    assert run(["restore", str(data / "archive.db"), "--replace", "--data", str(data), "--json"]) == 0

    async def look(system: Running) -> None:
        async with await as_role(system, Role.CLIENT, "alice") as alice:
            for task in tasks[:2]:
                assert await alice.result("vetting", task) == DUE
            assert len(await alice.result("large", tasks[2])) > 2 * MIB

    with Running(data, PLANS[0], PLANS[3], secure=True) as system:
        asyncio.run(look(system))
        assert refusals(data / "server" / "nats.log") == []
    assert found_in(data, WORD) == []


def test_nothing_that_the_system_does_is_refused(system: Running) -> None:
    """What only attackers were refused: nothing of the processes' own."""
    said = [line for line in refusals(system.data / "server" / "nats.log") if "cid" in line and "dspex" in line]
    assert "refused" not in system.words, said
