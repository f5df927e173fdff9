"""Clusters of real servers on this machine, plain or with a proxy in front of every connection between them."""

from __future__ import annotations

import json
import shutil
import socket
import time
from pathlib import Path
from typing import Any

from dspex.bus.server import ClusterPlace, Server, free_port


class Member(Server):
    """A server of a cluster, with more lines in its configuration; `beside` are lines of the cluster's own block."""

    extra: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    def _config(self, port: int) -> str:
        text = super()._config(port)
        if self.beside:
            text = text.replace("cluster {\n", "cluster {\n" + "".join(f"  {line}\n" for line in self.beside))
        return text + "".join(f"{line}\n" for line in self.extra)


class Cluster:
    """Three servers on this machine that are one cluster. `stop` takes them down."""

    def __init__(self, data: Path, size: int = 3) -> None:
        self.data = data
        self.ports = [free_port() for _ in range(size)]
        self.servers = [self._member(n) for n in range(size)]

    def _member(self, n: int) -> Member:
        routes = tuple(f"nats://127.0.0.1:{port}" for port in self.ports)
        return Member(self.data / f"n{n}", name=f"n{n}", cluster=ClusterPlace("tests", self.ports[n], routes))

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
            leaders = {monitor(server, "/jsz").get("meta_cluster", {}).get("leader") for server in living}
            healthy = all(monitor(server, "/healthz").get("status") == "ok" for server in living)
            if len(leaders) == 1 and None not in leaders and healthy:
                return str(leaders.pop())
            assert time.monotonic() < deadline, f"no JetStream leader: {leaders}"
            time.sleep(0.02)

    def member(self, name: str) -> Server:
        return next(server for server in self.servers if server.name == name)

    def leader_of(self, stream: str, consumer: str = "") -> str:
        """The member that leads a stream or one of its consumers, as a majority says; empty while nobody does."""
        said: list[str] = []
        for server in self.servers:
            if server.alive():
                answer = monitor(server, "/jsz?streams=true&consumers=true")
                for account in answer.get("account_details", ()):
                    for found in account.get("stream_detail") or ():
                        if found["name"] != stream:
                            continue
                        mine = [it for it in found.get("consumer_detail") or () if it["name"] == consumer]
                        place = mine[0] if mine else found
                        if not consumer or mine:
                            said.append(place.get("cluster", {}).get("leader", ""))
        named = [name for name in said if name]
        return max(set(named), key=named.count) if named else ""

    def wipe(self, server: Server) -> None:
        """A member that died and comes back with an empty disk."""
        server.kill()
        shutil.rmtree(server.data / "jetstream", ignore_errors=True)

    def stop(self) -> None:
        for server in self.servers:
            server.stop(grace=3.0)


def monitor(server: Server, path: str) -> dict[str, Any]:
    """One answer of a server's monitoring page, by a plain socket; empty when there is none."""
    host, _, port = server.monitor.removeprefix("http://").rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=2.0) as link:
            link.sendall(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            answer = link.makefile("rb").read()
    except (OSError, ValueError):
        return {}
    body = answer.partition(b"\r\n\r\n")[2]
    try:
        found: dict[str, Any] = json.loads(body)
    except ValueError:
        return {}
    return found
