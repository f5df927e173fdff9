"""Tasks that outlive their processes: no recorded effect is done again, and nobody who waits is forgotten."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e import lasting
from tests.e2e.plain import WRONG, Plain, Story
from tests.e2e.running import Running

from dspex import Program
from dspex.core.codec import events_of
from dspex.core.ports import Entry
from dspex.core.replay import replay
from dspex.core.subjects import Subjects

HERE = Path(__file__).parent / "lasting.py"
PLANS = [(f"{HERE}:{name}", count) for name, count in (
    ("Steps", 1), ("Waits", 1), ("Again", 1), ("Anew", 1), ("Threaded", 1), ("Calls", 1),
)]  # fmt: skip


class Book:
    """What the effects wrote down: `(task, n)` to the idempotency keys under which it was done."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    @property
    def done(self) -> dict[tuple[str, str], list[str]]:
        found: dict[tuple[str, str], list[str]] = defaultdict(list)
        for line in self.path.read_text().splitlines():
            task, n, key = line.split()
            found[task, n].append(key)
        return found


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path / "book")


def types(story: Story, program: str, task: int) -> list[str]:
    return story.types(f"task.{program}.{task}")


async def tell(plain: Plain, program: str, task: int, name: str, value: object) -> None:
    await plain.store("signal", program, {"task": task, "name": name, "value": value})


async def asleep(plain: Plain, program: str, *tasks: int, times: int = 1) -> Story:
    return await plain.until(lambda s: all(types(s, program, t).count("TaskSleeping") >= times for t in tasks))


def check_effects(story: Story, program: str, book: Book) -> int:
    """Every record was performed, none twice under two keys; how many effects were under way when somebody died."""
    again = 0
    for place, keys in book.done.items():
        assert len(set(keys)) == 1, f"{place} was performed under {keys}"
        again += len(keys) - 1
    for task in story.submitted(program):
        records = [e["data"]["key"] for e in story.events(f"task.{program}.{task}") if e["type"] == "EffectRecorded"]
        assert max(Counter(records).values()) == 1, "an effect was recorded twice"
    return again


@pytest.mark.parametrize("program", ["Steps", "Threaded"])
async def test_no_recorded_effect_is_repeated_when_agents_are_killed(
    systems: Callable[..., Running], book: Book, program: str
) -> None:
    chance, name = random.Random(7), program.lower()
    with systems((f"{HERE}:{program}", 2)) as system:
        async with await system.plain() as plain:
            tasks = [
                await plain.submit(name, {"task": f"t{n}", "book": str(book.path), "seconds": 0.05}) for n in range(40)
            ]
            for _ in range(4):
                await asyncio.sleep(0.2 + chance.random() * 0.3)
                os.kill(system.below_supervisor()[-1], signal.SIGKILL)
            story = await plain.until_ended(name, tasks)
            story.check_once(name, tasks)
            assert {output["total"] for output in story.outputs(name).values()} == ({10} if name == "steps" else {5})
            again = check_effects(story, name, book)
            assert len(book.done) == 40 * 5
            held = 64 if name == "steps" else 4
            assert again <= 4 * 2 * held


async def test_those_who_wait_outlive_restarts_of_everything(systems: Callable[..., Running], book: Book) -> None:
    made = {"task": "s", "book": str(book.path)}
    first = systems((f"{HERE}:Waits", 1)).start()
    async with await first.plain() as plain:
        sleeper = await plain.submit("waits", made | {"do": "sleep", "seconds": 4, "task": "a"})
        waiter = await plain.submit("waits", made | {"do": "signal", "task": "b"})
        dated = await plain.submit("waits", made | {"do": "signal", "task": "c"}, headers={"Dspex-Deadline": "5"})
        await asleep(plain, "waits", sleeper, waiter, dated)
        for victim in (first.below_supervisor()[-1], first.supervisor(), first.server()):
            os.kill(victim, signal.SIGKILL)
            await asyncio.sleep(0.1)
    first.kill()
    with systems((f"{HERE}:Waits", 1)) as second:
        async with await second.plain() as plain:
            await tell(plain, "waits", waiter, "go", "on")
            assert (await plain.final("waits", waiter)).json["said"] == "on"
            assert (await plain.final("waits", sleeper)).json["said"] == "None"
            late = await plain.final("waits", dated)
            assert late.code == 408
    assert {place: len(keys) for place, keys in book.done.items()} == {
        ("a", "0"): 1, ("a", "1"): 1, ("b", "0"): 1, ("b", "1"): 1, ("c", "0"): 1,
    }  # fmt: skip


async def test_a_frozen_agents_late_record_is_refused(systems: Callable[..., Running], book: Book) -> None:
    with systems((f"{HERE}:Steps", 2)) as system:
        async with await system.plain() as plain:
            task = await plain.submit("steps", {"task": "t", "book": str(book.path), "seconds": 0.4})
            story = await plain.until(lambda s: "EffectRecorded" in types(s, "steps", task))
            holder = story.events(f"task.steps.{task}")[0]["data"]["agent"]
            pid = (await system.agents(plain, "steps"))[holder]
            os.kill(pid, signal.SIGSTOP)
            story = await plain.until_ended("steps", [task])
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(1.0)
            story = await plain.story(story)
            story.check_once("steps", [task])
            claims = [e["data"]["agent"] for e in story.events(f"task.steps.{task}") if e["type"] == "TaskClaimed"]
            assert len(claims) == 2 and claims[0] != claims[1]
            assert {e["source"] for e in story.events(f"task.steps.{task}")[-3:]} == {f"/agents/{claims[1]}"}
            check_effects(story, "steps", book)


async def test_code_that_changed_under_a_running_task_ends_it_loudly(
    systems: Callable[..., Running], tmp_path: Path
) -> None:
    app = tmp_path / "app.py"
    source = (
        "from dspex import Program, Schema, effect\n"
        "@effect\nasync def fetch(n: int) -> int:\n    return n\n"
        "class Moving(Program):\n    class Input(Schema):\n        n: int\n    class Output(Schema):\n        n: int\n"
        "    async def predict(self, input: Input) -> Output:\n"
        "        try:\n            n = await fetch(input.n)\n        except Exception:\n            n = 0\n"
        "        await self.signal('go')\n        return self.Output(n=n)\n"
    )
    app.write_text(source)
    first = systems((f"{app}:Moving", 1)).start()
    async with await first.plain() as plain:
        task = await plain.submit("moving", {"n": 1})
        await asleep(plain, "moving", task)
    first.stop()
    app.write_text(source.replace("fetch(input.n)", "fetch(input.n + 1)"))
    with systems((f"{app}:Moving", 1)) as second:
        async with await second.plain() as plain:
            await tell(plain, "moving", task, "go", 1)
            reply = await plain.final("moving", task)
            assert reply.code == 500 and reply.error["type"] == "Diverged"
            claims = [it["data"]["code"] for it in (await plain.story()).all_of("TaskClaimed")]
            assert len(set(claims)) == 2 and f"from code {claims[0]} to {claims[1]}" in reply.error["message"]


# -- one system for what follows


def ask(book: Book, task: str, do: str, seconds: float = 0.0, **more: Any) -> dict[str, Any]:
    return {"task": task, "book": str(book.path), "do": do, "seconds": seconds} | more


@pytest.mark.parametrize("when", ["before", "while asleep"])
async def test_a_signal_counts_whenever_it_comes(plain: Plain, book: Book, when: str) -> None:
    task = await plain.submit("waits", ask(book, "t", "signal"))
    if when != "before":
        await asleep(plain, "waits", task)
    await tell(plain, "waits", task, "go", {"x": 1})
    assert (await plain.final("waits", task)).json["said"] == "{'x': 1}"
    await tell(plain, "waits", task, "go", "too late")
    assert (await plain.final("waits", task)).json["said"] == "{'x': 1}"


@pytest.mark.parametrize(("do", "said"), [("twice", "[1, 2]"), ("both", "[1, 2]")])
async def test_each_wait_gets_a_signal_of_its_own(plain: Plain, book: Book, do: str, said: str) -> None:
    at_once = await plain.submit("waits", ask(book, "t", do))
    one_by_one = await plain.submit("waits", ask(book, "u", do))
    await asyncio.gather(tell(plain, "waits", at_once, "go", 1))
    await tell(plain, "waits", at_once, "go", 2)
    await asleep(plain, "waits", one_by_one)
    await tell(plain, "waits", one_by_one, "go", 1)
    await asyncio.sleep(0.3)
    await tell(plain, "waits", one_by_one, "go", 2)
    for task in (at_once, one_by_one):
        assert (await plain.final("waits", task)).json["said"] == said


async def test_many_signals_wake_the_same_tasks_at_once_and_none_is_forgotten(plain: Plain, book: Book) -> None:
    tasks = [await plain.submit("waits", ask(book, f"t{n}", "both")) for n in range(40)]
    chance = random.Random(3)
    sends = [(task, value) for task in tasks for value in (1, 2)]
    chance.shuffle(sends)

    async def send(task: int, value: int) -> None:
        await asyncio.sleep(chance.random())
        await tell(plain, "waits", task, "go", value)

    await asyncio.gather(*(send(*each) for each in sends))
    replies = await asyncio.gather(*(plain.final("waits", task, 20) for task in tasks))
    assert {reply.json["said"] for reply in replies} == {"[1, 2]"}


async def test_a_wait_that_nobody_ends_times_out(plain: Plain, book: Book) -> None:
    task = await plain.submit("waits", ask(book, "t", "timeout", 2))
    reply = await plain.result("waits", task, wait="0")
    await asleep(plain, "waits", task)
    reply = await plain.result("waits", task, wait="0")
    assert reply.code == 202 and reply.json["state"] == "sleeping"
    assert (await plain.final("waits", task)).json["said"] == "nobody came"


async def test_a_wait_beside_a_sleep_is_found(plain: Plain, book: Book) -> None:
    task = await plain.submit("waits", ask(book, "t", "beside", 2))
    await asleep(plain, "waits", task)
    await tell(plain, "waits", task, "go", "on")
    assert (await plain.final("waits", task)).json["said"] == "on"


async def test_a_branch_that_comes_late_to_its_wait_is_not_forgotten(plain: Plain, book: Book) -> None:
    task = await plain.submit("waits", ask(book, "t", "short beside"))
    await tell(plain, "waits", task, "other", 1)
    await asleep(plain, "waits", task)
    await tell(plain, "waits", task, "go", 1)
    assert (await plain.final("waits", task, 15)).json["said"] == "short beside"


async def test_a_program_cannot_swallow_its_suspension(plain: Plain, book: Book) -> None:
    task = await plain.submit("waits", ask(book, "t", "swallow"))
    await asleep(plain, "waits", task)
    await tell(plain, "waits", task, "go", "heard")
    assert (await plain.final("waits", task)).json["said"] == "heard"


async def test_many_naps_are_no_failed_attempts(plain: Plain, book: Book) -> None:
    task = await plain.submit("waits", ask(book, "t", "often", 1.6))
    assert (await plain.final("waits", task, 30)).json["said"] == "often"
    assert len(book.done["t", "0"]) == 1


async def test_the_deadline_ends_a_sleeping_task(plain: Plain, book: Book) -> None:
    signals = await plain.submit("waits", ask(book, "t", "signal"), headers={"Dspex-Deadline": "2"})
    sleeps = await plain.submit("waits", ask(book, "u", "sleep", 3600), headers={"Dspex-Deadline": "2"})
    for task in (signals, sleeps):
        assert (await plain.final("waits", task, 60)).code == 408


async def test_sleeping_tasks_hold_no_slot(plain: Plain, book: Book) -> None:
    """Four slots, and a thousand tasks that wait."""
    body = ask(book, "t", "signal")
    tasks = await asyncio.gather(*(plain.submit("waits", body, timeout=30) for _ in range(1000)))
    await asyncio.sleep(0.1)
    other = await plain.submit("waits", ask(book, "other", "none"))
    assert (await plain.final("waits", other)).json["said"] == "none"
    await asleep(plain, "waits", *tasks[:20], tasks[-1])
    await tell(plain, "waits", tasks[500], "go", "you")
    assert (await plain.final("waits", tasks[500])).json["said"] == "you"


async def test_plain_programs_wait_too(plain: Plain, book: Book) -> None:
    waits = [await plain.submit("threaded", ask(book, f"t{n}", "signal")) for n in range(12)]
    sleeps = await plain.submit("threaded", ask(book, "s", "sleep", 2))
    await asleep(plain, "threaded", *waits)
    for task in waits:
        await tell(plain, "threaded", task, "go", "on")
    for task in waits:
        assert (await plain.final("threaded", task)).json == {"total": 5, "said": "on", "at": 0.0}
    assert (await plain.final("threaded", sleeps)).json["total"] == 5
    assert {len(keys) for keys in book.done.values()} == {1}


@pytest.mark.parametrize(("program", "first"), [("again", 1), ("anew", 3)])
async def test_a_retry_does_again_what_failed(plain: Plain, book: Book, program: str, first: int) -> None:
    task = await plain.submit(program, ask(book, "t", "", times=2))
    assert (await plain.final(program, task)).json["said"] == "up"
    done = book.done
    assert len(done["t", "broken"]) == 3
    assert len(done["t", "0"]) == first
    assert len(set(done["t", "0"])) == first, "a clean start has keys of its own"
    story = await plain.story()
    assert types(story, program, task).count("TaskRetried") == 2


async def test_retries_end(plain: Plain, book: Book) -> None:
    task = await plain.submit("again", ask(book, "t", "", times=99))
    reply = await plain.final("again", task)
    assert reply.code == 500 and reply.error["type"] == "ConnectionError"
    assert len(book.done["t", "broken"]) == 4


async def test_a_program_calls_another(plain: Plain, book: Book) -> None:
    task = await plain.submit("calls", ask(book, "t", ""))
    assert (await plain.final("calls", task)).json["total"] == 10
    story = await plain.story()
    steps = [entry for entry in story.entries if entry.subject == "dspex.task.steps"]
    [called] = [entry for entry in steps if entry.headers.get("Dspex-Parent") == str(task)]
    assert len(called.headers["Dspex-Key"]) == 32


async def test_results_of_effects_are_bounded_and_many_fit(plain: Plain, book: Book) -> None:
    large = await plain.final("calls", await plain.submit("calls", ask(book, "t", "large")))
    assert large.code == 500 and large.error["type"] == "EffectFailed"
    many = await plain.final("calls", await plain.submit("calls", ask(book, "t", "many")))
    assert many.json["total"] == 18_000_000


async def test_a_drained_agent_hands_over_those_who_wait(systems: Callable[..., Running], book: Book) -> None:
    first = systems((f"{HERE}:Threaded", 1)).start()
    async with await first.plain() as plain:
        task = await plain.submit("threaded", ask(book, "t", "signal", 0.1))
        await asyncio.sleep(0.3)
    first.stop()
    with systems((f"{HERE}:Threaded", 1)) as second:
        async with await second.plain() as plain:
            while True:
                try:
                    await tell(plain, "threaded", task, "go", "on")
                    break
                except WRONG:
                    await asyncio.sleep(0.1)
            assert (await plain.final("threaded", task)).json["said"] == "on"
            assert {len(keys) for keys in book.done.values()} == {1}


async def test_what_was_recorded_replays_to_the_same(plain: Plain, book: Book) -> None:
    asked: list[tuple[type[Program], dict[str, Any]]] = [
        (lasting.Steps, ask(book, "a", "")), (lasting.Waits, ask(book, "b", "both")),
        (lasting.Waits, ask(book, "c", "timeout", 2)), (lasting.Waits, ask(book, "d", "sleep", 2)),
        (lasting.Again, ask(book, "e", "", times=1)), (lasting.Anew, ask(book, "f", "", times=1)),
        (lasting.Threaded, ask(book, "g", "")), (lasting.Calls, ask(book, "h", "")),
    ]  # fmt: skip
    tasks = [await plain.submit(program.name, body) for program, body in asked]
    for value in (1, 2):
        await tell(plain, "waits", tasks[1], "go", value)
    for (program, _), task in zip(asked, tasks, strict=True):
        assert (await plain.final(program.name, task)).code is None
    story, performed = await plain.story(), book.path.read_text()
    for (program, _), task in zip(asked, tasks, strict=True):
        subjects = {f"dspex.event.task.{program.name}.{task}"}
        events = [
            event
            for stored in story.entries if stored.subject in subjects or stored.position == task
            for event in events_of(Entry(
                position=stored.position, time=0.0, subject=stored.subject, body=stored.body, headers=stored.headers
            ), Subjects())
        ]  # fmt: skip
        report = await replay(program(), events, str(task))
        assert report.same, (program.name, report)
    assert book.path.read_text() == performed
