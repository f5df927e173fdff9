"""Servers for tests: each on a free port, in a folder of its own, taken down afterwards."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("dspex.store.contract", "tests.e2e.plain", "tests.e2e.running")

from dspex.bus.server import ClusterPlace, Server, free_port  # noqa: E402  (assertions first)


class Cluster:
    """Three servers on this machine that are one cluster. `stop` takes them down."""

    def __init__(self, data: Path, size: int = 3) -> None:
        self.data = data
        ports = [free_port() for _ in range(size)]
        routes = tuple(f"nats://127.0.0.1:{port}" for port in ports)
        self.servers = [
            Server(data / f"n{i}", name=f"n{i}", cluster=ClusterPlace("tests", port, routes))
            for i, port in enumerate(ports)
        ]

    @property
    def url(self) -> str:
        """All members, as a client takes them."""
        return ",".join(server.url for server in self.servers)

    def start(self, timeout: float = 30.0) -> None:
        for server in self.servers:
            server.start(timeout)
        self.wait_for_leader(timeout)

    def wait_for_leader(self, timeout: float = 30.0) -> str:
        """The name of the member that leads JetStream, once all living members know it."""
        deadline = time.monotonic() + timeout
        while True:
            living = [server for server in self.servers if server.alive()]
            leaders = {_monitor(server, "/jsz").get("meta_cluster", {}).get("leader") for server in living}
            healthy = all(_monitor(server, "/healthz").get("status") == "ok" for server in living)
            if len(leaders) == 1 and None not in leaders and healthy:
                return str(leaders.pop())
            assert time.monotonic() < deadline, f"no JetStream leader: {leaders}"
            time.sleep(0.02)

    def member(self, name: str) -> Server:
        return next(server for server in self.servers if server.name == name)

    def stop(self) -> None:
        for server in self.servers:
            server.stop(grace=3.0)


def _monitor(server: Server, path: str) -> dict[str, Any]:
    """One answer of a server's monitoring page, by a plain socket."""
    host, _, port = server.monitor.removeprefix("http://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2.0) as link:
            link.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            answer = link.makefile("rb").read()
    except OSError:
        return {}
    body = answer.partition(b"\r\n\r\n")[2]
    try:
        found: dict[str, Any] = json.loads(body)
    except ValueError:
        return {}
    return found


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests of a module; tests keep apart by subject prefix."""
    server = Server(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.stop(grace=3.0)
    shutil.rmtree(server.data, ignore_errors=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of one's own, to be killed if need be."""
    server = Server(tmp_path / "nats")
    server.start()
    yield server
    server.stop(grace=3.0)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Makes servers, each in a folder under the test's; all are stopped afterwards."""
    made: list[Server] = []

    def make(folder: str = "nats", **options: Any) -> Server:
        made.append(Server(tmp_path / folder, **options))
        return made[-1]

    yield make
    for server in made:
        server.stop(grace=3.0)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes small disks, each a folder of so many bytes under the test's; they are taken away afterwards."""
    made: list[Path] = []

    def make(size: int) -> Path:
        folder = tmp_path / f"disk{len(made)}"
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(mount, check=False).returncode:
            pytest.skip("a small disk needs root")
        made.append(folder)
        return folder

    yield make
    for folder in made:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of three for all tests of a module; tests keep apart by subject prefix."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    cluster.start()
    yield cluster
    cluster.stop()
    shutil.rmtree(cluster.data, ignore_errors=True)
