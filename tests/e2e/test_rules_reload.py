"""Identities come, go and change while a system runs: no restart, and no connection ends but those that are to."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from nats.errors import Error as NatsError
from tests.console.shells import Ran
from tests.e2e.guarded import connect, identities, options_of
from tests.e2e.plain import Plain
from tests.e2e.running import PROGRAMS, Running

from dspex.console.main import run
from dspex.core.access import Role

LASTING = Path(__file__).parent / "lasting.py"
LONG = 60.0

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("rules") / "data"
    identities(data, "alice", "carol")
    with Running(data, (f"{PROGRAMS}:Work", 1), secure=True) as system:
        yield system


@pytest.fixture
def dspex(system: Running, capsys: pytest.CaptureFixture[str]) -> Any:
    async def call(*arguments: str) -> Ran:
        code = await asyncio.to_thread(run, [*arguments, "--data", str(system.data), "--json"])
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return call


def pids(system: Running) -> list[int]:
    return sorted([system.server(), system.supervisor(), *system.below_supervisor()])


class Watched:
    """A client that notices when its connection ends."""

    def __init__(self) -> None:
        self.lost = asyncio.Event()
        self.plain: Plain

    @classmethod
    async def connect(cls, system: Running, name: str) -> Watched:
        watched = cls()

        async def ended() -> None:
            watched.lost.set()

        async def quiet(error: Exception) -> None:
            pass

        context = identities(system.data).context(Role.CLIENT, name)
        connection = await nats.connect(
            system.url, allow_reconnect=False, disconnected_cb=ended, closed_cb=ended, error_cb=quiet, **options_of(context)
        )
        watched.plain = Plain(connection)
        return watched

    async def works(self) -> bool:
        return bool((await self.plain.ask("work", {"text": "here"})).json["text"] == "here")


async def refused(system: Running, options: dict[str, Any]) -> bool:
    async def quiet(error: Exception) -> None:
        pass

    try:
        connection = await nats.connect(system.url, allow_reconnect=False, error_cb=quiet, connect_timeout=5, **options)
    except (NatsError, OSError, TimeoutError):
        return True
    await connection.close()
    return False


async def test_a_client_comes_and_goes_and_nobody_else_notices(system: Running, dspex: Any) -> None:
    before, alice = pids(system), await Watched.connect(system, "alice")
    async with alice.plain:
        made = (await dspex("secure", "init", "--client", "bob")).json
        assert (made["made"], made["in_force"]) == (["client-bob"], True)
        bob = await Watched.connect(system, "bob")
        assert await bob.works() and await alice.works()
        options = options_of(identities(system.data).context(Role.CLIENT, "bob"))
        kept = Path(options["nkeys_seed"]).with_name("kept-by-bob")
        shutil.copy(options["nkeys_seed"], kept)
        assert (await dspex("secure", "revoke", "bob")).json == {"revoked": "bob", "in_force": True}
        await asyncio.wait_for(bob.lost.wait(), LONG)
        assert await refused(system, options | {"nkeys_seed": str(kept)})
        kept.unlink()
        assert not alice.lost.is_set() and await alice.works()
    assert pids(system) == before


async def test_a_clients_seed_is_replaced(system: Running, dspex: Any) -> None:
    before, carol = pids(system), await Watched.connect(system, "carol")
    options = options_of(identities(system.data).context(Role.CLIENT, "carol"))
    old = Path(options["nkeys_seed"]).with_name("old")
    shutil.copy(options["nkeys_seed"], old)
    task = await carol.plain.submit("work", {"text": "before"})
    assert (await dspex("secure", "rotate", "carol")).json == {"rotated": "client-carol", "in_force": True}
    await asyncio.wait_for(carol.lost.wait(), LONG)
    assert await refused(system, options | {"nkeys_seed": str(old)})
    old.unlink()
    again = await Watched.connect(system, "carol")
    async with again.plain:
        assert (await again.plain.final("work", task)).json["text"] == "before", "the account is the same"
    assert pids(system) == before


async def test_the_seeds_of_its_own_processes_are_replaced(system: Running, dspex: Any) -> None:
    """They connect anew by themselves, or are started again; no task is lost."""
    alice = await Watched.connect(system, "alice")
    async with alice.plain:
        for name in ("agent-work", "registrar", "archivist", "console"):
            tasks = [await alice.plain.submit("work", {"text": str(n), "seconds": 0.05}) for n in range(10)]
            assert (await dspex("secure", "rotate", name)).json == {"rotated": name, "in_force": True}
            for n, task in enumerate(tasks):
                assert (await alice.plain.final("work", task)).json["text"] == str(n)
            assert await alice.works()
        assert not alice.lost.is_set()
    ran = await dspex("secure", "rotate", "nobody")
    assert ran.code == 2 and "there is no identity nobody" in ran.err


async def test_a_program_comes_from_another_machine(system: Running, dspex: Any, tmp_path: Path) -> None:
    """Its identity is made here and carried there, as is who it connects to."""
    made = (await dspex("secure", "init", "--program", "again")).json
    assert (made["made"], made["in_force"]) == (["agent-again"], True)
    there = tmp_path / "there"
    shutil.copytree(system.data / "secure", there / "secure")
    joining = Running(there, (f"{LASTING}:Again", 1), nats=system.url, secure=True, archive=False)
    await asyncio.to_thread(joining.start)
    try:
        async with await connect(system.url, identities(system.data).context(Role.CLIENT, "alice")) as alice:
            book = tmp_path / "book"
            task = await alice.submit("again", {"task": "a", "times": 1, "book": str(book)})
            assert (await alice.final("again", task)).code is None
            assert (await alice.ask("work", {"text": "still"})).json["text"] == "still"
    finally:
        await asyncio.to_thread(joining.end)


async def test_a_seed_that_was_made_and_not_told_is_taken_later(tmp_path: Path) -> None:
    """Who dies while it rotates has written the seed and nothing else."""
    secured = identities(tmp_path / "data", "alice")
    before = {user.name: user.public for user in secured.users}
    from dspex.bus.identity import make_seed

    public = make_seed(Path(secured.context(Role.CLIENT, "alice")).with_suffix(".nk"), anew=True)
    after = {user.name: user.public for user in identities(tmp_path / "data").users}
    assert after == before | {"alice": public}
    assert public in (tmp_path / "data" / "secure" / "access.conf").read_text()
    assert json.loads((tmp_path / "data" / "secure" / "identities.json").read_text())["prefix"] == "dspex"
