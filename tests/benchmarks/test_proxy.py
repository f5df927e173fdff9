"""The proxy of the campaigns does to a connection what it says, and gives it back."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from benchmarks.chaos.proxy import Proxies, Proxy
from tests.e2e.running import until

SHORT = 0.3


class Echoing:
    """A server that says back what it hears, and remembers it."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.heard, self.ended = b"", list[str]()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                link, _ = self.socket.accept()
            except OSError:
                return
            threading.Thread(target=self._echo, args=(link,), daemon=True).start()

    def _echo(self, link: socket.socket) -> None:
        with link:
            try:
                while data := link.recv(4096):
                    self.heard += data
                    link.sendall(data)
                self.ended.append("in order")
            except ConnectionResetError:
                self.ended.append("reset")


@pytest.fixture
def behind() -> Iterator[Echoing]:
    server = Echoing()
    yield server
    server.socket.close()


@pytest.fixture
def proxy(behind: Echoing) -> Iterator[Proxy]:
    with Proxies() as proxies:
        yield proxies.to(behind.port)


@pytest.fixture
def link(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as link:
        link.sendall(b"hello")
        assert link.recv(5) == b"hello"
        yield link


def _silent(link: socket.socket) -> bool:
    link.settimeout(SHORT)
    try:
        return not link.recv(1)
    except TimeoutError:
        return True
    finally:
        link.settimeout(30)


def test_a_cut_connection_is_silent_in_both_directions_and_goes_on_when_it_is_healed(
    proxy: Proxy, behind: Echoing, link: socket.socket
) -> None:
    proxy.cut()
    link.sendall(b"anybody")
    assert _silent(link) and behind.heard == b"hello"
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as late:
        late.sendall(b"?")
        assert _silent(late) and behind.heard == b"hello"
        proxy.heal()
        assert link.recv(7) == b"anybody"
        assert late.recv(1) == b"?"


def test_a_half_open_connection_is_silent_in_one_direction(proxy: Proxy, behind: Echoing, link: socket.socket) -> None:
    proxy.set(down=False)
    link.sendall(b"one")
    until(lambda: behind.heard == b"helloone")
    assert _silent(link)
    proxy.set(up=False)
    assert link.recv(3) == b"one"
    link.sendall(b"two")
    assert _silent(link) and behind.heard == b"helloone"
    proxy.heal()
    assert link.recv(3) == b"two"


def test_a_reset_is_heard_on_both_sides_as_one(proxy: Proxy, behind: Echoing, link: socket.socket) -> None:
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        link.recv(1)
    until(lambda: behind.ended == ["reset"])
    until(lambda: proxy.connections == 0)


def test_a_drop_is_an_orderly_end(proxy: Proxy, behind: Echoing, link: socket.socket) -> None:
    proxy.drop()
    assert link.recv(1) == b""
    until(lambda: behind.ended == ["in order"])


def test_what_is_slow_arrives_whole_and_in_order(proxy: Proxy, behind: Echoing, link: socket.socket) -> None:
    proxy.set(delay=0.01, jitter=0.02, rate=10e6)
    sent = bytes(range(256)) * 1000
    threading.Thread(target=link.sendall, args=(sent,), daemon=True).start()
    got = b""
    while len(got) < len(sent):
        got += link.recv(65536)
    assert got == sent


def test_where_nobody_listens_the_proxy_hangs_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Proxies() as proxies:
        proxy = proxies.to(port)
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as link:
            assert link.recv(1) == b""
