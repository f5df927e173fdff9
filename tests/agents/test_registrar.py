"""The registrar as its supervisor uses it: every death is written down once, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from tests.e2e.plain import Plain

from dspex.agents.link import Link
from dspex.agents.registrar import RegistrarSpec, registrar_main
from dspex.agents.supervisor import Life, fork_child
from dspex.bus.server import Server

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


class Child:
    """A registrar, and our end of its line."""

    def __init__(self, url: str) -> None:
        spec = RegistrarSpec("registrar-test", url)
        self.pid, self.link = fork_child(lambda link: registrar_main(link, Life(), spec), lambda: None)
        self.heard: list[dict[str, object]] = []

    def wait_for(self, key: str, value: object) -> None:
        deadline = time.monotonic() + 30
        while not any(message.get(key) == value for message in self.heard):
            assert time.monotonic() < deadline, self.heard
            self.heard += self.link.receive()
            time.sleep(0.01)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        os.kill(self.pid, number)
        return self.wait()

    def wait(self) -> int:
        _, status = os.waitpid(self.pid, 0)
        self.link.close()
        return status


@pytest.fixture
def line(server: Server) -> Iterator[str]:
    yield server.url


def notice(number: int, agent: str = "nap-1", pid: int = 4711) -> dict[str, object]:
    return {"notice": number, "id": f"life/{agent}/{pid}", "agent": agent, "kind": "nap", "pid": pid, "reason": "SIGKILL"}


def send(link: Link, *notices: dict[str, object]) -> None:
    assert link.send({"processes": [], "notices": list(notices)})


async def deaths(url: str) -> Counter[int]:
    async with await Plain.connect(url) as plain:
        story = await plain.story()
        story.check_versions()
        return Counter(event["data"]["pid"] for event in story.all_of("AgentCrashed"))


async def test_a_death_is_written_down_and_acknowledged(line: str) -> None:
    child = Child(line)
    child.wait_for("state", "serving")
    send(child.link, notice(1), notice(2, pid=4712))
    child.wait_for("ack", 2)
    assert child.end() == 0
    assert await deaths(line) == {4711: 1, 4712: 1}


async def test_the_same_notice_again_is_no_second_death(line: str) -> None:
    child = Child(line)
    for _ in range(3):
        send(child.link, notice(1))
    child.wait_for("ack", 1)
    child.end()
    assert await deaths(line) == {4711: 1}


async def test_a_notice_whose_writer_died_before_it_said_so_is_written_once(line: str) -> None:
    """The supervisor has no ack, so it tells the next registrar, under the same id."""
    first = Child(line)
    send(first.link, notice(1))
    first.wait_for("ack", 1)
    first.end(signal.SIGKILL)
    second = Child(line)
    send(second.link, notice(1), notice(2, pid=4712))
    second.wait_for("ack", 2)
    second.end()
    assert await deaths(line) == {4711: 1, 4712: 1}


async def test_two_deaths_with_the_same_pid_are_two(line: str) -> None:
    child = Child(line)
    send(child.link, notice(1), notice(2) | {"id": "another life"})
    child.wait_for("ack", 2)
    child.end()
    assert await deaths(line) == {4711: 2}


async def test_deaths_wait_while_the_server_is_away(server: Server) -> None:
    child = Child(server.url)
    child.wait_for("state", "serving")
    server.kill()
    send(child.link, notice(1))
    await asyncio.sleep(0.3)
    await asyncio.to_thread(server.start)
    child.wait_for("ack", 1)
    child.end()
    assert await deaths(server.url) == {4711: 1}


async def test_it_ends_when_its_supervisor_is_gone(line: str) -> None:
    child = Child(line)
    child.wait_for("state", "serving")
    child.link.close()
    assert child.wait() == 0
