"""secure: identities made once, shown, taken away; and what `up` says of a server that others can reach."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.console.shells import PROGRAM, Ran

from dspex.bus.server import Server
from dspex.compose.secure import Secured, adopt_log, is_secured
from dspex.console.main import run
from dspex.console.up import exposed
from dspex.core.access import LOG_ACCOUNT, Role
from dspex.core.errors import ConfigurationError


@pytest.fixture
def dspex(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Ran:
        code = run([*arguments])
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return call


def test_init_makes_what_is_missing_and_nothing_twice(dspex, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "echo.py").write_text(PROGRAM)
    made = dspex("secure", "init", "echo.py", "--client", "alice", "--json").json
    assert set(made["made"]) == {
        "registrar", "archivist", "operator", "console", "agent-echo", "client-alice",
    }  # fmt: skip
    folder = tmp_path / ".dspex" / "secure"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert dspex("secure", "init", "echo.py", "--json").json["made"] == []
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert dspex("secure", "init", "--client", "bob", "--program", "other", "--json").json["made"] == [
        "agent-other", "client-bob",
    ]  # fmt: skip
    shown = dspex("secure", "init", "--client", "bob")
    assert "nothing was missing" in shown.out
    everything = "".join(dspex("secure", *words).out for words in (["list"], ["show"], ["list", "--json"]))
    seeds = [file.read_text() for file in folder.glob("*.nk")]
    assert not [seed for seed in seeds if seed in everything + json.dumps(made)]


def test_a_revoked_client_is_gone_from_the_configuration(dspex, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    dspex("secure", "init", "--client", "alice", "--client", "bob")
    assert "CLIENT_alice" in dspex("secure", "show").out
    assert dspex("secure", "revoke", "alice").code == 0
    assert "CLIENT_alice" not in dspex("secure", "show").out + (tmp_path / ".dspex/secure/access.conf").read_text()
    assert not list((tmp_path / ".dspex/secure").glob("client-alice*"))
    assert "there is no client alice" in dspex("secure", "revoke", "alice").err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("secure", "list"), "has no identities; `dspex secure init` makes them"),
        (("secure", "init", "--client", "A B"), "'A B' cannot be a client's name"),
    ],
)
def test_refusals(dspex, arguments: tuple[str, ...], said: str) -> None:  # type: ignore[no-untyped-def]
    ran = dspex(*arguments)
    assert ran.code == 2 and said in ran.err and not is_secured(Path(".dspex"))


def test_a_death_between_a_seed_and_the_list_loses_nothing(tmp_path: Path) -> None:
    secured = Secured(tmp_path)
    secured.add(clients=["alice"])
    public = next(user.public for user in secured.users if user.name == "alice")
    (tmp_path / "secure" / "identities.json").unlink()  # as if it had never been written
    again = Secured(tmp_path)
    again.add(clients=["alice"])
    assert next(user.public for user in again.users if user.name == "alice") == public
    (tmp_path / "secure" / "identities.json").write_text("{")
    with pytest.raises(ConfigurationError, match="is damaged"):
        Secured(tmp_path)


def test_a_folder_is_for_one_prefix_and_has_bounds(tmp_path: Path) -> None:
    Secured(tmp_path).add()
    with pytest.raises(ConfigurationError, match="are for the prefix dspex, not other"):
        Secured(tmp_path, "other")
    with pytest.raises(ConfigurationError, match="101 programs are more than the 100"):
        Secured(tmp_path).add(programs=[f"p{number}" for number in range(101)])
    assert not Secured(tmp_path).has(Role.AGENT, "p0")


def test_a_log_that_was_open_to_all_is_taken_over(tmp_path: Path) -> None:
    streams = tmp_path / "jetstream" / "jetstream" / "$G" / "streams" / "DSPEX"
    streams.mkdir(parents=True)
    assert adopt_log(tmp_path, LOG_ACCOUNT, "DSPEX") and not adopt_log(tmp_path, LOG_ACCOUNT, "DSPEX")
    assert (tmp_path / "jetstream" / "jetstream" / LOG_ACCOUNT / "streams" / "DSPEX").is_dir()


def test_private_values_from_before_there_were_rules_are_not_left_behind(tmp_path: Path) -> None:
    streams = tmp_path / "jetstream" / "jetstream" / "$G" / "streams"
    for name in ("DSPEX", "DSPEX_KEYS"):
        (streams / name).mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="has private or large values from before it had access rules"):
        adopt_log(tmp_path, LOG_ACCOUNT, "DSPEX")
    assert (streams / "DSPEX").is_dir(), "it stays as it is"


def test_up_warns_of_a_server_that_others_can_reach(tmp_path: Path) -> None:
    assert "lets everybody in" in exposed("nats://0.0.0.0", None, False)
    assert exposed("nats://127.0.0.1", None, False) == "" == exposed("nats://0.0.0.0", None, True)
    with Server(tmp_path / "open", host="0.0.0.0") as server:
        far = f"nats://0.0.0.0:{server.port}"
        assert "lets everybody in" in exposed(far, far, False)
        near = f"nats://user:word@127.0.0.1:{server.port}"
        said = exposed(near, near, False)
        assert "lets everybody in" in said and "word" not in said, "it listens elsewhere, too"
        some = f"nats://127.0.0.1:1,{far}"
        assert exposed(some, some, False).startswith(far), "any of them"
    with Server(tmp_path / "here") as server:
        assert exposed(server.url, server.url, False) == ""
    rules = tmp_path / "rules.conf"
    rules.write_text("authorization { user: a, password: b }\n")
    with Server(tmp_path / "closed", host="0.0.0.0", access=rules) as server:
        far = f"nats://0.0.0.0:{server.port}"
        assert exposed(far, far, False) == ""


def test_a_secured_folder_is_not_run_without_its_rules(dspex, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "echo.py").write_text(PROGRAM)
    dspex("secure", "init", "echo.py")
    ran = dspex("up", "echo.py")
    assert ran.code == 2 and "has access rules; run it with --secure" in ran.err


def test_a_log_that_has_no_access_rules_is_not_run_as_if_it_had(dspex, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "echo.py").write_text(PROGRAM)
    ran = dspex("up", "echo.py", "--log", "sqlite", "--secure")
    assert ran.code == 2 and "a system whose log is sqlite has no access rules yet" in ran.err
    assert not is_secured(tmp_path / ".dspex")
