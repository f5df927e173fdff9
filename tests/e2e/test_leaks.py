"""What a hostile client does, against one account with permissions, and against ours.

Each test is both halves: the same attack works where clients and the log share an account, even though its user may
not publish events, and does nothing on a system that was started with `--secure`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from nats.errors import Error as NatsError
from nats.errors import NoRespondersError
from nats.js.errors import Error as JetStreamError
from nats.js.errors import NotFoundError
from tests.e2e.guarded import connect, identities, refusals
from tests.e2e.plain import Plain
from tests.e2e.running import PROGRAMS, Running

from dspex.bus.server import Server
from dspex.core.access import Role

LASTING = Path(__file__).parent / "lasting.py"
PLANS = ((f"{PROGRAMS}:Work", 1), (f"{LASTING}:Waits", 1))
ONE_ACCOUNT = """
authorization { users = [
  { user: system, password: s }
  { user: client, password: c, permissions: { publish: { deny: ["dspex.event.>"] }, subscribe: ["_INBOX.>"] } }
] }
"""
GARBAGE = 40
MOMENT = 0.4
"""Seconds in which an attack has had its effect, if it has one."""


@dataclass
class Side:
    """One of the two setups: the attacker, a client who is no friend of his, and somebody who sees everything."""

    mallory: Plain
    alice: Plain
    god: Plain
    timers: str

    async def last(self, subject: str, stream: str = "DSPEX") -> bytes | None:
        """The newest message on a subject."""
        with suppress(NotFoundError):
            return (await self.god.nc.jetstream().get_last_msg(stream, subject)).data
        return None

    async def count(self, subject: str, stream: str) -> int:
        info = await self.god.nc.jetstream().stream_info(stream, subjects_filter=subject)
        return sum((info.state.subjects or {}).values())

    async def send(self, subject: str, body: bytes = b"{}", **more: Any) -> None:
        await self.mallory.nc.publish(subject, body, **more)
        await self.mallory.nc.flush()
        await asyncio.sleep(MOMENT)


@pytest.fixture(scope="module")
def one_account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A system whose clients are in the log's account."""
    folder = tmp_path_factory.mktemp("open")
    rules = folder / "rules.conf"
    rules.write_text(ONE_ACCOUNT)
    with Server(folder / "nats", access=rules) as server:
        url = server.url.replace("//", "//system:s@")
        with Running(folder / "data", *PLANS, nats=url) as system:
            yield system


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A system with access rules."""
    data = tmp_path_factory.mktemp("guarded") / "data"
    identities(data, "alice", "mallory")
    with Running(data, *PLANS, secure=True) as system:
        yield system


@pytest.fixture
async def plain_side(one_account: Running) -> AsyncIterator[Side]:
    url = one_account.url
    client = url.replace("system:s", "client:c")
    async with await Plain.connect(client) as mallory, await Plain.connect(client) as alice:
        async with await Plain.connect(url) as god:
            yield Side(mallory, alice, god, "DSPEX_TIMER")


@pytest.fixture
async def our_side(guarded: Running) -> AsyncIterator[Side]:
    secured, url = identities(guarded.data), guarded.url
    who = [(Role.CLIENT, "mallory"), (Role.CLIENT, "alice"), (Role.OPERATOR, "")]
    clients = [await connect(url, secured.context(role, name)) for role, name in who]
    yield Side(clients[0], clients[1], clients[2], "DSPEX_TIMER_waits")
    for client in clients:
        await client.close()


# -- the five known leaks, and the garbage


async def test_a_reply_subject_makes_the_server_write_an_event(plain_side: Side, our_side: Side) -> None:
    async def attack(side: Side, task: str) -> bool:
        forged = f"dspex.event.task.work.{task}"
        await side.send("dspex.task.work", b'{"text": "deputy"}', reply=forged)
        return await side.last(forged) is not None

    assert await attack(plain_side, "900001")
    assert not await attack(our_side, "900001")


async def test_a_reply_subject_makes_an_agent_write_an_event(plain_side: Side, our_side: Side) -> None:
    async def attack(side: Side, door: str, task: str) -> bool:
        forged = f"dspex.event.task.work.{task}"
        await side.send(f"dspex.{door}.work", b'{"no": "input"}', reply=forged)
        return await side.last(forged) is not None

    for number, door in enumerate(("ask", "result")):
        assert await attack(plain_side, door, f"90001{number}"), door
        assert not await attack(our_side, door, f"90001{number}"), door


async def test_a_header_forges_a_scheduled_message(plain_side: Side, our_side: Side) -> None:
    async def attack(side: Side) -> bool:
        headers = {"Nats-Schedule": "@at 2099-01-01T00:00:00Z", "Nats-Schedule-Target": "dspex.wake.waits"}
        await side.send("dspex.timer.waits.900002", headers=headers)
        return await side.last("dspex.timer.waits.900002", side.timers) is not None

    assert await attack(plain_side)
    assert not await attack(our_side)


async def test_a_rollup_header_wipes_the_timers_of_others(plain_side: Side, our_side: Side, tmp_path: Path) -> None:
    async def attack(side: Side) -> bool:
        wait = {"task": "a", "book": str(tmp_path / "book"), "do": "sleep", "seconds": 600}
        task = await side.alice.submit("waits", wait)
        timer = f"dspex.timer.waits.{task}"
        async with asyncio.timeout(20):
            while await side.last(timer, side.timers) is None:
                await asyncio.sleep(0.05)
        for subject in ("dspex.timer.waits.900003", "dspex.wake.waits", "dspex.outcome.waits", "dspex.task.waits"):
            await side.send(subject, headers={"Nats-Rollup": "all"})
        return await side.last(timer, side.timers) is None

    assert await attack(plain_side)
    assert not await attack(our_side)


async def test_a_message_id_sent_first_swallows_the_message_of_another(plain_side: Side, our_side: Side) -> None:
    async def attack(side: Side) -> bool:
        mark = {"Nats-Msg-Id": "work/order-17"}
        await side.send("dspex.outcome.work", b'{"task": 1, "score": 0}', headers=mark)
        ack = await side.alice.nc.jetstream().publish("dspex.task.work", b'{"text": "mine"}', headers=mark)
        return bool(ack.duplicate)

    assert await attack(plain_side)
    assert not await attack(our_side)


async def test_a_call_of_the_stream_api_erases_an_event(plain_side: Side, our_side: Side) -> None:
    async def attack(side: Side) -> bool:
        task = await side.alice.submit("work", {"text": "precious"})
        await side.alice.final("work", task)
        event = f"dspex.event.task.work.{task}"
        message = await side.god.nc.jetstream().get_last_msg("DSPEX", event)
        calls = {
            "STREAM.MSG.DELETE.DSPEX": {"seq": message.seq}, "STREAM.PURGE.DSPEX": {"filter": event},
            "STREAM.DELETE.DSPEX_LEASE": {}, "CONSUMER.DELETE.DSPEX.signal-work": {},
        }  # fmt: skip
        answers = []
        for verb, body in calls.items():
            for start in ("$JS.API.", "dspex.api.", "$JS.DSPEX.API."):
                with suppress(NatsError, JetStreamError):
                    answers.append(await side.mallory.nc.request(start + verb, json.dumps(body).encode(), timeout=MOMENT))
        done = any(json.loads(answer.data or b"{}").get("success") for answer in answers)
        return done and await side.last(event) is None

    # The open half destroys what it runs on, so it comes last.
    assert not await attack(our_side)
    assert await our_side.last("dspex.event.program.work.0") is not None
    assert await attack(plain_side)


async def test_garbage_on_the_subject_of_an_event_blocks_a_task(plain_side: Side, our_side: Side) -> None:
    """Where everybody may publish, as on a system that is open to all: there is no rule against it."""

    async def attack(side: Side, sender: Plain) -> bool:
        head = (await side.god.nc.jetstream().stream_info("DSPEX")).state.last_seq
        for ahead in range(GARBAGE + 1, 2 * GARBAGE):  # what is stored takes positions of its own
            await sender.nc.publish(f"dspex.event.task.work.{head + ahead}", b"garbage")
        await sender.nc.flush()
        await asyncio.sleep(MOMENT)
        stored = (await side.god.nc.jetstream().stream_info("DSPEX")).state.last_seq - head
        for _ in range(GARBAGE - stored):
            await side.alice.submit("work", {"text": "before"})
        task = await side.alice.submit("work", {"text": "through"})
        reply = await side.alice.nc.request("dspex.result.work", str(task).encode(), timeout=5, headers={"Dspex-Wait": "2"})
        return "Nats-Service-Error-Code" in (reply.headers or {})

    assert await attack(plain_side, plain_side.god)
    assert not await attack(our_side, our_side.mallory)


# -- one client and another


async def test_a_client_reads_its_own_results_only(our_side: Side) -> None:
    task = await our_side.alice.submit("work", {"text": "mine"}, headers={"Dspex-Key": "order-1"})
    asked = await our_side.alice.ask("work", {"text": "asked"})
    for name in (task, "order-1", asked.task):
        assert (await our_side.alice.final("work", name)).json["text"] in ("mine", "asked")
        refused = await our_side.mallory.result("work", name, wait="0")
        assert (refused.code, refused.error["type"]) == (404, "NotFound")
    # What the server says of the sender cannot be said by the sender.
    forged = {"Nats-Request-Info": '{"acc":"CLIENT_alice"}', "Dspex-Wait": "0"}
    reply = await our_side.mallory.nc.request("dspex.result.work", str(task).encode(), headers=forged)
    assert (reply.headers or {})["Nats-Service-Error-Code"] == "404"


async def test_a_clients_keys_are_its_own(our_side: Side) -> None:
    key = {"Dspex-Key": "order-2"}
    theirs = await our_side.mallory.submit("work", {"text": "poison"}, headers=key)
    mine = await our_side.alice.submit("work", {"text": "mine"}, headers=key)
    assert (await our_side.alice.final("work", mine)).json["text"] == "mine"
    again = await our_side.alice.submit("work", {"text": "again"}, headers=key)
    assert (await our_side.alice.final("work", again)).json["text"] == "mine"
    assert (await our_side.mallory.final("work", theirs)).json["text"] == "poison"


async def test_a_signal_reaches_only_a_task_of_its_sender(our_side: Side, tmp_path: Path) -> None:
    book = tmp_path / "book"
    book.touch()
    task = await our_side.alice.submit("waits", {"task": "s", "book": str(book), "do": "signal"})
    for name in ("go", "cancel"):
        await our_side.mallory.store("signal", "waits", {"task": task, "name": name, "value": "forged"})
    await asyncio.sleep(1.0)
    assert (await our_side.alice.result("waits", task, wait="0")).code == 202
    await our_side.alice.store("signal", "waits", {"task": task, "name": "go", "value": "on"})
    assert (await our_side.alice.final("waits", task)).json["said"] == "on"


async def test_a_fork_shares_only_what_its_owner_may_see(our_side: Side) -> None:
    parent = await our_side.alice.submit("work", {"text": "mine"})
    await our_side.alice.final("work", parent)
    fork = {"Dspex-Fork": f"{parent}@1"}
    own = await our_side.alice.submit("work", {"text": "own"}, headers=fork)
    assert (await our_side.alice.final("work", own)).code is None
    theirs = await our_side.mallory.submit("work", {"text": "theirs"}, headers=fork)
    assert (await our_side.mallory.final("work", theirs)).code == 404


async def test_nobody_hears_what_another_is_told(our_side: Side) -> None:
    heard: list[bytes] = []

    async def take(message: Any) -> None:
        heard.append(message.data)

    for subject in (">", "_INBOX.>", "_INBOX_alice.>", "dspex.>", "dspex.event.>", "_R_.>", "$JS.>"):
        await our_side.mallory.nc.subscribe(subject, cb=take)
    reply = await our_side.alice.ask("work", {"text": "between us"})
    assert reply.json["text"] == "between us"
    await asyncio.sleep(MOMENT)
    assert heard == []


async def test_what_is_not_a_clients_does_not_exist_for_it(our_side: Side) -> None:
    subjects = (
        "dspex.log.read", "dspex.archive.verify", "dspex.registry.register", "dspex.lease.registrar", "dspex.wake.work",
        "dspex.task.work.CLIENT_alice", "dspex.event.task.work.1", "$SRV.PING", "dspex.api.STREAM.MSG.GET.DSPEX",
    )  # fmt: skip
    for subject in subjects:
        with pytest.raises(NoRespondersError):
            await our_side.mallory.nc.request(subject, b"{}", timeout=2)


# -- an agent


async def test_an_agent_serves_its_program_and_nothing_else(guarded: Running, our_side: Side) -> None:
    """Somebody has the seed of an agent of `work`: what they can reach is `work`."""
    agent = await connect(guarded.url, identities(guarded.data).context(Role.AGENT, "work"))
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error))

    agent.nc._error_cb = note
    try:
        wanted = [
            "dspex.event.task.waits.900004", "dspex.event.program.waits.0", "dspex.event.key.waits.x", "dspex.lease.registrar",
            "dspex.timer.waits.1", "dspex.wake.waits", "dspex.log.read", "$JS.API.STREAM.PURGE.DSPEX",
            "dspex.api.STREAM.PURGE.DSPEX", "dspex.api.CONSUMER.MSG.NEXT.DSPEX.task-waits", "$JS.ACK.DSPEX.task-waits.1.1.1.1.0",
        ]  # fmt: skip
        before = (await our_side.god.nc.jetstream().stream_info("DSPEX")).state.last_seq
        for subject in wanted:
            await agent.nc.publish(subject, b"[]")
        await agent.nc.flush()
        for _ in range(50):
            if len(refused) == len(wanted):
                break
            await asyncio.sleep(0.05)
        assert len(refused) == len(wanted)
        assert len(refusals(guarded.data / "server" / "nats.log")) >= len(wanted)
        # A reply subject is of no help: what comes back comes to the agent's own account.
        forged = "dspex.event.task.waits.900005"
        for subject, body in (
            ("dspex.api.STREAM.MSG.GET.DSPEX", b'{"seq": 1}'), ("dspex.task.waits", b"{}"), ("dspex.task.work", b"{}"),
            ("dspex.api.CONSUMER.MSG.NEXT.DSPEX.task-work", b'{"batch": 1, "expires": 100000000}'),
        ):  # fmt: skip
            await agent.nc.publish(subject, body, reply=forged)
        await agent.nc.flush()
        await asyncio.sleep(MOMENT)
        assert await our_side.last(forged) is None
        after = (await our_side.god.nc.jetstream().stream_info("DSPEX")).state.last_seq
        assert after > before, "it may submit, and did"
        # What it writes into its own timers touches nobody else's.
        wait = {"task": "t", "book": "", "do": "sleep", "seconds": 600}
        task = await our_side.alice.submit("waits", wait | {"book": str(guarded.data.parent / "book")})
        timer = f"dspex.timer.waits.{task}"
        async with asyncio.timeout(20):
            while await our_side.last(timer, our_side.timers) is None:
                await asyncio.sleep(0.05)
        for headers in (
            {"Nats-Rollup": "all"}, {"Nats-Schedule": "@at 2020-01-01T00:00:00Z", "Nats-Schedule-Target": timer},
        ):  # fmt: skip
            with suppress(NatsError, JetStreamError):
                await agent.nc.jetstream().publish("dspex.timer.work.1", b"{}", headers=headers, timeout=1)
        assert await our_side.last(timer, our_side.timers) is not None
        # It cannot make another program known either.
        registration = {"program": "waits", "fingerprint": "x", "doc": "", "input_schema": {}, "output_schema": {},
                        "variables": {}, "app": ""}  # fmt: skip
        body = json.dumps({"registration": registration, "replace": True}).encode()
        reply = await agent.nc.request("dspex.registry.register", body, timeout=5)
        assert (reply.headers or {})["Nats-Service-Error-Code"] == "400"
    finally:
        await agent.close()
