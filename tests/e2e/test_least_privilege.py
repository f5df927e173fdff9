"""What one who has the nkey of one program's agent, or of a client, tries against another program and another tenant.

A table: each row is an attack with what it reaches in the end. It is made twice: in one account whose rules are those
that its users need at least (they may call JetStream and send to doors, and may not write another program's events),
where it works; and as each attacker on a system that was started with `--secure`, where it does not.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
from nats.errors import Error as NatsError
from nats.js.errors import Error as JetStreamError
from tests.e2e.guarded import connect, identities
from tests.e2e.plain import Plain
from tests.e2e.running import PROGRAMS, Running

from dspex.bus.server import Server
from dspex.core.access import Role

LASTING = Path(__file__).parent / "lasting.py"
PLANS = ((f"{PROGRAMS}:Work", 1), (f"{PROGRAMS}:Long", 1), (f"{LASTING}:Waits", 1), (f"{LASTING}:Again", 1), (f"{LASTING}:Steps", 1))
ONE_ACCOUNT = """
authorization { users = [
  { user: system, password: s }
  { user: again, password: a, permissions: {
    publish: { allow: ["dspex.>", "$JS.API.>", "$JS.ACK.>", "$KV.>", "$O.>", "$SRV.>", "_INBOX.>"], deny: [
      "dspex.event.*.work.>", "dspex.event.*.waits.>", "dspex.event.*.steps.>"] }, subscribe: ["_INBOX.>", "dspex.>"] } }
] }
"""
SOON = 0.3
"""Seconds in which an attack has had its effect, if it is to have none."""
LONG = 30.0

pytestmark = pytest.mark.timeout(300)


@dataclass
class Side:
    """One of the two setups: the attacker, a tenant who is no friend of his, and somebody who sees everything."""

    mallory: Plain
    alice: Plain
    god: Plain
    timers: str
    works: bool
    book: Path

    async def tried(self, subject: str, body: bytes = b"", **more: Any) -> bytes | None:
        """What is answered to a request; None when nobody does, or says no."""
        with suppress(NatsError, JetStreamError):
            reply = await self.mallory.nc.request(subject, body, timeout=LONG if self.works else SOON, **more)
            if "Nats-Service-Error-Code" in (reply.headers or {}) or "Status" in (reply.headers or {}):
                return None
            return None if b'"error"' in reply.data else reply.data
        return None

    async def comes(self, true: Callable[[], Awaitable[Any]]) -> bool:
        """Whether it becomes true: long waited for where it is to, and not where it is not."""
        until = time.monotonic() + (LONG if self.works else SOON)
        while not (found := bool(await true())) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return found

    async def last(self, subject: str, stream: str = "DSPEX") -> Any:
        with suppress(JetStreamError):
            return await self.god.nc.jetstream().get_last_msg(stream, subject)
        return None


Attack = Callable[[Side], Awaitable[bool]]
ATTACKS: dict[str, Attack] = {}


def attack(one: Attack) -> Attack:
    ATTACKS[one.__name__] = one
    return one


async def _secret_task(side: Side) -> int:
    """A task of alice's that has ended, with an input that nobody else should see."""
    task = await side.alice.submit("work", {"text": "for my eyes only"})
    await side.alice.final("work", task)
    return int(task)


@attack
async def reads_the_submission_of_another(side: Side) -> bool:
    task = await _secret_task(side)
    found = [
        await side.tried(f"{start}STREAM.MSG.GET.DSPEX", json.dumps({"seq": task}).encode())
        for start in ("$JS.API.", "dspex.api.")
    ]
    found += [
        await side.tried(door, json.dumps({"position": task}).encode())
        for door in ("dspex.rows.again", "dspex.rows.work", "dspex.log.rows")
    ]
    found.append(await side.tried("dspex.log.read", json.dumps({"task": task}).encode()))
    return any(each is not None and (b"eyes" in each or b"Zm9yIG15" in each or b"data" in each) for each in found)


@attack
async def reads_the_events_of_another(side: Side) -> bool:
    task = await _secret_task(side)
    name = f"task.work.{task}"
    asked = [
        {"aggregate": name}, {"last": name}, {"subject": f"dspex.event.{name}"}, {"subject": "dspex.event.task.*.*"},
        {"subject": "dspex.event.*.>"}, {"subject": ">"}, {}, {"subject": f"dspex.event.task.again.{task}", "last": name},
    ]  # fmt: skip
    found = [await side.tried("dspex.rows.again", json.dumps(each).encode()) for each in asked]
    for start in ("$JS.API.", "dspex.api."):
        found.append(await side.tried(f"{start}DIRECT.GET.DSPEX.dspex.event.{name}"))
        found.append(await side.tried(f"{start}STREAM.MSG.GET.DSPEX", json.dumps({"last_by_subj": f"dspex.event.{name}"}).encode()))
    return any(each is not None and (b"TaskCompleted" in each or b"VGFza0NvbX" in each or b"data" in each) for each in found)


@attack
async def follows_the_log_with_a_consumer_of_its_own(side: Side) -> bool:
    inbox = side.mallory.nc.new_inbox()
    config = {"deliver_subject": inbox, "deliver_policy": "all", "ack_policy": "none", "filter_subject": "dspex.task.work"}
    body = json.dumps({"stream_name": "DSPEX", "config": config}).encode()
    made = [await side.tried(f"{start}CONSUMER.CREATE.DSPEX", body) for start in ("$JS.API.", "dspex.api.")]
    return any(each is not None and b"created" in each for each in made)


@attack
async def writes_an_event_of_another(side: Side) -> bool:
    """By its subject, and by the server's own hand: an acknowledgement that is stored where a reply subject says."""
    task = 900_000 + (time.monotonic_ns() % 10_000)
    forged = f"dspex.event.task.work.{task}"
    await side.mallory.nc.publish(forged, b"[]")
    await side.mallory.nc.publish("dspex.task.again", b"{}", reply=forged)
    await side.mallory.nc.flush()
    return await side.comes(lambda: side.last(forged))


@attack
async def activates_values_of_another(side: Side) -> bool:
    forged = f"dspex.event.variables.work.{time.monotonic_ns()}"
    await side.mallory.nc.publish(forged, b"[]")
    await side.mallory.nc.publish("dspex.task.again", b"{}", reply=forged)
    proposal = json.dumps({"values": {"tone": "rude"}}).encode()
    if not side.works:
        assert await side.tried("dspex.variables.work.propose", proposal) is None
        assert await side.tried("dspex.variables.work.activate", proposal) is None
    await side.mallory.nc.flush()
    return await side.comes(lambda: side.last(forged))


@attack
async def acknowledges_the_delivery_of_another(side: Side) -> bool:
    """A task that runs is taken for done: the agent that dies now leaves it behind."""
    js = side.god.nc.jetstream()
    task = await side.alice.submit("long", {"text": "slow", "seconds": 50})

    async def held() -> bool:
        return (await js.consumer_info("DSPEX", "task-long")).num_ack_pending == 1

    until = time.monotonic() + LONG
    while not await held():
        assert time.monotonic() < until
        await asyncio.sleep(0.02)
    delivered = (await js.consumer_info("DSPEX", "task-long")).delivered
    for number in range(max(1, delivered.consumer_seq - 3), delivered.consumer_seq + 1):
        await side.mallory.nc.publish(f"$JS.ACK.DSPEX.task-long.1.{task}.{number}.{time.time_ns()}.0", b"+TERM")
    await side.mallory.nc.flush()

    async def lost() -> bool:
        return not await held() and (await side.alice.result("long", task, wait="0")).code == 202

    gone = await side.comes(lost)
    await side.alice.store("signal", "long", {"task": task, "name": "cancel"})
    await side.alice.final("long", task)
    return gone


@attack
async def takes_the_tasks_of_another(side: Side) -> bool:
    inbox, got = side.mallory.nc.new_inbox(), asyncio.Event()

    async def take(message: Any) -> None:
        if message.data:
            got.set()

    subscription = await side.mallory.nc.subscribe(inbox, cb=take)
    for start in ("$JS.API.", "dspex.api."):
        pull = json.dumps({"batch": 50, "expires": 5_000_000_000}).encode()
        await side.mallory.nc.publish(f"{start}CONSUMER.MSG.NEXT.DSPEX.task-work", pull, reply=inbox)
    await side.mallory.nc.flush()
    tasks = [await side.alice.submit("work", {"text": "fair share"}) for _ in range(30)]
    with suppress(TimeoutError):
        await asyncio.wait_for(got.wait(), LONG if side.works else SOON)
    await subscription.unsubscribe()
    for task in tasks:
        await side.alice.final("work", task)
    return got.is_set()


@attack
async def arms_and_wakes_tasks_of_another(side: Side) -> bool:
    js = side.god.nc.jetstream()
    before = (await js.stream_info(side.timers)).state.last_seq
    await side.mallory.nc.publish("dspex.wake.waits", b'{"task": "1"}')
    await side.mallory.nc.publish(
        "dspex.timer.waits.1", b'{"task": "1"}',
        headers={"Nats-Schedule": "@at 2099-01-01T00:00:00Z", "Nats-Schedule-Target": "dspex.wake.waits"},
    )  # fmt: skip
    await side.mallory.nc.flush()

    async def more() -> bool:
        return (await js.stream_info(side.timers)).state.last_seq > before

    return await side.comes(more)


@attack
async def reads_the_result_of_another_tenant(side: Side) -> bool:
    task = await _secret_task(side)
    found = await side.tried("dspex.result.work", str(task).encode(), headers={"Dspex-Wait": "0"})
    return found is not None and b"eyes" in found


@attack
async def cancels_the_task_of_another_tenant(side: Side) -> bool:
    body = {"task": "c", "book": str(side.book), "do": "signal"}
    task = await side.alice.submit("waits", body)
    await side.mallory.nc.publish("dspex.signal.waits", json.dumps({"task": task, "name": "cancel"}).encode())
    await side.mallory.nc.flush()

    async def ended() -> bool:
        return (await side.alice.result("waits", task, wait="0")).code != 202

    found = await side.comes(ended)
    await side.alice.store("signal", "waits", {"task": task, "name": "go", "value": "on"})
    await side.alice.final("waits", task)
    return found


@attack
async def hears_what_another_is_told(side: Side) -> bool:
    heard = asyncio.Event()

    async def take(message: Any) -> None:
        if b"between us" in message.data:
            heard.set()

    found = [await side.mallory.nc.subscribe(subject, cb=take) for subject in ("dspex.>", "_INBOX.>", "_R_.>", "dspex.event.>")]
    await side.mallory.nc.flush()
    assert (await side.alice.ask("work", {"text": "between us"})).json["text"] == "between us"
    await asyncio.sleep(SOON)
    for subscription in found:
        with suppress(NatsError):
            await subscription.unsubscribe()
    return heard.is_set()


@attack
async def stops_the_agents_of_another(side: Side) -> bool:
    """The order arrives: somebody who listens where an agent of `work` does hears it."""
    heard = asyncio.Event()

    async def take(message: Any) -> None:
        heard.set()

    account = side.god if side.works else side.alice
    subscription = await side.god.nc.subscribe("dspex.control.>", cb=take)
    await account.nc.flush()
    await side.god.nc.flush()
    await side.mallory.nc.publish("dspex.control.work.cancel", b'{"task": 0}')
    await side.mallory.nc.publish("dspex.control.work.drain", b'{"task": 0}')
    await side.mallory.nc.flush()
    with suppress(TimeoutError):
        await asyncio.wait_for(heard.wait(), LONG if side.works else SOON)
    await subscription.unsubscribe()
    return heard.is_set()


@attack
async def changes_the_limits_of_another(side: Side) -> bool:
    wanted = json.dumps({"scope": "work", "limits": {"rate": "100000/s"}}).encode()
    return await side.tried("dspex.limits.set", wanted) is not None


@attack
async def borrows_from_the_budget_of_another(side: Side) -> bool:
    said = json.dumps({"holder": "work-mallory-1", "agent": "work-mallory-1"}).encode()
    found = [await side.tried(f"dspex.limits.lease.{program}", said) for program in ("work", "again")]
    return any(each is not None for each in found)


@attack
async def takes_the_lease_of_the_registrar(side: Side) -> bool:
    before = await side.last("dspex.lease.archivist", "DSPEX_LEASE")
    await side.mallory.nc.publish("dspex.lease.archivist", b'{"holder": "mallory"}')
    await side.mallory.nc.flush()

    async def taken() -> bool:
        newest = await side.last("dspex.lease.archivist", "DSPEX_LEASE")
        return bool(newest and newest.data != before.data and b"mallory" in newest.data)

    return await side.comes(taken)


@attack
async def changes_or_erases_the_log(side: Side) -> bool:
    task = await _secret_task(side)
    calls = {"STREAM.MSG.DELETE.DSPEX": {"seq": task}, "STREAM.UPDATE.DSPEX": {"name": "DSPEX"}, "STREAM.PURGE.DSPEX": {"filter": "x"}}
    found = [
        await side.tried(start + verb, json.dumps(body).encode())
        for verb, body in calls.items() for start in ("$JS.API.", "dspex.api.") if not side.works or "DELETE" in verb
    ]  # fmt: skip
    erased = await side.tried("dspex.rows.again", json.dumps({"erase": task}).encode())
    assert erased is None or b"error" in erased
    return any(each is not None and b"success" in each for each in found)


@attack
async def makes_another_program_known_as_its_own(side: Side) -> bool:
    """Last: the open side has lost its program then."""
    registration = {
        "program": "steps", "fingerprint": "mine", "doc": "", "input_schema": {}, "output_schema": {}, "variables": {}, "app": "",
    }  # fmt: skip
    body = json.dumps({"registration": registration, "replace": True}).encode()
    found = [await side.tried(f"dspex.registry.{door}", body) for door in ("register", "register.steps", "register.again")]
    return any(each is not None for each in found)


@pytest.fixture(scope="module")
def one_account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("open")
    rules = folder / "rules.conf"
    rules.write_text(ONE_ACCOUNT)
    with Server(folder / "nats", access=rules) as server:
        with Running(folder / "data", *PLANS, nats=server.url.replace("//", "//system:s@")) as system:
            yield system


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("guarded") / "data"
    identities(data, "alice", "mallory")
    with Running(data, *PLANS, secure=True) as system:
        yield system


@pytest.fixture
async def plain_side(one_account: Running, tmp_path: Path) -> AsyncIterator[Side]:
    url = one_account.url
    (tmp_path / "book").touch()
    async with await Plain.connect(url.replace("system:s", "again:a")) as mallory, await Plain.connect(url) as god:
        async with await Plain.connect(url) as alice:
            yield Side(mallory, alice, god, "DSPEX_TIMER", True, tmp_path / "book")


@pytest.fixture
async def our_sides(guarded: Running, tmp_path: Path) -> AsyncIterator[dict[str, Side]]:
    """The attacker as an agent of `again`, and as a client, who is another tenant."""
    secured, url = identities(guarded.data), guarded.url
    (tmp_path / "book").touch()
    alice = await connect(url, secured.context(Role.CLIENT, "alice"))
    god = await connect(url, secured.context(Role.OPERATOR))
    found = {
        "agent": await connect(url, secured.context(Role.AGENT, "again")),
        "client": await connect(url, secured.context(Role.CLIENT, "mallory")),
    }
    yield {who: Side(one, alice, god, "DSPEX_TIMER_waits", False, tmp_path / "book") for who, one in found.items()}
    for client in (alice, god, *found.values()):
        await client.close()


@pytest.mark.parametrize("name", ATTACKS)
async def test_what_works_in_one_account_does_not_in_ours(name: str, plain_side: Side, our_sides: dict[str, Side]) -> None:
    for who, side in our_sides.items():
        assert not await ATTACKS[name](side), who
    assert await ATTACKS[name](plain_side), "the attack itself does not work"


async def test_both_systems_work_on(our_sides: dict[str, Side]) -> None:
    """After all that: the attacker's own program serves, and so do the others."""
    side = our_sides["agent"]
    assert (await side.alice.ask("work", {"text": "still here"})).json["text"] == "still here"
    rows = msgspec.msgpack.decode((await side.mallory.nc.request("dspex.rows.again", b'{"limit": 0}', timeout=LONG)).data)
    assert rows["head"] > 0
