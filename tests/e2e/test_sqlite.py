"""A whole system on a SQLite log: everything a user does, whoever dies, whatever else is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import nats
import pytest
from tests.console.shells import Shell, stop
from tests.e2e.plain import Plain
from tests.e2e.running import PROGRAMS, Running, until
from tests.e2e.test_durable import HERE as LASTING
from tests.e2e.test_durable import Book, asleep, tell
from tests.e2e.test_kills import Submitter

APP = '''
from dspex import Program, Schema, effect

@effect
async def shout(text: str) -> str:
    return text.upper()

class Talk(Program):
    """Says it louder."""
    class Input(Schema):
        text: str
        nap: float = 0.0
        wait: bool = False
    class Output(Schema):
        text: str
    async def predict(self, input):
        said = await shout(input.text)
        if input.nap:
            await self.sleep(input.nap)
        if input.wait:
            said += str(await self.signal("go"))
        return self.Output(text=said)
'''


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """A folder in which `dspex up talk.py --log sqlite` runs."""
    shell = Shell(tmp_path_factory.mktemp("sqlite"))
    (shell.folder / "talk.py").write_text(APP)
    process = shell.start("up", "talk.py", "--log", "sqlite", "--json")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    yield shell
    code, _, words = stop(process)
    assert (code, words.split(maxsplit=1)[-1]) == (0, "drained and stopped\n")


def test_the_main_job_through_the_shell(shell: Shell) -> None:
    assert shell("ask", "talk", "text=hi", "--json").json["output"] == {"text": "HI"}
    task = shell("submit", "talk", "text=a", "--json").json["task"]
    assert shell("result", task, "--json").json["output"] == {"text": "A"}
    assert shell("score", task, "0.5").code == 0
    twice = [shell("submit", "talk", "text=k", "--key", "k", "--json").json["task"] for _ in range(2)]
    assert shell("result", twice[1], "--json").json["output"] == {"text": "K"}
    asleep = shell("submit", "talk", "text=z", "nap=2", "--json").json["task"]
    waits = shell("submit", "talk", "text=w", "wait=true", "--json").json["task"]
    until(lambda: "sleeping" in shell("tasks", "--json").out)
    assert shell("signal", waits, "go", "1").code == 0
    assert shell("result", waits, "--json").json["output"] == {"text": "W1"}
    assert shell("result", asleep, "--json").json["output"] == {"text": "Z"}
    kinds = [event["type"] for event in shell("events", task, "--json").lines]
    assert kinds == ["TaskSubmitted", "TaskClaimed", "EffectRecorded", "TaskCompleted", "OutcomeReported"]
    states = {row["task"]: row["state"] for row in shell("tasks", "--json").lines}
    assert states[task] == "completed" and sorted(states[it] for it in twice) == ["completed", "duplicate"]
    roles = {row["role"] for row in shell("ps", "--json").lines if not row["program"]}
    assert roles == {"root", "server", "supervisor", "log", "archivist"}
    replayed = shell("replay", task, "--json").json
    assert replayed["same"] is True and replayed["performed"] == 0


def test_doctor_verify_export_and_offline_replay(shell: Shell) -> None:
    task = shell("submit", "talk", "text=b", "--json").json["task"]
    shell("result", task)
    checks = {check["check"]: check for check in shell("doctor", "--json").lines}
    assert checks["log"]["status"] == "ok" and "sqlite, owned by a log process" in checks["log"]["message"]
    assert checks["talk"]["status"] == "ok" and checks["archive"]["status"] == "ok"
    assert shell("verify", "--json").json["ok"] is True
    assert shell("export", "all.db", "--task", task).code == 0
    for file in ("all.db", ".dspex/log.db"):
        assert shell("verify", file, "--json").json["ok"] is True
        assert shell("replay", task, "--log", file, "--json").json["same"] is True
    copied = shell.folder / "copied.db"
    with closing(sqlite3.connect(shell.folder / ".dspex" / "log.db")) as log, closing(sqlite3.connect(copied)) as copy:
        log.backup(copy)
    shutil.copy(shell.folder / ".dspex" / "log.head", copied.with_suffix(".head"))
    with closing(sqlite3.connect(copied)) as copy:
        copy.execute("UPDATE log SET body = CAST(REPLACE(body, 'b', 'c') AS BLOB) WHERE position = ?", (int(task),))
        copy.commit()
    found = shell("verify", "copied.db", "--json")
    assert found.code == 1 and found.json["first"]["position"] == int(task)


async def test_a_client_of_another_house_can_not_tell(shell: Shell) -> None:
    """nats-py as it comes, with what its own JetStream client checks."""
    url = json.loads((shell.folder / ".dspex" / "system.json").read_text())["nats"]
    client = await nats.connect(url)
    js = client.jetstream()
    first = await js.publish("dspex.task.talk", b'{"text": "x"}', stream="DSPEX", headers={"Nats-Msg-Id": "talk/1"})
    again = await js.publish("dspex.task.talk", b'{"text": "x"}', headers={"Nats-Msg-Id": "talk/1"})
    assert (first.stream, first.duplicate, again.seq, again.duplicate) == ("DSPEX", None, first.seq, True)
    reply = await client.request("dspex.result.talk", str(first.seq).encode(), timeout=30)
    assert json.loads(reply.data) == {"text": "X"} and reply.headers and reply.headers["Dspex-Task"] == str(first.seq)
    answers = await asyncio.gather(*(client.request("dspex.ask.talk", b'{"text": "y"}', timeout=30) for _ in range(50)))
    assert {answer.data for answer in answers} == {b'{"text":"Y"}'}
    assert len({answer.headers["Dspex-Task"] for answer in answers if answer.headers}) == 50
    with pytest.raises(nats.errors.NoRespondersError):
        await client.request("dspex.task.tlak", b"{}", timeout=5)
    page = json.loads((await client.request("dspex.log.read", b'{"task": %d}' % first.seq, timeout=5)).data)
    assert [event["type"] for event in page["events"]][-1] == "TaskCompleted"
    await client.close()


def test_a_folder_keeps_to_its_log(shell: Shell, tmp_path: Path) -> None:
    other = Shell(tmp_path)
    (tmp_path / "talk.py").write_text(APP)
    data = tmp_path / "data"
    data.mkdir()
    (data / "log").write_text("sqlite")
    refused = other("up", "talk.py", "--data", str(data))
    assert refused.code == 2 and "has its log in sqlite; start with --log sqlite" in refused.err
    (tmp_path / "dspex.toml").write_text('log = "sqlite"\n[retention]\nage = "30d"\n[programs.talk]\napp = "talk.py"\n')
    forgets = other("up")
    assert forgets.code == 2 and "is its own archive and forgets nothing: take [retention] out" in forgets.err
    (tmp_path / "dspex.toml").unlink()
    unknown = other("up", "talk.py", "--log", "papyrus")
    assert unknown.code == 2 and "there is no log 'papyrus' here; there are jetstream, sqlite" in unknown.err


async def test_agents_of_another_system_join_the_log_of_this_one(shell: Shell, systems: Callable[..., Running]) -> None:
    """More machines: `dspex up --nats URL` finds that a log process has the log, and only adds agents."""
    url = json.loads((shell.folder / ".dspex" / "system.json").read_text())["nats"]
    with systems(("Nap", 2), nats=url, log="jetstream"):
        async with await Plain.connect(url, shell.folder / ".dspex" / "log.db") as plain:
            tasks = [await plain.submit("nap", {"n": n, "seconds": 0.01}) for n in range(20)]
            story = await plain.until_ended("nap", tasks)
            story.check_once("nap", tasks)


# -- whoever dies

VICTIMS: dict[str, Callable[[Running], int]] = {
    "agent": lambda system: min(system.agent_pids(), default=0),
    "supervisor": Running.supervisor, "server": Running.server, "log process": Running.registrar,
}  # fmt: skip


async def test_every_acknowledged_task_completes_once_when_all_are_killed_in_turn(
    systems: Callable[..., Running],
) -> None:
    chance, order = random.Random(12), list(VICTIMS)
    chance.shuffle(order)
    with systems(("Nap", 2), log="sqlite", durability="power") as system:
        async with await system.plain() as plain:
            submitter = Submitter(plain, 250)
            running = asyncio.create_task(submitter.run())
            for number, victim in enumerate(order, 1):
                submitter.allowed = 250 * number / (len(order) + 1)
                await submitter.reached(number / (len(order) + 1))
                await asyncio.sleep(chance.random() * 0.2)
                os.kill(await asyncio.to_thread(until, lambda v=victim: _pid(v, system)), signal.SIGKILL)
            submitter.allowed = 250
            await running
            story = await plain.until_ended("nap")
            story.check_once("nap", list(submitter.acknowledged))
            outputs = story.outputs("nap")
            assert {task: outputs[task]["n"] for task in submitter.acknowledged} == submitter.acknowledged
    assert Shell(system.data)("verify", str(system.log_file), "--json").json["ok"] is True


def _pid(victim: str, system: Running) -> int:
    try:
        return VICTIMS[victim](system)
    except (StopIteration, IndexError):
        return 0


async def test_a_task_that_runs_is_not_disturbed_when_the_log_process_dies(
    systems: Callable[..., Running], tmp_path: Path
) -> None:
    book = Book(tmp_path / "book")
    with systems((f"{LASTING.with_name('lasting.py')}:Steps", 2), log="sqlite") as system:
        async with await system.plain() as plain:
            body = {"task": "a", "book": str(book.path), "seconds": 0.4}
            task = await plain.submit("steps", body)
            await asyncio.to_thread(until, lambda: book.done)
            for _ in range(3):
                os.kill(await asyncio.to_thread(until, lambda: _pid("log process", system)), signal.SIGKILL)
                await asyncio.sleep(0.3)
            assert (await plain.final("steps", task)).json["total"] == 10
            story = await plain.story()
    assert [event["data"]["attempt"] for event in story.all_of("TaskClaimed")] == [1]
    assert {place: len(keys) for place, keys in book.done.items()} == dict.fromkeys(book.done, 1)


async def test_an_ask_waits_for_the_log_process_to_be_there_again(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 1), log="sqlite") as system:
        async with await system.plain() as plain:
            for n in range(3):
                os.kill(await asyncio.to_thread(until, lambda: _pid("log process", system)), signal.SIGKILL)
                await asyncio.sleep(0.05)  # what is under way when it dies may be lost, as with any server
                answers = await asyncio.gather(*(plain.ask("nap", {"n": n, "seconds": 0}) for _ in range(20)))
                assert [answer.code for answer in answers] == [None] * 20
            story = await plain.until_ended("nap")
            story.check_once("nap", [int(answer.task) for answer in answers])


async def test_the_file_is_all_that_is_needed(systems: Callable[..., Running], tmp_path: Path) -> None:
    """Sleepers, waiters and what was not begun go on although the server's folder is gone."""
    book = Book(tmp_path / "book")
    made = {"task": "s", "book": str(book.path)}
    app = f"{LASTING.with_name('lasting.py')}:Waits"
    with systems((app, 1), log="sqlite") as first:
        async with await first.plain() as plain:
            sleeper = await plain.submit("waits", made | {"do": "sleep", "seconds": 3, "task": "a"})
            waiter = await plain.submit("waits", made | {"do": "signal", "task": "b"})
            dated = await plain.submit("waits", made | {"do": "signal", "task": "c"}, headers={"Dspex-Deadline": "4"})
            await asleep(plain, "waits", sleeper, waiter, dated)
            os.kill(VICTIMS["agent"](first), signal.SIGSTOP)  # so that nobody takes what comes now
            await tell(plain, "waits", waiter, "go", "on")
            late = await plain.submit("waits", made | {"task": "d"})
            first.kill()
    shutil.rmtree(first.data / "server")
    with systems((app, 1), log="sqlite") as second:
        async with await second.plain() as plain:
            assert (await plain.final("waits", waiter)).json["said"] == "on"
            assert (await plain.final("waits", late)).code is None
            assert (await plain.final("waits", sleeper)).json["said"] == "None"
            assert (await plain.final("waits", dated)).code == 408
    assert {place: len(keys) for place, keys in book.done.items()} == {
        ("a", "0"): 1, ("a", "1"): 1, ("b", "0"): 1, ("b", "1"): 1, ("c", "0"): 1, ("d", "0"): 1, ("d", "1"): 1,
    }  # fmt: skip


# -- a log of another house

BACKEND = """
    from dspex.store import SqliteLog

    async def open_log(folder, *, subjects, durability, max_payload):
        (folder / "papyrus").mkdir(exist_ok=True)
        return await SqliteLog.open(
            folder / "papyrus" / "roll.db", subjects=subjects, durability=durability, max_payload=max_payload
        )
"""
SUITE = """
    import pytest
    from dspex.core.subjects import Subjects
    from dspex.store.contract import BackendContract
    from papyrus import open_log

    class Place:
        subjects = Subjects()
        def __init__(self, folder):
            self.folder, self.others = folder, 0
        async def open(self):
            return await open_log(self.folder, subjects=self.subjects, durability="process", max_payload=8 << 20)
        async def another(self):
            (self.folder / "other").mkdir()
            return await open_log(self.folder / "other", subjects=self.subjects, durability="process", max_payload=8 << 20)
        async def close(self):
            pass

    class TestPapyrus(BackendContract):
        @pytest.fixture
        def place(self, tmp_path):
            return Place(tmp_path)
"""


@pytest.fixture
def distribution(tmp_path: Path) -> Path:
    """An installed distribution that adds the log `papyrus`."""
    site = tmp_path / "site"
    (site / "papyrus-1.0.dist-info").mkdir(parents=True)
    (site / "papyrus.py").write_text(textwrap.dedent(BACKEND))
    (site / "papyrus-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: papyrus\nVersion: 1.0\n")
    (site / "papyrus-1.0.dist-info" / "entry_points.txt").write_text("[dspex.logs]\npapyrus = papyrus:open_log\n")
    return site


def test_a_distribution_adds_a_log_and_passes_the_suite(distribution: Path, tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    (tmp_path / "talk.py").write_text(APP)
    (tmp_path / "test_papyrus.py").write_text(textwrap.dedent(SUITE))
    path = os.pathsep.join([str(distribution), str(Path(PROGRAMS).parents[2] / "src")])
    process = shell.start("up", "talk.py", "--log", "papyrus", "--durability", "process", "--json", PYTHONPATH=path)
    assert process.stdout is not None and process.stdout.readline()
    assert shell("ask", "talk", "text=hi", "--json").json["output"] == {"text": "HI"}
    assert stop(process)[0] == 0
    assert (tmp_path / ".dspex" / "papyrus" / "roll.db").is_file()
    suite = shell.run("pytest", "-q", "-p", "no:cacheprovider", "-o", "asyncio_mode=auto", "-k", "same or rows", PYTHONPATH=path)
    assert suite.code == 0 and " passed" in suite.out, suite.out


async def test_a_new_log_is_not_taken_for_the_one_before(systems: Callable[..., Running]) -> None:
    """The file is gone, the server's folder is not: what waits there is of another log."""
    with systems(("Nap", 1), log="sqlite") as first:
        async with await first.plain() as plain:
            await asyncio.gather(*(plain.submit("nap", {"n": n, "seconds": 1}) for n in range(20)))
            first.kill()
    for file in first.data.glob("log.*"):
        file.unlink()
    with systems(("Nap", 1), log="sqlite") as second:
        async with await second.plain() as plain:
            task = await plain.submit("nap", {"n": 77, "seconds": 0})
            story = await plain.until_ended("nap")
            assert story.submitted("nap") == [task] and story.outputs("nap")[task]["n"] == 77
