"""Three servers that are one cluster, with a proxy in front of every connection, and what can happen to them.

Each member reaches each other by a proxy of its own, and agents reach a member by another, so that any of these links
can be cut alone. Members tell nobody where else they could be reached: otherwise they would go around the proxies.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.proxy import Proxies, Proxy
from tests.clusters import Cluster, Member
from tests.e2e.plain import Plain
from tests.e2e.running import Running

from dspex.bus.server import ClusterPlace, Server

__all__ = ["CLUSTER", "ClusterFault", "ProxiedCluster", "clustered"]

STREAM, CONSUMER = "DSPEX", "task-chaos"
NOWHERE = "127.0.0.1:1"
COMES_UP = 120.0
"""Seconds that a member, or the whole cluster, gets to be healthy again."""


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

    def leading(self, consumer: str = "") -> int:
        """Who leads the log, or its consumer of tasks; anybody while there is no leader."""
        return self.number(self.leader_of(STREAM, consumer))


class Clustered(Running):
    """A system on the cluster. Its agents and its other processes go through the proxies, and clients do not."""

    def __init__(self, cluster: ProxiedCluster, data: Path, *plans: tuple[str, int], **options: Any) -> None:
        super().__init__(data, *plans, nats=cluster.agents_url, **options)
        self._cluster = cluster

    @property
    def url(self) -> str:
        return self._cluster.url

    async def plain(self) -> Plain:
        return await Plain.connect(self.url.split(","))


@contextmanager
def clustered(folder: Path, *plans: tuple[str, int], **options: Any) -> Iterator[tuple[Clustered, ProxiedCluster]]:
    """A cluster, and a system on it that has not been started."""
    with Proxies() as proxies:
        cluster = ProxiedCluster(folder / "cluster", proxies)
        try:
            cluster.start(COMES_UP)
            yield Clustered(cluster, folder / "data", *plans, **options), cluster
        finally:
            for server in cluster.servers:
                if server.pid:
                    os.kill(server.pid, signal.SIGCONT)
            cluster.stop()



Begin = Callable[[ProxiedCluster, random.Random], Callable[[], None]]
Who = Callable[[ProxiedCluster, random.Random], int]


@dataclass(frozen=True)
class ClusterFault:
    """`begin` begins it, and what that returns ends it; both may block. `hold` is how long it lasts, in seconds."""

    begin: Begin
    hold: tuple[float, float] = (0.0, 0.0)


def _killed(who: Who) -> ClusterFault:
    """SIGKILL, and started again when the fault ends, as its own supervisor would do."""

    def begin(cluster: ProxiedCluster, chance: random.Random) -> Callable[[], None]:
        victim = cluster.servers[who(cluster, chance)]
        victim.kill()
        return lambda: victim.start(COMES_UP)

    return ClusterFault(begin, (0.5, 4.0))


def _cut(who: Who, *, agents: bool) -> ClusterFault:
    """A member is cut off from the others; with `agents` from them, too, who are not even told that it is gone."""

    def begin(cluster: ProxiedCluster, chance: random.Random) -> Callable[[], None]:
        n = who(cluster, chance)
        links = cluster.around(n) + ([cluster.doors[n]] if agents else [])
        for link in links:
            link.cut()

        def end() -> None:
            for link in links:
                link.heal()

        return end

    return ClusterFault(begin, (3.0, 15.0))


def _rolling(cluster: ProxiedCluster, chance: random.Random) -> Callable[[], None]:
    """Each in turn is stopped in order and started, as for a new version of the server."""
    for server in chance.sample(cluster.servers, 3):
        server.stop()
        server.start(COMES_UP)
        cluster.wait_for_leader(COMES_UP)
    return lambda: None


def _all_killed(cluster: ProxiedCluster, chance: random.Random) -> Callable[[], None]:
    for server in cluster.servers:
        server.kill()

    def end() -> None:
        for server in chance.sample(cluster.servers, 3):
            server.start(COMES_UP)
        cluster.wait_for_leader(COMES_UP)

    return end


def _frozen(cluster: ProxiedCluster, chance: random.Random) -> Callable[[], None]:
    """SIGSTOP of whoever leads the log: it is there, and says nothing."""
    pid = cluster.servers[cluster.leading()].pid
    os.kill(pid, signal.SIGSTOP)
    return lambda: os.kill(pid, signal.SIGCONT)


def _wiped(cluster: ProxiedCluster, chance: random.Random) -> Callable[[], None]:
    """A member dies and comes back with an empty disk; the others give it everything again."""
    victim: Server = chance.choice(cluster.servers)
    cluster.wipe(victim)

    def end() -> None:
        victim.start(COMES_UP)
        cluster.wait_for_leader(COMES_UP)

    return end


def _resets(cluster: ProxiedCluster, chance: random.Random) -> Callable[[], None]:
    """Connections break, between members and to agents, with RST or in order."""
    for _ in range(chance.randint(1, 5)):
        link = chance.choice([*cluster.doors, *cluster.links.values()])
        chance.choice((link.reset, link.drop))()
        time.sleep(chance.uniform(0.05, 0.5))
    return lambda: None


def _half_open(cluster: ProxiedCluster, chance: random.Random) -> Callable[[], None]:
    """One direction of one link is silent: the other side hears nothing, and no end of it either."""
    link = chance.choice([*cluster.doors, *cluster.links.values()])
    silent = chance.choice(("up", "down"))
    link.set(**{silent: False})
    return link.heal


def _slow(cluster: ProxiedCluster, chance: random.Random) -> Callable[[], None]:
    """Every link is slow and thin."""
    links = [*cluster.doors, *cluster.links.values()]
    for link in links:
        link.set(delay=chance.uniform(0.0, 0.03), jitter=chance.uniform(0.0, 0.05), rate=chance.choice((0, 2e6)))

    def end() -> None:
        for link in links:
            link.heal()

    return end


def _any(cluster: ProxiedCluster, chance: random.Random) -> int:
    return chance.randrange(len(cluster.servers))


CLUSTER: dict[str, ClusterFault] = {
    "cluster-stream-leader": _killed(lambda cluster, chance: cluster.leading()),
    "cluster-consumer-leader": _killed(lambda cluster, chance: cluster.leading(CONSUMER)),
    "cluster-meta-leader": _killed(lambda cluster, chance: cluster.number(cluster.wait_for_leader(COMES_UP))),
    "cluster-minority": _cut(lambda cluster, chance: cluster.leading(), agents=False),
    "cluster-minority-alone": _cut(_any, agents=True),
    "cluster-rolling": ClusterFault(_rolling),
    "cluster-all": ClusterFault(_all_killed, (0.2, 2.0)),
    "cluster-frozen": ClusterFault(_frozen, (2.0, 10.0)),
    "cluster-wiped": ClusterFault(_wiped, (0.2, 2.0)),
    "cluster-resets": ClusterFault(_resets),
    "cluster-half-open": ClusterFault(_half_open, (2.0, 15.0)),
    "cluster-slow": ClusterFault(_slow, (3.0, 10.0)),
}
