"""The log behind its process: a real process, a real server, a real file."""



from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.store.disks import full_disk

from dspex.bus.client import Client
from dspex.bus.server import Server
from dspex.core.codec import encode_commit
from dspex.core.errors import LogError
from dspex.core.events import Head
from dspex.core.ports import Appended, Conflict
from dspex.core.subjects import Subjects
from dspex.store.contract import LogContract, commit, positions, put
from dspex.store.served import ServedLog
from dspex.store.sqlite import SqliteLog

TASK = "task.qabot.1"
PROCESS = Path(__file__).parents[1] / "agents" / "log_process.py"
_numbers = itertools.count(1)


class Process:
    """A process that owns logs."""

    def __init__(self, url: str) -> None:
        pipe = subprocess.PIPE
        self._popen = subprocess.Popen([sys.executable, str(PROCESS), url], stdin=pipe, stdout=pipe, text=True)

    def own(self, prefix: str, folder: Path, **more: str) -> None:
        """Make it own the log in `folder`, and wait until its doors are open."""
        assert self._popen.stdin and self._popen.stdout
        folder.mkdir(exist_ok=True)
        self._popen.stdin.write(json.dumps({"prefix": prefix, "folder": str(folder), **more}) + "\n")
        self._popen.stdin.flush()
        assert self._popen.stdout.readline().strip() == prefix

    def kill(self) -> None:
        self._popen.kill()
        self.end()

    def end(self) -> None:
        """Let it go in order. Twice is fine."""
        assert self._popen.stdin and self._popen.stdout
        self._popen.stdin.close()
        self._popen.wait(20)
        self._popen.stdout.close()


class Owned:
    """Where a test's logs live: in folders of their own, owned by one process."""

    def __init__(self, url: str, folder: Path, process: Process | None = None) -> None:
        self.url, self.folder, self._shared = url, folder, process
        self.process = process or Process(url)
        self.subjects = Subjects(f"s{next(_numbers)}")
        self.owned: set[str] = set()
        self.clients: list[Client] = []

    def again(self) -> None:
        """Kill the process, and let another one own the log."""
        self.process.kill()
        self.process = Process(self.url)
        self.process.own(self.subjects.prefix, self.folder / self.subjects.prefix)

    async def open(self, subjects: Subjects | None = None, patience: float = 30.0) -> ServedLog:
        subjects = subjects or self.subjects
        client = await Client.connect(self.url, name="tests")
        self.clients.append(client)
        if subjects.prefix not in self.owned:
            self.owned.add(subjects.prefix)
            self.process.own(subjects.prefix, self.folder / subjects.prefix)
        reply = await client.request(subjects.log("head"), b"")
        return ServedLog(client, subjects, json.loads(reply.data)["epoch"], patience=patience)

    async def another(self) -> ServedLog:
        return await self.open(Subjects(f"s{next(_numbers)}"))

    async def close(self) -> None:
        if self._shared is None:
            self.process.end()
        for client in self.clients:
            await client.close()


@pytest.fixture(scope="module")
def process(shared_server: Server) -> Iterator[Process]:
    process = Process(shared_server.url)
    yield process
    process.end()


@pytest.fixture
async def place(shared_server: Server, process: Process, tmp_path: Path) -> AsyncIterator[Owned]:
    place = Owned(shared_server.url, tmp_path, process)
    yield place
    await place.close()


@pytest.fixture
async def mortal(shared_server: Server, tmp_path: Path) -> AsyncIterator[Owned]:
    """The same with a process of its own, to be killed."""
    place = Owned(shared_server.url, tmp_path)
    yield place
    await place.close()


class TestServed(LogContract):
    pass


# -- as JetStream answers


async def ack(client: Client, subject: str, body: bytes, **headers: str) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    answer: dict[str, Any] = json.loads((await client.request(subject, body, headers=named or None)).data)
    return answer


async def test_acknowledgements_are_those_of_jetstream(place: Owned) -> None:
    await place.open()
    client, subjects = place.clients[0], place.subjects
    door = subjects.door("task", "qabot")
    stored = await ack(client, door, b"{}")
    assert stored == {"stream": subjects.stream, "seq": 1}
    event, body = subjects.event(TASK), encode_commit(commit(TASK))
    expected = {"Nats-Expected-Last-Subject-Sequence": "0"}
    assert await ack(client, event, body, **expected) == {"stream": subjects.stream, "seq": 2}
    refused = await ack(client, event, body, **expected)
    assert refused["error"] == {"code": 400, "err_code": 10071, "description": "wrong last sequence: 2"}
    assert (await client.request(subjects.door("task", "nobot"), b"{}")).status == 503


async def test_a_message_id_is_stored_once(place: Owned) -> None:
    log = await place.open()
    client, door = place.clients[0], place.subjects.door("task", "qabot")
    answers = await asyncio.gather(*(ack(client, door, b"{}", Nats_Msg_Id="qabot/k") for _ in range(5)))
    assert {answer["seq"] for answer in answers} == {1}
    assert sorted("duplicate" in answer for answer in answers) == [False, True, True, True, True]
    assert await log.head() == 1


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Nats-Expected-Stream": "OTHER"}, 10060), ({"Nats-Expected-Last-Sequence": "7"}, 10071),
        ({"Nats-Rollup": "all"}, 10003), ({"Nats-TTL": "1s"}, 10003), ({"Nats-Schedule": "@at 2030-01-01T00:00:00Z"}, 10003),
    ],
)  # fmt: skip
async def test_what_would_change_other_rows_is_refused(place: Owned, headers: dict[str, str], code: int) -> None:
    log = await place.open()
    answer = await ack(place.clients[0], place.subjects.door("task", "qabot"), b"{}", **headers)
    assert answer["error"]["err_code"] == code and await log.head() == 0


@pytest.mark.parametrize(
    ("name", "body", "headers"),
    [
        (TASK, encode_commit(commit(TASK)), {}),
        (TASK, b"rubbish", {"Nats-Expected-Last-Subject-Sequence": "0"}),
        (TASK, b"[]", {"Nats-Expected-Last-Subject-Sequence": "0"}),
        (TASK, encode_commit(commit("task.qabot.2")), {"Nats-Expected-Last-Subject-Sequence": "0"}),
        ("task.qabot", encode_commit(commit(TASK)), {"Nats-Expected-Last-Subject-Sequence": "0"}),
    ],
    ids=["nothing expected", "no JSON", "no event", "another aggregate", "no aggregate"],
)
async def test_what_is_no_commit_is_refused(place: Owned, name: str, body: bytes, headers: dict[str, str]) -> None:
    log = await place.open()
    answer = await ack(place.clients[0], place.subjects.event(name), body, **headers)
    assert answer["error"]["code"] == 400 and await log.head() == 0


async def test_bytes_are_kept_as_they_were_sent(place: Owned) -> None:
    """A newer agent may write what this version does not know: it is stored, not understood and written anew."""
    log = await place.open()
    body = encode_commit(commit(TASK)).replace(b'"data":', b'"future": [1,  2],"data":')
    await ack(place.clients[0], place.subjects.event(TASK), body, **{"Nats-Expected-Last-Subject-Sequence": "0"})
    entry = await log.entry(1)
    assert entry is not None and entry.body == body


# -- when the process dies


async def test_a_killed_log_process_loses_nothing_acknowledged(mortal: Owned) -> None:
    log = await mortal.open()
    heads: dict[str, Head] = {}

    async def write(name: str) -> None:
        head = Head()
        for _ in range(60):
            result = await log.append(name, commit(name, head.version), head)
            assert isinstance(result, Appended), result
            heads[name] = head = result.head

    writing = asyncio.gather(*(write(f"task.qabot.{number}") for number in range(8)))
    for _ in range(3):
        await asyncio.sleep(0.15)
        await asyncio.to_thread(mortal.again)
    await writing
    assert [head.version for head in heads.values()] == [60] * 8
    everything = positions(await log.scan(0, 10_000))
    assert everything == list(range(1, 481))


async def test_without_its_process_a_log_says_so_in_time(mortal: Owned) -> None:
    log = await mortal.open(patience=0.5)
    head = await put(log, TASK)
    mortal.process.kill()
    with pytest.raises(LogError, match="cannot be reached: nobody serves it now"):
        await log.append(TASK, commit(TASK, after=1), head)


async def test_another_log_in_its_place_is_noticed(mortal: Owned, tmp_path: Path) -> None:
    log = await mortal.open()
    await put(log, TASK)
    for file in (tmp_path / mortal.subjects.prefix).iterdir():
        file.unlink()
    mortal.again()
    with pytest.raises(LogError, match=r"this was log .* and is log .* now"):
        await log.last(TASK)


async def test_the_file_is_a_log_for_whoever_reads_files(mortal: Owned, tmp_path: Path) -> None:
    log = await mortal.open()
    head = await put(log, TASK, count=3)
    assert await log.append(TASK, commit(TASK), Head()) == Conflict(head)
    file = await SqliteLog.open(tmp_path / mortal.subjects.prefix / "log.db", readonly=True)
    assert await file.scan(0) == await log.scan(0)
    await file.close()


# -- a full disk


async def test_a_full_disk_refuses_at_the_door_and_nothing_else(mortal: Owned, tmp_path: Path) -> None:
    with full_disk(tmp_path, "mount") as disk:
        mortal.folder = disk.folder
        log = await mortal.open()
        client, door = mortal.clients[0], mortal.subjects.door("task", "qabot")
        answers = await asyncio.gather(*(ack(client, door, b"%06d" % number * 1000) for number in range(60)))
        stored = {answer["seq"]: number for number, answer in enumerate(answers) if "error" not in answer}
        refused = [answer["error"] for answer in answers if "error" in answer]
        assert stored and refused
        assert {error["code"] for error in refused} == {503} and "full" in refused[0]["description"]
        kept = {entry.position: entry.body for entry in await log.scan(0)}
        assert kept == {position: b"%06d" % number * 1000 for position, number in stored.items()}
        disk.free()
        assert (await ack(client, door, b"{}"))["seq"] == max(stored) + 1
        await put(log, TASK)
        mortal.process.end()  # it has the file open, on the disk that goes away
