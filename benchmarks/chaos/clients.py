"""Clients that work on the jobs of a campaign through the doors, with nats-py alone, and write down what they hear."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from benchmarks.chaos.history import ENDED, History, Op
from benchmarks.chaos.workload import PROGRAM, Job, job
from tests.e2e.plain import WRONG, Plain, Reply

__all__ = ["Client", "Clients"]

AT_ONCE = 48
"""Jobs that one client has under way."""
ASK_TIMEOUT = 10.0
STORE_TIMEOUT = 2.0


class Client:
    """One connection. Whatever it does is in the history before it is done."""

    def __init__(self, name: str, plain: Plain, history: History, seed: int) -> None:
        self.name, self.plain, self.history, self.seed = name, plain, history, seed
        self.room = asyncio.Semaphore(AT_ONCE)

    async def submit(self, job: Job) -> int:
        """The task that this job became; 0 when that is not known. With a key it is sent until it is."""
        while True:
            op = await (self._ask(job) if job.ask else self._store("submit", "task", job.body, job.key, job.headers))
            if op.outcome == "ok":
                return op.task
            if not job.key and op.outcome == "unknown":
                return 0
            await asyncio.sleep(0.1)

    async def again(self, job: Job) -> int:
        """Submit a job with a key once more."""
        while (op := await self._store("submit", "task", job.body, job.key, job.headers)).outcome != "ok":
            await asyncio.sleep(0.1)
        return op.task

    async def tell(self, task: int, action: str, body: dict[str, Any]) -> None:
        """Send a signal, a cancel or a score until it is acknowledged."""
        door = "outcome" if action == "score" else "signal"
        while (await self._store(action, door, {"task": task, **body}, task=task)).outcome != "ok":
            await asyncio.sleep(0.1)

    async def result(self, task: int) -> None:
        """Ask for a result until there is one."""
        while True:
            op = self.history.begin(self.name, "result", task=task)
            try:
                _heard(op, await self.plain.result(PROGRAM, task, wait="3", timeout=6))
            except WRONG:
                op.ended = time.time()
            if op.outcome == "ok" and op.code in ENDED:
                return
            await asyncio.sleep(0.1)

    async def _ask(self, job: Job) -> Op:
        op = self.history.begin(self.name, "ask", body=job.body, key=job.key)
        try:
            _heard(op, await self.plain.ask(PROGRAM, job.body, headers=job.headers or None, timeout=ASK_TIMEOUT))
        except WRONG:
            op.ended = time.time()
        return op

    async def _store(
        self, action: str, door: str, body: Any, key: str = "", headers: dict[str, str] | None = None, task: int = 0
    ) -> Op:
        op = self.history.begin(self.name, action, body=body, key=key, task=task)
        try:
            position = await self.plain.store(door, PROGRAM, body, headers, STORE_TIMEOUT)
        except WRONG:
            op.ended = time.time()
            return op
        op.ended, op.outcome = time.time(), "ok"
        if door == "task":
            op.task = position
        else:
            op.position = position
        return op


def _heard(op: Op, reply: Reply) -> None:
    """Write down a reply. What is no ending leaves open what became of an ask."""
    op.ended, op.code = time.time(), reply.code or 0
    try:
        op.answer = reply.json
    except ValueError:
        return  # a server without anybody behind the subject answers with nothing
    op.task = op.task or int(reply.task or 0)
    if (op.code in ENDED and op.task) or op.code == 202:
        op.outcome = "ok"
    elif op.code in (400, 429):
        op.outcome = "fail"


class Clients:
    """Works on jobs until `tasks` of them are acknowledged and it is `enough`; begun at most `rate` a second. Then
    waits for each."""

    def __init__(
        self, connect: Callable[[], Awaitable[Plain]], history: History, *, seed: int, tasks: int, rate: float,
        count: int, patience: float, enough: Callable[[], bool] = lambda: True,
    ) -> None:  # fmt: skip
        self._connect, self.history, self.seed = connect, history, seed
        self.tasks, self.rate, self.count, self.patience = tasks, rate, count, patience
        self.acknowledged = self.settled = 0
        self.hanging: list[str] = []
        self.sent = asyncio.Event()
        """Set when all is acknowledged that is wanted, and only what clients do beside is left."""
        self._enough = enough
        self._clients: list[Client] = []

    async def run(self) -> None:
        """All jobs from their submission to what their client wants to know of them."""
        plains = [await self._connect() for _ in range(self.count)]
        self._clients = [Client(f"client-{i}", plain, self.history, self.seed) for i, plain in enumerate(plains)]
        try:
            await self._all()
        finally:
            for plain in plains:
                await plain.close()

    async def _all(self) -> None:
        begun, under_way = time.monotonic(), set[asyncio.Task[None]]()
        for n in self._numbers():
            await asyncio.sleep(max(0.0, begun + n / self.rate - time.monotonic()))
            client = self._clients[n % self.count]
            await client.room.acquire()
            if self.acknowledged >= self.tasks and self._enough():
                client.room.release()
                break
            task = asyncio.create_task(self._one(client, job(self.seed, n)), name=f"job {n}")
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        self.sent.set()
        await self._until_done(under_way)
        if self.acknowledged < self.tasks:
            raise AssertionError(f"{self.acknowledged} of {self.tasks} tasks were acknowledged")

    async def _until_done(self, under_way: set[asyncio.Task[None]]) -> None:
        """Wait for the rest; when nothing more gets done, what is left hangs."""
        left, settled, since = set(under_way), self.settled, time.monotonic()
        while left:
            done, left = await asyncio.wait(left, timeout=1.0)
            for task in done:
                task.result()
            if done or self.settled > settled:
                settled, since = self.settled, time.monotonic()
            if time.monotonic() - since > self.patience:
                self.hanging = sorted(task.get_name() for task in left)
                for task in left:
                    task.cancel()
                return

    def _numbers(self) -> Iterator[int]:
        """More than needed: of some nobody knows whether they were stored."""
        return iter(range(self.tasks * 20 + 1000))

    async def _one(self, client: Client, job: Job) -> None:
        try:
            task = await client.submit(job)
            if task:
                self.acknowledged += 1
                await self._beside(client, job, task)
                self.settled += 1
        finally:
            client.room.release()

    async def _beside(self, client: Client, job: Job, task: int) -> None:
        chance = random.Random(f"{self.seed}/beside/{job.n}")
        if job.cancel:
            if job.kind == "hold":
                await asyncio.sleep(chance.random())
            await client.tell(task, "cancel", {"name": "cancel", "value": "no longer wanted"})
        elif job.kind == "signal":
            await asyncio.sleep(chance.random() * chance.choice((0.0, 3.0)))
            await client.tell(task, "signal", {"name": "go", "value": job.n})
        if job.scored:
            await client.tell(task, "score", {"score": round(chance.random(), 3), "feedback": "as good as any"})
        if job.twice and job.key:
            other = self._clients[chance.randrange(self.count)]
            await other.result(await other.again(job))
        if job.read:
            await client.result(task)


