"""Limits hold across all processes, whoever dies, on both logs, and follow what is set while everything runs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tests.console.shells import Ran
from tests.e2e.guarded import identities, refusals
from tests.e2e.running import Running, until

from dspex.compose.caller import Caller
from dspex.console.main import run
from dspex.core import headers as h
from dspex.core.access import Role
from dspex.core.audit import audit
from dspex.core.errors import BudgetExhausted, LimitExceeded, TaskError, Unavailable
from dspex.core.events import Event

LIMITED = Path(__file__).parent / "limited.py"
Launch = Callable[..., Running]
BOTH = pytest.mark.parametrize("log", ["jetstream", "sqlite"])
PATIENCE = 60.0
"""Seconds for what has to happen some time."""


def plan(name: str, agents: int) -> tuple[str, int]:
    return f"{LIMITED}:{name}", agents


async def submit(caller: Caller, program: str, count: int, headers: dict[str, str] | None = None, **fields: Any) -> list[str]:
    body = json.dumps(fields).encode()
    return list(await asyncio.gather(*(caller.submit(program, body, headers=headers) for _ in range(count))))


async def ends(caller: Caller, program: str, tasks: list[str]) -> list[dict[str, Any] | TaskError]:
    """How each ended."""

    async def end(task: str) -> dict[str, Any] | TaskError:
        try:
            return dict(json.loads(await caller.result(program, task, timeout=PATIENCE)))
        except TaskError as error:
            assert error.code != 202, f"task {task} did not end"
            return error

    return list(await asyncio.gather(*map(end, tasks)))


async def all_events(caller: Caller) -> list[Event]:
    return [event async for page in caller.pages() for event in page]


async def until_so(condition: Callable[[], Any], what: str) -> Any:
    """Wait for something that is awaited each time."""
    for _ in range(int(PATIENCE / 0.1)):
        if found := await condition():
            return found
        await asyncio.sleep(0.1)
    raise AssertionError(what)


async def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    """As from the command line, and sooner: in this process."""
    capsys.readouterr()
    code = await asyncio.to_thread(run, list(arguments))
    said = capsys.readouterr()
    return Ran(code, said.out, said.err)


class Counter:
    """How many programs are at work, as somebody outside counts them: one connection each. `most` were so at once."""

    def __init__(self) -> None:
        self.now = self.most = self.begun = 0

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator[tuple[Counter, int]]:
        counter = cls()
        server = await asyncio.start_server(counter.take, "127.0.0.1", 0)
        async with server:
            yield counter, server.sockets[0].getsockname()[1]

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.now, self.begun = self.now + 1, self.begun + 1
        self.most = max(self.most, self.now)
        try:
            await reader.read()
        except ConnectionError:
            pass
        finally:
            self.now -= 1
            writer.close()


async def test_a_rate_holds_for_all_agents_together(systems: Launch) -> None:
    with systems(plan("Quick", 4), limits={"quick": {"rate": "20/s"}}) as system:
        async with await Caller.connect(system.url) as caller:
            tasks = await submit(caller, "quick", 100)
            await ends(caller, "quick", tasks)
            told = await all_events(caller)
        said = await asyncio.to_thread(system.event, "limit")
    assert said["reason"].startswith("quick has reached 80 % of its rate limit: ")
    begun = sorted(datetime.fromisoformat(event.time).timestamp() for event in told if event.type == "TaskClaimed")
    assert len(begun) == 100
    for first in range(0, 100, 9):
        for last in range(first + 9, 100, 9):
            # The rate, a second's worth, a token of each agent; and the time in which a busy machine was late.
            assert last - first <= 20 * (begun[last] - begun[first] + 1.5) + 20 + 4
    percents = [event.data.percent for event in told if event.type == "LimitReached"]  # type: ignore[attr-defined]
    assert sorted(set(percents)) == [80, 100]


@BOTH
async def test_no_more_are_at_work_than_may_be_whoever_is_killed(systems: Launch, log: str) -> None:
    system = systems(plan("Counted", 4), log=log, limits={"counted": {"concurrency": "3"}})
    async with Counter.open() as (counter, port):
        with system:
            async with await Caller.connect(system.url) as caller:
                tasks = await submit(caller, "counted", 4, port=port, seconds=0.1, nap=2.0)
                tasks += await submit(caller, "counted", 26, port=port, seconds=0.2)
                await until_so(lambda: _so(counter.begun >= 5), "nobody began")
                os.kill(system.agent_pids()[0], signal.SIGKILL)
                await until_so(lambda: _so(counter.begun >= 15), "nobody went on")
                os.kill(system.registrar(), signal.SIGKILL)
                done = await ends(caller, "counted", tasks)
    assert done == [{"done": True}] * 30
    assert counter.most == 3


async def _so(condition: bool) -> bool:
    return condition


@BOTH
async def test_a_budget_is_never_exceeded_whoever_is_killed_and_all_adds_up(
    systems: Launch, log: str, tmp_path: Path
) -> None:
    line = tmp_path / "line"
    system = systems(plan("Costly", 3), log=log, limits={"costly": {"usd": "0.5", "calls": "1000/day"}})
    with system:
        async with await Caller.connect(system.url) as caller:
            tasks = await submit(caller, "costly", 16, line=str(line), times=3, seconds=0.05, catch=True)
            await asyncio.to_thread(until, lambda: _lines(line) >= 4)
            os.kill(system.agent_pids()[0], signal.SIGKILL)
            await asyncio.to_thread(until, lambda: _lines(line) >= 9)
            os.kill(system.registrar(), signal.SIGKILL)
            done = await ends(caller, "costly", tasks)
            told = await all_events(caller)
            costs = json.loads(await caller.archive("costs", {"by": ["program"], "position": await caller.head()}))
    assert all(isinstance(end, dict) for end in done)
    paid = sum(end["paid"] for end in done if isinstance(end, dict))
    recorded = [event.data.usage for event in told if event.type == "EffectRecorded" and event.data.usage]  # type: ignore[attr-defined]
    assert paid == len(recorded) <= _lines(line) <= 25  # 25 times 0.02 is all there is
    assert paid >= 10
    assert audit(told) == []
    [row] = costs["rows"]
    assert (row["calls"], row["usd"]) == (paid, pytest.approx(0.02 * paid))


def _lines(line: Path) -> int:
    return line.read_text().count("\n") if line.exists() else 0


async def test_what_is_not_used_of_a_reservation_is_there_for_others(systems: Launch, tmp_path: Path) -> None:
    """Each may cost 0.02 and costs 0.005, so four times as many can be paid as could be reserved."""
    line = tmp_path / "line"
    limits = {"costly": {"usd": "0.1"}, "model:small": {"tokens": "1000"}}
    with systems(plan("Costly", 2), limits=limits) as system:
        async with await Caller.connect(system.url) as caller:
            fields = {"line": str(line), "times": 4, "seconds": 0.02, "usd": 0.005, "catch": True}
            done = await ends(caller, "costly", await submit(caller, "costly", 6, **fields))
            told = await all_events(caller)
    paid = sum(end["paid"] for end in done if isinstance(end, dict))
    assert paid == _lines(line)
    assert 17 <= paid <= 20  # with less than 0.02 left nobody can say that he may
    assert audit(told) == []


async def test_a_change_is_in_force_at_once_for_all_and_an_ask_is_refused_with_the_time_to_wait(
    systems: Launch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = tmp_path / "line"
    body = json.dumps({"line": str(line)}).encode()
    with systems(plan("Costly", 2), plan("Quick", 1)) as system:
        where = ("--data", str(system.data))
        async with await Caller.connect(system.url) as caller:
            assert json.loads((await caller.ask("costly", body))[0]) == {"paid": 1}
            ran = await command(capsys, "limits", "set", "costly", "usd=0.02/day", "--why", "dear", *where, "--json")
            assert ran.json["limits"] == {"usd": "0.02/day"} and ran.json["why"] == "dear", ran

            async def used_up() -> TaskError | None:
                try:
                    await caller.ask("costly", body)
                except BudgetExhausted as error:
                    return error
                return None

            await until_so(used_up, "the budget was not held to")
            paid = _lines(line)

            async def refused_at_the_door() -> float | None:
                before = await caller.head()
                error = await used_up()
                assert error, "it was held to before"
                return error.retry_after if await caller.head() == before else None

            wait = await until_so(refused_at_the_door, "it was not refused at the door")
            assert 0 < wait <= 86_400
            assert _lines(line) == paid  # what was spent before there was a limit does not count
            shown = await command(capsys, "limits", *where)
            assert "usd 0.02/day" in shown.out and "100 %" in shown.out and "in " in shown.out
            [row] = (await command(capsys, "limits", "ls", *where, "--json")).lines
            assert row["used"]["usd"]["used"] == row["used"]["usd"]["of"] == 0.02
            ran = await command(capsys, "limits", "clear", "costly", *where)
            assert ran.code == 0 and "has no limits" in ran.out

            async def free_again() -> bool:
                return await used_up() is None

            await until_so(free_again, "the limit was not taken away")
            refused = await command(capsys, "limits", "set", "costly", "usd=much", *where)
            assert refused.code == 1 and "a number is due" in refused.err
            assert (await command(capsys, "limits", "clear", "costly", *where)).code == 1
            ran = await command(capsys, "cost", "--by", "program", "--by", "model", *where, "--json")
            [cost] = ran.lines
            assert (cost["program"], cost["model"], cost["calls"]) == ("costly", "small", _lines(line))

            await caller.limits("set", scope="quick", limits={"rate": "1/hour"})

            async def too_slow() -> float | None:
                try:
                    await caller.ask("quick", b"{}", headers={h.WAIT: "2"})
                except LimitExceeded as error:
                    return error.retry_after
                return None

            assert await until_so(too_slow, "nobody was refused") > 2


async def test_a_task_may_wait_until_its_budget_renews(systems: Launch, tmp_path: Path) -> None:
    line = tmp_path / "line"
    limits = {"costly": {"usd": "0.02/month", "when_exhausted": "wait"}}
    with systems(plan("Costly", 1), limits=limits) as system:
        async with await Caller.connect(system.url) as caller:
            [task] = await submit(caller, "costly", 1, line=str(line), times=2)

            async def sleeps() -> list[Event]:
                return [event for event in await all_events(caller) if event.type == "TaskSleeping"]

            [event] = await until_so(sleeps, "it does not wait")
            until_then = datetime.fromtimestamp(event.data.until)  # type: ignore[attr-defined]
            assert event.aggregate == f"task.costly.{task}"
            assert (until_then.minute, until_then.second) == (0, 0)
            assert _lines(line) == 1


async def test_studies_models_and_agents_have_limits_of_their_own(systems: Launch, tmp_path: Path) -> None:
    line = tmp_path / "line"
    limits = {"study:dear": {"usd": "0.02"}, "model:small": {"calls": "3"}, "study:slow": {"concurrency": "1"}}
    async with Counter.open() as (counter, port):
        with systems(plan("Costly", 1), plan("Counted", 2), plan("Delegates", 1), limits=limits) as system:
            async with await Caller.connect(system.url) as caller:
                in_study = {h.STUDY: "dear"}
                done = []
                for headers in (in_study, in_study, {}, {}, {}):
                    done += await ends(caller, "costly", await submit(caller, "costly", 1, headers, line=str(line)))
                said = [str(end) if isinstance(end, TaskError) else end["paid"] for end in done]
                assert said[0] == said[2] == said[3] == 1
                assert "usd of study:dear" in said[1] and "calls of model:small" in said[4]
                [end] = await ends(caller, "delegates", await submit(caller, "delegates", 1, in_study, line=str(line)))
                assert isinstance(end, TaskError) and end.code == 429 and "study:dear" in str(end)
                slow = await submit(caller, "counted", 4, {h.STUDY: "slow"}, port=port, seconds=0.1)
                assert await ends(caller, "counted", slow) == [{"done": True}] * 4
                assert counter.most == 1

                [one, other] = sorted(it["agent"] for it in await caller.processes() if it["program"] == "counted")
                await caller.limits("set", scope=f"agent:{one}", limits={"concurrency": "0"})
                await asyncio.sleep(2.0)
                done = await ends(caller, "counted", await submit(caller, "counted", 12, port=port, seconds=0.01))
                told = await all_events(caller)
    assert done == [{"done": True}] * 12
    claims = [event.data.agent for event in told if event.type == "TaskClaimed" and ".counted." in event.aggregate]  # type: ignore[attr-defined]
    assert set(claims[-12:]) == {other}


async def test_a_tenant_has_limits_of_its_own_under_access_rules(systems: Launch, tmp_path: Path) -> None:
    system = systems(plan("Costly", 1), secure=True, limits={"tenant:alice": {"usd": "0.02"}}, log="jetstream")
    secured = identities(system.data, "alice", "bob", programs=("costly",))
    body = json.dumps({"line": str(tmp_path / "line")}).encode()
    with system:
        said: list[Any] = []
        for name in ("alice", "alice", "bob", "bob"):
            context = secured.context(Role.CLIENT, name)
            async with await Caller.connect(system.url, credentials=context, wait=30.0) as caller:
                try:
                    said.append(json.loads((await caller.ask("costly", body))[0])["paid"])
                except BudgetExhausted as error:
                    said.append(str(error))
                if name == "bob":
                    with pytest.raises(Unavailable):  # a client cannot change limits, its own least of all
                        await caller.limits("clear", scope="tenant:alice")
        async with await Caller.connect(system.url, credentials=secured.context(Role.CONSOLE), wait=30.0) as console:
            [row] = (await console.limits())["limits"]
    assert (said[0], said[2], said[3]) == (1, 1, 1)
    assert "usd of tenant:alice" in said[1]
    assert row["used"]["usd"]["used"] == 0.02
    assert refusals(system.data / "server" / "nats.log") == []
