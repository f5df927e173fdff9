"""Three servers that are one cluster, with a proxy in front of every connection, and what can happen to them.

Each member reaches each other by a proxy of its own, and agents reach a member by another, so that any of these links
can be cut alone. Members tell nobody where else they could be reached: otherwise they would go around the proxies.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.chaos.proxy import Proxies, Proxy
from tests.clusters import Cluster, Member

from dspex.bus.server import ClusterPlace, Server

__all__ = ["FAULTS", "LOG", "ProxiedCluster"]

LOG = "DSPEX"
NOWHERE = "127.0.0.1:1"
COMES_UP = 120.0
"""Seconds that a cluster gets to be whole again."""


class ProxiedCluster(Cluster):
    """`url` is where nothing is in between, `agents_url` where agents connect, through `doors`; `links` are the proxies
    between members, by who connects and to whom."""

    def __init__(self, data: Path, proxies: Proxies, size: int = 3) -> None:
        self._proxies = proxies
        self.links: dict[tuple[int, int], Proxy] = {}
        super().__init__(data, size)
        self.doors = [proxies.to(lambda n=n: ("127.0.0.1", self.servers[n].port)) for n in range(size)]  # type: ignore[misc]

    def _member(self, n: int) -> Member:
        for other, port in enumerate(self.ports):
            if other != n:
                self.links[n, other] = self._proxies.to(port)
        routes = tuple(self.links[n, other].url for other in range(len(self.ports)) if other != n)
        member = Member(self.data / f"n{n}", name=f"n{n}", cluster=ClusterPlace("chaos", self.ports[n], routes))
        member.beside = ("no_advertise: true", f'cluster_advertise: "{NOWHERE}"')
        return member

    @property
    def agents_url(self) -> str:
        return ",".join(door.url for door in self.doors)

    def around(self, n: int) -> list[Proxy]:
        """Every link between a member and the others."""
        return [proxy for pair, proxy in self.links.items() if n in pair]

    def number(self, name: str, otherwise: int = 0) -> int:
        return next((n for n, server in enumerate(self.servers) if server.name == name), otherwise)

    def whole(self, timeout: float = COMES_UP) -> None:
        """Start who is down and wait until all three are healthy and have one leader."""
        for server in self.servers:
            server.start(timeout)
        self.wait_for_leader(timeout)


Fault = Callable[[ProxiedCluster, random.Random], None]


def _kill(cluster: ProxiedCluster, name: str, chance: random.Random) -> None:
    """SIGKILL; up again a little later, as a supervisor would have it."""
    victim = cluster.servers[cluster.number(name, chance.randrange(3))]
    victim.kill()
    time.sleep(chance.uniform(0.5, 4.0))
    victim.start(COMES_UP)


def stream_leader(cluster: ProxiedCluster, chance: random.Random) -> None:
    _kill(cluster, cluster.leader_of(LOG), chance)


def consumer_leader(cluster: ProxiedCluster, chance: random.Random) -> None:
    _kill(cluster, cluster.leader_of(LOG, "task-chaos"), chance)


def meta_leader(cluster: ProxiedCluster, chance: random.Random) -> None:
    _kill(cluster, cluster.wait_for_leader(COMES_UP), chance)


def _partition(cluster: ProxiedCluster, n: int, seconds: float, also: list[Proxy]) -> None:
    cut = [*cluster.around(n), *also]
    for proxy in cut:
        proxy.cut()
    time.sleep(seconds)
    for proxy in cut:
        proxy.heal()


def minority(cluster: ProxiedCluster, chance: random.Random) -> None:
    """The stream's leader is cut off, and nobody but agents reaches it."""
    n = cluster.number(cluster.leader_of(LOG), chance.randrange(3))
    _partition(cluster, n, chance.uniform(3, 12), [])


def minority_alone(cluster: ProxiedCluster, chance: random.Random) -> None:
    """A member is cut off from the others and from the agents, who hear nothing of it, not even that it is gone."""
    n = chance.randrange(3)
    _partition(cluster, n, chance.uniform(3, 12), [cluster.doors[n]])


def rolling(cluster: ProxiedCluster, chance: random.Random) -> None:
    """Each in turn is stopped in order and started, as for a new version of the server."""
    for server in chance.sample(cluster.servers, 3):
        server.stop()
        server.start(COMES_UP)
        cluster.wait_for_leader(COMES_UP)


def all_killed(cluster: ProxiedCluster, chance: random.Random) -> None:
    for server in cluster.servers:
        server.kill()
    time.sleep(chance.uniform(0.2, 2.0))
    for server in chance.sample(cluster.servers, 3):
        server.start(COMES_UP)


def frozen(cluster: ProxiedCluster, chance: random.Random) -> None:
    """SIGSTOP of whoever leads the log: it is there, and says nothing."""
    server = cluster.servers[cluster.number(cluster.leader_of(LOG), chance.randrange(3))]
    pid = server.pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(chance.uniform(2.0, 8.0))
    os.kill(pid, signal.SIGCONT)


def wiped(cluster: ProxiedCluster, chance: random.Random) -> None:
    """A member dies and comes back with an empty disk; the others give it everything again."""
    server: Server = cluster.servers[chance.randrange(3)]
    cluster.wipe(server)
    time.sleep(chance.uniform(0.2, 2.0))
    server.start(COMES_UP)
    cluster.wait_for_leader(COMES_UP)


def resets(cluster: ProxiedCluster, chance: random.Random) -> None:
    """Connections break, between members and to agents, with RST or in order."""
    for _ in range(chance.randint(1, 5)):
        proxy = chance.choice([*cluster.doors, *cluster.links.values()])
        chance.choice((proxy.reset, proxy.drop))()
        time.sleep(chance.uniform(0.05, 0.5))


def half_open(cluster: ProxiedCluster, chance: random.Random) -> None:
    """One direction of one link is silent for a while."""
    proxy = chance.choice([*cluster.doors, *cluster.links.values()])
    if chance.random() < 0.5:
        proxy.set(up=False)
    else:
        proxy.set(down=False)
    time.sleep(chance.uniform(2.0, 12.0))
    proxy.heal()


def slow(cluster: ProxiedCluster, chance: random.Random) -> None:
    """Every link is slow and thin for a while."""
    proxies = [*cluster.doors, *cluster.links.values()]
    for proxy in proxies:
        proxy.set(delay=chance.uniform(0.0, 0.03), jitter=chance.uniform(0.0, 0.05), rate=chance.choice((0, 2e6)))
    time.sleep(chance.uniform(3.0, 10.0))
    for proxy in proxies:
        proxy.heal()


FAULTS: dict[str, Fault] = {
    "cluster-stream-leader": stream_leader,
    "cluster-meta-leader": meta_leader,
    "cluster-consumer-leader": consumer_leader,
    "cluster-minority": minority,
    "cluster-minority-alone": minority_alone,
    "cluster-rolling": rolling,
    "cluster-all": all_killed,
    "cluster-frozen": frozen,
    "cluster-wiped": wiped,
    "cluster-resets": resets,
    "cluster-half-open": half_open,
    "cluster-slow": slow,
}
