"""A whole system with access rules does all that a system does, and nothing that it does is refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.console.shells import Ran, Shell
from tests.e2e.guarded import connect, identities, refusals
from tests.e2e.plain import Plain
from tests.e2e.running import PROGRAMS, Running, children, command, until

from dspex.bus.server import Server
from dspex.console.main import run
from dspex.core.access import Role

LASTING = Path(__file__).parent / "lasting.py"
PLANS = (
    (f"{PROGRAMS}:Work", 2), (f"{PROGRAMS}:Confides", 1), (f"{LASTING}:Steps", 1), (f"{LASTING}:Waits", 1), (f"{LASTING}:Again", 1), (f"{LASTING}:Calls", 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    data = tmp_path_factory.mktemp("whole") / "data"
    identities(data, "alice")
    with Running(data, *PLANS, secure=True) as system:
        yield system


async def _as_client(system: Running) -> Plain:
    return await connect(system.url, identities(system.data).context(Role.CLIENT, "alice"))


async def _run_tasks(client: Plain, book: str) -> None:
    """Every way in which a task can go: effects, sleep, signals, retries, calls, keys, cancel."""
    assert (await client.ask("work", {"text": "now"})).json["text"] == "now"
    body: dict[str, Any] = {"task": "a", "book": book}
    wanted: dict[str, dict[str, Any]] = {
        "steps": {"do": "sleep", "seconds": 1}, "again": {"task": "b", "times": 1}, "calls": {"task": "c"},
    }  # fmt: skip
    tasks = {program: await client.submit(program, body | more) for program, more in wanted.items()}
    waits = [await client.submit("waits", body | {"task": "d", "do": do}) for do in ("signal", "sleep", "signal")]
    await client.store("signal", "waits", {"task": waits[0], "name": "go", "value": "on"})
    await client.store("signal", "waits", {"task": waits[2], "name": "cancel", "value": "not wanted"})
    await client.store("outcome", "waits", {"task": waits[0], "score": 1.0})
    for program, task in tasks.items():
        assert (await client.final(program, task)).code is None
    assert [(await client.final("waits", task)).code for task in waits[:2]] == [None, None]
    assert (await client.final("waits", waits[2])).code is not None
    variables = await client.nc.request("dspex.variables.work.get", b"", timeout=5)
    assert b"assignment" in variables.data


async def _kill(system: Running, client: Plain, pid: int) -> None:
    """Kill a process that works, and see that no task was lost."""
    tasks = [await client.submit("work", {"text": str(n), "seconds": 0.05}) for n in range(20)]
    os.kill(pid, signal.SIGKILL)
    for n, task in enumerate(tasks):
        assert (await client.final("work", task)).json["text"] == str(n)


async def test_the_doors_work_and_processes_may_die(system: Running, tmp_path: Path) -> None:
    book = tmp_path / "book"
    book.touch()
    client = await _as_client(system)
    async with client:
        await _run_tasks(client, str(book))
        await _kill(system, client, system.below_supervisor()[2])
        await _kill(system, client, system.registrar())
        await _kill(system, client, system.server())
        await _kill(system, client, system.supervisor())
        await asyncio.to_thread(until, lambda: len(children(system.supervisor())) == 9, 30)
        await _run_tasks(client, str(book))


def test_the_commands_work_as_the_console(
    system: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def shell(*arguments: str) -> Ran:
        """As from the command line, and sooner: in this process."""
        code = run([*arguments, "--data", str(system.data)])
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    task = str(shell("submit", "work", "text=cli", "--json").json["task"])
    for arguments in (
        ("ask", "work", "text=a"), ("result", task), ("score", task, "0.5"), ("tasks",),
        ("events", task), ("vars", "work"), ("verify",), ("export", "out.db"), ("limits", "set", "work", "rate=1000/s"),
        ("limits", "ls"), ("limits", "clear", "work"), ("cost", "--json"), ("breakers", "ls"), ("dlq", "ls"), ("scale", "work", "2"),
    ):  # fmt: skip
        ran = shell(*arguments)
        assert (ran.code, ran.err) == (0, ""), (arguments, ran.out, ran.err)
    assert "place     output.pid" in shell("replay", task).out
    assert (shell("cancel", task).code, shell("signal", task, "note").code) == (1, 1), "it has ended"
    for more in ((), ("--set", "input.text=other"), ("--code", f"{PROGRAMS}:Work")):
        forked = shell("fork", task, "--at", "1", "--wait", *more, "--json")
        assert forked.code == 0, (more, forked.out, forked.err)
    states = {row["agent"]: row["state"] for row in shell("ps", "--json").lines}
    assert len(states) == 12 and set(states.values()) == {"serving"}
    doctor = {check["check"]: check for check in shell("doctor", "--json").lines}
    assert (doctor["access"]["status"], doctor["certificate"]["status"]) == ("ok", "ok")
    assert "CONSOLE, with TLS" in doctor["access"]["message"]
    assert {doctor[name]["status"] for name in ("jetstream", "log", "archive", "work")} == {"ok"}


def test_a_client_context_works_from_the_shell_and_sees_no_log(
    system: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NATS_CREDS", identities(system.data).context(Role.CLIENT, "alice"))
    assert run(["submit", "work", "text=mine", "--json"]) == 0
    task = str(json.loads(capsys.readouterr().out)["task"])
    assert run(["result", "work", task, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["output"]["text"] == "mine"
    assert run(["events"]) == 1 and "nobody serves dspex.log.read" in capsys.readouterr().err
    monkeypatch.delenv("NATS_CREDS")
    assert run(["ask", "work", "text=a", "--nats", system.url]) == 3
    assert "certificates that you trust" in capsys.readouterr().err


async def test_an_effect_that_is_private_is_sealed(system: Running) -> None:
    async with await _as_client(system) as client:
        asked = await client.ask("confides", {"text": "between us"})
        assert asked.code is None, asked.error


def test_nothing_that_the_system_does_is_refused(system: Running) -> None:
    """Last in the file: what the tests above have done is in the log of the server."""
    assert refusals(system.data / "server" / "nats.log") == []
    assert "refused" not in system.words


def test_no_process_shows_a_seed_and_no_file_but_the_seeds_has_one(system: Running) -> None:
    seeds = [file.read_text().strip() for file in (system.data / "secure").glob("*.nk")]
    assert len(seeds) == 11 and all(seed.startswith("SU") for seed in seeds)
    shown = [command(pid) for pid in [system.root, *system.descendants()]]
    shown += [Path(f"/proc/{pid}/environ").read_text(errors="replace") for pid in [system.root, *system.descendants()]]
    files = [file for file in system.data.rglob("*") if file.is_file() and file.suffix != ".nk"]
    shown += [file.read_bytes().decode("latin-1") for file in files]
    shown.append(system.words)
    assert not [seed[:6] for seed in seeds for text in shown if seed in text]
    private = [file for file in (system.data / "secure").iterdir() if file.stat().st_mode & 0o077]
    assert private == []


async def test_a_log_that_was_open_goes_on_under_rules(tmp_path: Path) -> None:
    """A task that slept when the rules came wakes, and what was stored before is for the console only. A system that is
    down is verified and restored by its operator."""
    data, book = tmp_path / "data", tmp_path / "book"
    book.touch()
    with Running(data, (f"{LASTING}:Waits", 1)) as system:
        async with await system.plain() as plain:
            wait = {"task": "a", "book": str(book), "do": "sleep", "seconds": 4}
            done = await plain.submit("waits", wait | {"seconds": 0})
            await plain.final("waits", done)
            task = await plain.submit("waits", wait)
            await plain.until(lambda story: "TaskSleeping" in story.types(f"task.waits.{task}"))
    secured = identities(data, "alice")
    with Running(data, (f"{LASTING}:Waits", 1), secure=True) as system:
        console = await connect(system.url, secured.context(Role.CONSOLE))
        alice = await connect(system.url, secured.context(Role.CLIENT, "alice"))
        async with console, alice:
            assert (await console.final("waits", task)).json["said"] == "None"
            assert (await alice.result("waits", task, wait="0")).code == 404
            assert (await console.result("waits", done, wait="0")).code is None
    archive = str(data / "archive.db")
    assert await asyncio.to_thread(run, ["verify", "--against-log", "--data", str(data), "--json"]) == 0
    assert await asyncio.to_thread(run, ["restore", archive, "--replace", "--data", str(data), "--json"]) == 0
    with Running(data, (f"{LASTING}:Waits", 1), secure=True) as system:
        async with await connect(system.url, secured.context(Role.CONSOLE)) as console:
            assert (await console.final("waits", task)).code is None
        assert refusals(data / "server" / "nats.log") == []
    lines = book.read_text().split("\n")
    assert len([line for line in lines if line.startswith("a 1")]) == 2, "its last step was done once"


async def test_a_server_of_ones_own_includes_what_show_prints(tmp_path: Path) -> None:
    data, rules = tmp_path / "data", tmp_path / "rules.conf"
    secured = identities(data, "alice", programs=("work",))
    shown = Shell(tmp_path)("secure", "show", "--data", str(data))
    place = data / "secure"
    tls = f'tls {{ cert_file: "{place / "server.pem"}", key_file: "{place / "server-key.pem"}" }}\n'
    rules.write_text(tls + shown.out)
    with Server(tmp_path / "nats", access=rules) as server:
        with Running(data, (f"{PROGRAMS}:Work", 1), nats=server.url, secure=True) as system:
            alice = await connect(server.url, secured.context(Role.CLIENT, "alice"))
            async with alice:
                assert (await alice.ask("work", {"text": "there"})).json["text"] == "there"
            assert refusals(server.data / "nats.log") == [] and "refused" not in system.words
