"""TCP proxies that do to connections what networks do: delay, throttle, fall silent in one direction or both, break.

Bytes of a connection that lives are never lost or changed, because TCP sees to that; what a lossy network does to TCP
is silence, delay and resets. A silent direction is what a cut cable or a firewall that forgot a connection looks like:
the other side hears nothing, and no FIN either.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from dspex.bus.server import free_port

__all__ = ["CLEAN", "Proxies", "Proxy", "Weather"]

CHUNK = 1 << 16
T = TypeVar("T")


@dataclass(frozen=True)
class Weather:
    """What a proxy does to every connection through it, old and new.

    `delay` and `jitter` seconds for each chunk, `rate` bytes a second (0: as fast as it goes). `up` and `down`: whether
    what the client says reaches the server, and the other way round; while one is off, what was said waits. `lets_in`:
    whether new connections reach the server; otherwise they are accepted and hear nothing, as behind a cut cable.
    """

    delay: float = 0.0
    jitter: float = 0.0
    rate: float = 0.0
    up: bool = True
    down: bool = True
    lets_in: bool = True


CLEAN = Weather()
CUT = Weather(up=False, down=False, lets_in=False)


class Proxy:
    """A port of its own in front of another; made by `Proxies`. Its methods may be called from any thread."""

    def __init__(self, home: Proxies, port: int, target: Callable[[], tuple[str, int]]) -> None:
        self._home, self._target, self.port = home, target, port
        self.weather = CLEAN
        self.accepted = 0
        self._fair = asyncio.Event()
        self._pairs: set[_Pair] = set()

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        return len(self._pairs)

    def set(self, weather: Weather = CLEAN, **changes: Any) -> None:
        """Change the weather for every connection, from the next chunk on."""
        self._home.do(self._set, replace(weather, **changes))

    def cut(self) -> None:
        """Silence in both directions, and no way in: a network partition."""
        self.set(CUT)

    def heal(self) -> None:
        """Fair weather. What was said meanwhile arrives, unless who said it has hung up."""
        self.set(CLEAN)

    def reset(self) -> None:
        """Break every connection with RST, on both sides."""
        self._home.do(self._break, True)

    def drop(self) -> None:
        """Close every connection in order, with FIN, in the middle of whatever was being said."""
        self._home.do(self._break, False)

    # -- in the loop

    def _set(self, weather: Weather) -> None:
        self.weather = weather
        self._fair.set()  # whoever waits looks again
        self._fair = asyncio.Event()

    def _break(self, hard: bool) -> None:
        for pair in list(self._pairs):
            pair.end(hard)

    async def listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._accept, "127.0.0.1", self.port)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        pair = _Pair(writer)
        self._pairs.add(pair)
        try:
            await self._until(lambda weather: weather.lets_in)
            host, port = self._target()
            back, forth = await asyncio.open_connection(host, port)
            pair.writers.append(forth)
            pair.tasks = [
                asyncio.create_task(self._pump(reader, forth, lambda weather: weather.up)),
                asyncio.create_task(self._pump(back, writer, lambda weather: weather.down)),
            ]
            await asyncio.wait(pair.tasks, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            pass  # nobody listens behind us: hang up, as a port without a server does
        finally:
            pair.end(False)
            self._pairs.discard(pair)

    async def _until(self, fair: Callable[[Weather], bool]) -> None:
        while not fair(self.weather):
            await self._fair.wait()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fair: Callable[[Weather], bool]
    ) -> None:
        """One direction: read no more than was passed on, so that pressure goes back to who sends."""
        try:
            while data := await reader.read(CHUNK):
                weather = self.weather
                if weather.delay or weather.jitter:
                    await asyncio.sleep(weather.delay + random.random() * weather.jitter)
                if weather.rate:
                    await asyncio.sleep(len(data) / weather.rate)
                await self._until(fair)
                writer.write(data)
                await writer.drain()
        except OSError:
            pass


class _Pair:
    """The two halves of one connection."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writers, self.tasks = [writer], list[asyncio.Task[None]]()
        self._me = asyncio.current_task()

    def end(self, hard: bool) -> None:
        for writer in self.writers:
            if hard and (link := writer.get_extra_info("socket")) is not None and link.fileno() >= 0:
                # Lingering for no time: the kernel sends RST in place of FIN.
                link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort() if hard else writer.close()
        for task in self.tasks:
            task.cancel()
        if not self.tasks and self._me and self._me is not asyncio.current_task():
            self._me.cancel()


class Proxies:
    """A thread with a loop in which proxies live. A context manager; or `close` it."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies", daemon=True)
        self._thread.start()
        self._servers: list[asyncio.Server] = []

    def to(self, target: int | Callable[[], tuple[str, int]]) -> Proxy:
        """A new proxy in front of a local port, or of what a function says at each connection."""
        place = target if callable(target) else (lambda: ("127.0.0.1", target))
        proxy = Proxy(self, free_port(), place)
        self._servers.append(self.run(proxy.listen()))
        return proxy

    def do(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call in the loop, and wait."""
        done: Future[T] = Future()

        def call() -> None:
            try:
                done.set_result(function(*arguments))
            except Exception as error:
                done.set_exception(error)

        self._loop.call_soon_threadsafe(call)
        return done.result(30.0)

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30.0)

    def close(self) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        if self._thread.is_alive():
            self.run(end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10.0)
            self._loop.close()

    def __enter__(self) -> Proxies:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
