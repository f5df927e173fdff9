"""Identities in files, and a configuration that nats-server takes."""

from __future__ import annotations

import asyncio
import json
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import nats
import pytest

from dspex.bus.access import User, accounts_text
from dspex.bus.certificates import AUTHORITY, CERTIFICATE, KEY, make_certificates
from dspex.bus.client import Client, Message
from dspex.bus.identity import Identity, make_seed, public_key, subjects_of
from dspex.bus.probe import is_loopback, probe
from dspex.bus.server import Server, server_binary
from dspex.core.access import Role
from dspex.core.errors import ConfigurationError, ConnectionFailed
from dspex.core.subjects import Subjects

SUBJECTS = Subjects(tenants=True)


def users(folder: Path, *programs: str, clients: tuple[str, ...] = ("alice",)) -> list[User]:
    who = [(role, role.value) for role in (Role.REGISTRAR, Role.ARCHIVIST, Role.OPERATOR, Role.CONSOLE)]
    who += [(Role.AGENT, name) for name in programs] + [(Role.CLIENT, name) for name in clients]
    return [User(role, name, make_seed(folder / f"{role}-{name}.nk")) for role, name in who]


def test_a_seed_is_made_once_and_is_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "a.nk"
    public = make_seed(file)
    assert public.startswith("U") and public == make_seed(file) == public_key(file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert public != make_seed(tmp_path / "b.nk")
    file.chmod(0o640)
    with pytest.raises(ConfigurationError, match="has mode 0640, so others may read it: chmod 600"):
        public_key(file)


def test_what_is_wrong_with_a_seed_is_said_without_it(tmp_path: Path) -> None:
    file = tmp_path / "a.nk"
    file.write_text("SUAM-not-a-seed")
    file.chmod(0o600)
    with pytest.raises(ConfigurationError) as said:
        public_key(file)
    assert "not-a-seed" not in str(said.value) and str(file) in str(said.value)


def test_a_context_names_files_beside_it_and_must_be_readable(tmp_path: Path) -> None:
    make_seed(tmp_path / "a.nk")
    context = tmp_path / "a.json"
    context.write_text(json.dumps({"nkey": "a.nk", "inbox_prefix": "_INBOX_a", "dspex": {"account": "CLIENT_a"}}))
    identity = Identity.load(str(context))
    assert (identity.seed, identity.inbox, identity.secured) == (str(tmp_path / "a.nk"), "_INBOX_a", True)
    assert subjects_of("dspex", str(context)).tenants and not subjects_of("dspex", None).tenants
    assert Identity.load("some.creds").options() == {"user_credentials": "some.creds"}
    for text in ("", "[]", "{", '{"nkey": 5}'):
        context.write_text(text)
        with pytest.raises(ConfigurationError, match="is no context"):
            Identity.load(str(context))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Identity.load(str(tmp_path / "none.json"))


def test_the_server_takes_the_configuration_also_of_many_programs(tmp_path: Path) -> None:
    many = [f"p{number}" for number in range(12)]
    for programs in ([], ["qabot"], many):
        config = tmp_path / "server.conf"
        text = accounts_text(users(tmp_path, *programs), SUBJECTS)
        config.write_text(f'port: -1\njetstream {{ store_dir: "{tmp_path}/js" }}\n{text}')
        done = subprocess.run([server_binary(), "-t", "-c", config], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        assert "SU" + "A" not in text


async def test_only_who_is_known_is_let_in_and_told_in_a_sentence(
    tmp_path: Path, servers: Callable[..., Server]
) -> None:
    known = users(tmp_path, "qabot")
    rules = tmp_path / "rules.conf"
    rules.write_text(accounts_text(known, SUBJECTS))
    server = servers(access=rules)
    server.start()
    with pytest.raises(ConnectionFailed, match="has access rules, and lets in whom it knows"):
        await Client.connect(server.url, wait=0.0)
    make_seed(tmp_path / "stranger.nk")
    context = tmp_path / "stranger.json"
    context.write_text('{"nkey": "stranger.nk"}')
    with pytest.raises(ConnectionFailed, match="has access rules"):
        await Client.connect(server.url, wait=0.0, credentials=str(context))
    friend = await nats.connect(server.url, nkeys_seed=str(tmp_path / "client-alice.nk"))
    await friend.close()
    info = probe(server.url)
    assert info is not None and info["auth_required"]


async def test_a_connection_with_tls_survives_the_server_and_a_stranger_is_told_why(
    tmp_path: Path, servers: Callable[..., Server]
) -> None:
    make_certificates(tmp_path)
    rules = tmp_path / "rules.conf"
    rules.write_text(f'tls {{ cert_file: "{tmp_path / CERTIFICATE}", key_file: "{tmp_path / KEY}" }}\n')
    server = servers(access=rules)
    server.start()
    context = tmp_path / "any.json"
    context.write_text(json.dumps({"ca": AUTHORITY}))
    async with await Client.connect(server.url, credentials=str(context)) as client:
        client.subscribe("a", lambda message: client.respond(message, message.data * 2))
        big = bytes(3_000_000)
        assert (await client.request("a", big)).data == big * 2
        server.kill()
        server.start()
        assert (await _patiently(client)).data == b"xx"
    with pytest.raises(ConnectionFailed, match="wants TLS, with certificates that you trust"):
        await Client.connect(server.url, wait=0.0)


async def test_a_server_without_tls_gets_no_login_of_who_asked_for_it(
    tmp_path: Path, servers: Callable[..., Server]
) -> None:
    make_certificates(tmp_path)
    server = servers()
    server.start()
    context = tmp_path / "any.json"
    context.write_text(json.dumps({"ca": AUTHORITY}))
    with pytest.raises(ConnectionFailed, match="offers no TLS, and it was asked for"):
        await Client.connect(server.url, wait=0.0, credentials=str(context))


async def _patiently(client: Client) -> Message:
    for _ in range(100):
        try:
            reply = await client.request("a", b"x", timeout=1)
            if not reply.status:
                return reply
        except (ConnectionFailed, TimeoutError):
            pass
        await asyncio.sleep(0.05)
    raise AssertionError("it does not come back")


def test_certificates_are_kept_until_they_must_change(tmp_path: Path) -> None:
    until = make_certificates(tmp_path)
    first = (tmp_path / CERTIFICATE).read_bytes()
    assert make_certificates(tmp_path) == until and (tmp_path / CERTIFICATE).read_bytes() == first
    make_certificates(tmp_path, ("nats.example.org", "10.1.2.3"))
    second = (tmp_path / CERTIFICATE).read_bytes()
    assert second != first
    make_certificates(tmp_path, ("10.1.2.3",))
    assert (tmp_path / CERTIFICATE).read_bytes() == second, "it has that name already, and keeps the others"
    authority = (tmp_path / AUTHORITY).read_bytes()
    (tmp_path / KEY).unlink()  # as after a death between the key and the certificate, the other way round
    make_certificates(tmp_path)
    assert (tmp_path / KEY).is_file() and (tmp_path / AUTHORITY).read_bytes() == authority
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == dict.fromkeys(
        ("ca.pem", "ca-key.pem", "server.pem", "server-key.pem"), "0o600"
    )


@pytest.mark.parametrize(
    ("url", "own"),
    [
        ("nats://127.0.0.1:4222", True), ("nats://localhost", True), ("tls://[::1]:4222", True), ("127.8.0.1:4222", True),
        ("nats://0.0.0.0:4222", False), ("nats://10.0.0.1", False), ("nats://example.org:4222", False), ("", False),
    ],
)  # fmt: skip
def test_whether_an_address_is_this_machine(url: str, own: bool) -> None:
    assert is_loopback(url) is own
