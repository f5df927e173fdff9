"""Ten thousand clients, each with a connection of its own, ask at once: who is served or refused, does anybody hang?

    python benchmarks/clients.py [--clients 10000] [--rounds 3] [--processes 4] [--agents 2] [--nap 0] [--short]

The clients speak NATS by hand (a socket, CONNECT, SUB, PUB), so that thousands of them fit into a process and what is
measured is the server and the agents. All connect first; then each sends one ask, all in the same moment, and waits
for its answer. Exit code 1 when one of them gets none, or an answer that is neither the output nor a refusal in words.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.gauges import Gauge, look, mib  # noqa: E402 - found by the line above
from benchmarks.soak import processes  # noqa: E402
from tests.e2e.running import Running  # noqa: E402

APP = f"{ROOT / 'benchmarks' / 'programs.py'}:Asked"
CONNECTING = 200
"""Connections that one process opens at the same time."""
PATIENCE = 120.0
"""Seconds after which a client counts as left hanging."""
SPARE_FILES = 500


class Asker(asyncio.Protocol):
    """One client: a connection, an inbox, one ask at a time."""

    def __init__(self, number: int) -> None:
        self.number, self.buffer = number, b""
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.answer: asyncio.Future[tuple[str, float]] | None = None
        self.asked = 0.0
        self.transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(
            b'CONNECT {"verbose":false,"headers":true,"no_responders":true,"lang":"raw","version":"0"}\r\n'
            b"SUB _INBOX.asker%d.%d 1\r\nPING\r\n" % (os.getpid(), self.number)
        )

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer and not self.answer.done():
            self.answer.set_result(("connection lost", time.monotonic() - self.asked))
        if not self.ready.done():
            self.ready.set_exception(exc or ConnectionError("the server hung up"))

    def ask(self) -> asyncio.Future[tuple[str, float]]:
        """Send one; the future has what came of it and after how many seconds."""
        self.answer, self.asked = asyncio.get_running_loop().create_future(), time.monotonic()
        body = b'{"text":"a question of the usual length, more or less"}'
        head = b"PUB dspex.ask.asked _INBOX.asker%d.%d %d\r\n" % (os.getpid(), self.number, len(body))
        self.transport.write(head + body + b"\r\n")
        return self.answer

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n")) >= 0:
            fields = self.buffer[:end].split(b" ")
            word = fields[0]
            if word in (b"MSG", b"HMSG"):
                size = int(fields[-1])
                if len(self.buffer) < end + 4 + size:
                    return
                whole = self.buffer[end + 2 : end + 2 + size]
                self.buffer = self.buffer[end + 4 + size :]
                self._answered(whole, int(fields[-2]) if word == b"HMSG" else 0)
                continue
            self.buffer = self.buffer[end + 2 :]
            if word == b"PING":
                self.transport.write(b"PONG\r\n")
            elif word == b"PONG" and not self.ready.done():
                self.ready.set_result(None)

    def _answered(self, whole: bytes, headers: int) -> None:
        if self.answer is None or self.answer.done():
            return
        fields, body = whole[:headers].decode(), whole[headers:]
        code = ""
        for line in fields.split("\r\n"):
            if line.startswith("Nats-Service-Error-Code:"):
                code = line.partition(":")[2].strip()
        if fields.startswith("NATS/1.0 503"):
            code = "no responders"
        elif not code:
            code = "served" if body.startswith(b'{"text":') else "nonsense"
        self.answer.set_result((code, time.monotonic() - self.asked))


async def be_clients(url: str, count: int, rounds: int) -> None:
    """A process full of clients: connect, say so, and ask whenever a line comes."""
    loop, place = asyncio.get_running_loop(), urlsplit(url)
    gate = asyncio.Semaphore(CONNECTING)

    async def connect(number: int) -> Asker:
        async with gate:
            while True:  # a server that is busy hangs up on who does not say at once who he is
                try:
                    _, asker = await loop.create_connection(lambda: Asker(number), place.hostname, place.port)
                    await asker.ready
                    return asker
                except OSError:
                    await asyncio.sleep(0.2)

    askers = await asyncio.gather(*(connect(number) for number in range(count)))
    print("connected", flush=True)
    for _ in range(rounds):
        await asyncio.to_thread(sys.stdin.readline)
        waiting = [asker.ask() for asker in askers]
        await asyncio.wait(waiting, timeout=PATIENCE)
        said = [future.result() if future.done() else ("hanging", PATIENCE) for future in waiting]
        print(json.dumps(said), flush=True)
    for asker in askers:
        asker.transport.abort()


def room(clients: int) -> int:
    """Raise the limit on open files; how many of the clients there is room for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(clients, hard - SPARE_FILES) if hard != resource.RLIM_INFINITY else clients


async def run(folder: Path, clients: int, rounds: int, many: int, agents: int, nap: float) -> dict[str, Any]:
    gauges: dict[str, Gauge] = {}
    os.environ["ASKED_NAP"] = str(nap)
    with Running(folder / "data", (APP, agents)) as system:
        found: dict[str, Any] = {"clients": clients, "agents": agents, "nap": nap, "rounds": []}
        before = {role: look(pid, 0.0) for role, pid in processes(system).items()}
        sampler = asyncio.create_task(_sample(system, gauges))
        shares = [clients // many + (n < clients % many) for n in range(many)]
        started = time.monotonic()
        workers = [_worker(system.url, share, rounds) for share in shares]
        try:
            lines = await asyncio.gather(*(asyncio.to_thread(_line, worker) for worker in workers))
            assert all(line == "connected\n" for line in lines), lines
            found["connected_after"] = round(time.monotonic() - started, 2)
            for _ in range(rounds):
                for worker in workers:
                    assert worker.stdin
                    worker.stdin.write("ask\n")
                    worker.stdin.flush()
                said = await asyncio.gather(*(asyncio.to_thread(_line, worker) for worker in workers))
                found["rounds"].append(_judged([each for line in said for each in json.loads(line)]))
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
        sampler.cancel()
        with suppress(asyncio.CancelledError):
            await sampler
    found["memory"] = {
        role: {"before": first.pss, "most": gauges[role].most("pss"), "files": gauges[role].most("files")}
        for role, first in sorted(before.items())
        if first and role in gauges
    }
    return found


def _worker(url: str, clients: int, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--be", url, str(clients), str(rounds)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _line(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout
    return worker.stdout.readline()


async def _sample(system: Running, gauges: dict[str, Gauge]) -> None:
    while True:
        for role, pid in processes(system).items():
            if sample := look(pid, time.monotonic()):
                gauges.setdefault(role, Gauge(role)).samples.append(sample)
        await asyncio.sleep(0.25)


def _judged(said: list[tuple[str, float]]) -> dict[str, Any]:
    kinds: dict[str, list[float]] = {}
    for what, seconds in said:
        kinds.setdefault(what, []).append(seconds)
    return {
        what: {"clients": len(times), "p50": _at(times, 50), "p99": _at(times, 99), "most": _at(times, 100)}
        for what, times in sorted(kinds.items())
    }


def _at(times: list[float], percent: int) -> float:
    ordered = sorted(times)
    return round(ordered[min(len(ordered) - 1, len(ordered) * percent // 100)], 3)


def main() -> int:
    if sys.argv[1:2] == ["--be"]:
        room(int(sys.argv[3]))
        asyncio.run(be_clients(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--agents", type=int, default=2)
    parser.add_argument("--nap", type=float, default=0.0, help="seconds that the program takes")
    parser.add_argument("--short", action="store_true", help="2,000 clients, two rounds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    clients, rounds = (2_000, 2) if options.short else (options.clients, options.rounds)
    clients = room(clients)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(run(Path(folder), clients, rounds, options.processes, options.agents, options.nap))
    found |= {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"), "load_average": [round(x, 1) for x in os.getloadavg()],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
    }  # fmt: skip
    bad = sorted({kind for each in found["rounds"] for kind in each} - {"served", "429"})
    if options.json:
        print(json.dumps(found))
    else:
        print(f"{clients:,} clients connected after {found['connected_after']} s; {options.agents} agents")
        for number, each in enumerate(found["rounds"], 1):
            for what, it in each.items():
                times = f"p50 {it['p50']} s, p99 {it['p99']} s, most {it['most']} s"
                print(f"round {number}: {it['clients']:>6,} {what:<14} {times}")
        for role, it in found["memory"].items():
            print(f"{role:<12} {mib(it['before']):>12} before, {mib(it['most']):>12} at most, {it['files']} files")
        print(f"neither served nor refused: {', '.join(bad)}" if bad else "every client was served or refused")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
