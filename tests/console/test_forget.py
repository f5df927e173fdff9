"""`dspex forget`, and what the other commands say afterwards; with a master key, as an installation would have one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.console.shells import Shell, stop, until

PROGRAM = '''
from dspex import Private, Program, Schema, effect

@effect
async def look(number: str) -> str:
    return f"record of {number}"

class Vetting(Program):
    class Input(Schema):
        name: str
        number: Private[str]
    class Output(Schema):
        verdict: Private[str]
        length: int
    async def predict(self, input):
        record = await look(input.number)
        return self.Output(verdict=record, length=len(record))

class Open(Program):
    class Input(Schema):
        text: str
    class Output(Schema):
        text: str
    async def predict(self, input):
        return self.Output(text=input.text)
'''
SECRET = "4711-0815"
MASTER = {"VETTING_KEY": "correct horse battery staple and so on"}


class Keyed(Shell):
    """A shell in whose environment the master key is."""

    def __call__(self, *arguments: str, **options):  # type: ignore[no-untyped-def]
        return super().__call__(*arguments, env=MASTER, **options)


@pytest.fixture(scope="module")
def vetting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("vetting")
    (folder / "vet.py").write_text(PROGRAM)
    (folder / "dspex.toml").write_text('[privacy]\nkey = "env:VETTING_KEY"\n')
    shell = Keyed(folder)
    process = shell.start("up", "vet.py", "--durability", "process", "--json", **MASTER)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    yield shell
    stop(process)


def asked(vetting: Shell) -> str:
    ran = vetting("ask", "vetting", "name=Ann", f"number={SECRET}", "--json")
    assert ran.json["output"] == {"verdict": f"record of {SECRET}", "length": 19}
    return str(ran.json["task"])


def test_a_task_is_forgotten_and_everybody_says_so(vetting: Keyed) -> None:
    task, other = asked(vetting), asked(vetting)
    assert vetting("replay", task, "--json").json["same"] is True
    ran = vetting("forget", task, "--reason", "she asked", "--json")
    assert (ran.code, ran.json["task"], ran.json["keys"]) == (0, task, 1)
    again = vetting("forget", task)
    assert again.out == f"task {task} is forgotten: 0 keys destroyed, 0 objects removed\n"
    result = vetting("result", task, "--json")
    assert (result.code, result.json["error"]["code"], result.json["error"]["type"]) == (1, 410, "Forgotten")
    assert result.json["error"]["message"].endswith(": she asked")
    replayed = vetting("replay", task, "--json").json
    assert replayed["same"] is None
    assert f"what task {task} held was forgotten by" in json.dumps(replayed)
    assert vetting("events", task, "--json").lines[-1]["type"] == "TaskForgotten"
    assert SECRET in vetting("result", other).out
    assert vetting("verify", "--against-log").code == 0


def test_what_cannot_be_forgotten_is_refused_in_words(vetting: Keyed) -> None:
    task = str(vetting("ask", "open", "text=hello", "--json").json["task"])
    ran = vetting("forget", task)
    assert (ran.code, ran.err.startswith(f"dspex: nothing of task {task} is sealed")) == (1, True)
    assert vetting("forget", "999999").code == 1
    assert "is no task's id" in vetting("forget", "nonsense").err


def test_an_export_opens_elsewhere_only_with_its_keys(vetting: Keyed, tmp_path: Path) -> None:
    task = asked(vetting)
    for name, flags in (("sealed.db", []), ("open.db", ["--with-keys"])):
        assert vetting("export", str(tmp_path / name), "--task", task, *flags).code == 0
        assert SECRET.encode() not in (tmp_path / name).read_bytes()
    (tmp_path / "vet.py").write_text(PROGRAM)
    elsewhere = Shell(tmp_path)  # without the master key
    assert elsewhere("replay", task, "--log", "open.db", "--app", "vet.py", "--json").json["same"] is True
    sealed = elsewhere("replay", task, "--log", "sealed.db", "--app", "vet.py", "--json")
    assert sealed.json["same"] is None
    assert "is not here, and what it seals cannot be read without it" in sealed.out


def test_the_archive_itself_replays_with_what_stands_beside_it(vetting: Keyed) -> None:
    task = asked(vetting)

    def replayed() -> bool:
        ran = vetting("replay", task, "--log", ".dspex/archive.db", "--json")
        return ran.code == 0 and ran.json["same"] is True

    assert until(replayed, 30)


def test_without_the_master_key_nothing_opens(vetting: Keyed) -> None:
    task = asked(vetting)
    ran = Shell.__call__(vetting, "replay", task, env={"VETTING_KEY": "x" * 40})
    assert "it is sealed with another master key" in ran.out + ran.err
    ran = Shell.__call__(vetting, "replay", task)
    assert "[privacy] key leads to nothing that can be read" in ran.out + ran.err
    assert SECRET not in ran.out + ran.err


def test_a_system_does_not_start_without_its_master_key(tmp_path: Path) -> None:
    (tmp_path / "vet.py").write_text(PROGRAM)
    (tmp_path / "dspex.toml").write_text('[privacy]\nkey = "env:NOBODY_SET_THIS"\n')
    ran = Shell(tmp_path)("up", "vet.py")
    assert (ran.code, "[privacy] key leads to nothing" in ran.err and "env:NOBODY_SET_THIS" in ran.err) == (2, True)
