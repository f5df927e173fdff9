"""References to secrets, and what they lead to."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tests.console.shells import environment

from dspex import ConfigurationError, Program, Schema, Secret, reveal
from dspex.agents.secrets import MAX_SECRET
from dspex.agents.vault import master_from
from dspex.compose.settings import load_settings
from dspex.core.masking import masked, masked_words
from dspex.core.sealing import guard_of

CANARY = "CANARY-7f3a"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.write_text(f"{CANARY}\n")
    file.chmod(0o600)
    return file


def test_the_environment_and_a_file(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPEX_TEST_SECRET", CANARY)
    assert reveal(Secret("env:DSPEX_TEST_SECRET")) == CANARY == reveal(f"file:{secret}")


@pytest.mark.parametrize(("mode", "what"), [(0o644, "read"), (0o640, "read"), (0o622, "change"), (0o666, "change")])
def test_a_file_that_others_may_use_is_refused(secret: Path, mode: int, what: str) -> None:
    secret.chmod(mode)
    with pytest.raises(ConfigurationError, match=rf"mode {mode:04o}, so others may {what} it: chmod 600"):
        reveal(f"file:{secret}")


def test_what_is_no_secret_is_said_and_not_shown(secret: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSPEX_TEST_NONE", raising=False)
    large, blank, pipe = tmp_path / "large", tmp_path / "blank", tmp_path / "pipe"
    large.write_text(CANARY * (MAX_SECRET // len(CANARY) + 1))
    blank.write_bytes(b"\n")
    os.mkfifo(pipe, 0o600)
    for file in (large, blank):
        file.chmod(0o600)
    wrong = {
        "env:DSPEX_TEST_NONE": "is not set", f"file:{tmp_path}/none": "No such file", f"file:{tmp_path}": "Is a directory",
        f"file:{pipe}": "it is no file", f"file:{large}": "more than", f"file:{blank}": "it holds nothing",
        CANARY: "never the secret itself", f"vault:{CANARY}": "never the secret itself", f"env:{CANARY}": "never the secret",
    }  # fmt: skip
    for reference, words in wrong.items():
        with pytest.raises(ConfigurationError, match=words) as raised:
            reveal(reference)
        assert CANARY not in str(raised.value)


RESOLVER = '''
def read(target):
    if target == "raise":
        raise ValueError("CANARY in its words")
    return 7 if target == "seven" else f"revealed {target}"
'''
ASKS = '''
from dspex import ConfigurationError, Program, Schema, Secret, reveal
from dspex.core.sealing import guard_of

class Holds(Program):
    class Input(Schema):
        token: Secret
    class Output(Schema):
        said: str
    async def predict(self, input):
        return self.Output(said=reveal(input.token))

print(Holds()(token="vault:kv/token").said)
about = Holds().describe()
print(about.input_schema["properties"]["token"]["pattern"], guard_of(about.input_schema, about.output_schema).secret)
for target in ("raise", "seven"):
    try:
        reveal(f"vault:{target}")
    except ConfigurationError as error:
        print(error)
'''


def test_another_distribution_adds_a_scheme(tmp_path: Path) -> None:
    about = tmp_path / "vaulted-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vaulted\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[dspex.secrets]\nvault = vaulted:read\n")
    (tmp_path / "vaulted.py").write_text(RESOLVER)
    (tmp_path / "asks.py").write_text(ASKS)
    where = environment()
    where["PYTHONPATH"] += f":{tmp_path}"
    ran = subprocess.run([sys.executable, "asks.py"], cwd=tmp_path, env=where, capture_output=True, text=True, check=False)
    assert ran.stdout.splitlines() == [
        "revealed kv/token", "^(env|file|vault):.+$ True",
        "there is no secret at vault:raise: its resolver raised ValueError", "there is no secret at vault:seven: its resolver gave a int",
    ], ran.stderr  # fmt: skip


def test_without_others_a_secret_looks_in_a_schema_as_ever() -> None:
    class Holds(Program):
        class Input(Schema):
            token: Secret

        class Output(Schema):
            said: str

        async def predict(self, input: Input) -> Output:
            return self.Output(said="")

    about = Holds().describe()
    assert about.input_schema["properties"]["token"]["pattern"] == "^(env|file):.+$"
    assert guard_of(about.input_schema, about.output_schema).secret


def test_settings_do_not_echo_what_may_be_a_secret(tmp_path: Path) -> None:
    file = tmp_path / "dspex.toml"
    for text in (f'[privacy]\nkey = "{CANARY}"', f"nats = [{CANARY!r}]", f"credentials = [{CANARY!r}]"):
        file.write_text(text)
        with pytest.raises(ConfigurationError, match=r"privacy.key|nats|credentials") as raised:
            load_settings({}, file=file, environment={})
        assert CANARY not in str(raised.value)
    with pytest.raises(ConfigurationError, match="leads to nothing") as raised:
        master_from(CANARY)
    assert CANARY not in str(raised.value)


def test_settings_are_bounded_before_they_are_read(tmp_path: Path) -> None:
    file = tmp_path / "dspex.toml"
    file.write_text("x = [" + "1, " * 400_000 + "]")
    with pytest.raises(ConfigurationError, match=r"has 1,200,\d+ bytes; 1,048,576 are allowed"):
        load_settings({}, file=file, environment={})
    file.write_text("x = " + "[" * 100_000)
    with pytest.raises(ConfigurationError):
        load_settings({}, file=file, environment={})


def test_addresses_are_shown_without_users() -> None:
    assert masked("nats://user:pa/ss@word@host:4222") == "nats://host:4222"
    assert masked("nats://a:b@one:1,tls://token@two:2,three:3") == "nats://one:1,tls://two:2,three:3"
    assert masked("user:password@host") == "host" and masked("nats://host:4222") == "nats://host:4222"
    assert masked_words(["up", "--nats=nats://u:p@h", "a@b"]) == ["up", "--nats=nats://h", "a@b"]


def test_a_secret_is_read_by_many_threads_at_once(secret: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(reveal(f"file:{secret}"))) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CANARY] * 20
