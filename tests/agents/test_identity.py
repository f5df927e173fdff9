"""The lock that is an identity: held by a process as long as it lives, and by nobody else."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspex.agents.identity import end_holder, holder_of, take_identity
from dspex.agents.link import Link
from dspex.agents.supervisor import fork_child

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """Forks a process that takes the identity `a`, and says whether it got it."""
    made: list[tuple[int, Link]] = []

    def make(*, child: bool = False) -> int:
        def hold(link: Link) -> int:
            taken = take_identity(tmp_path / "a")
            below = os.fork() if child else 0
            if child and not below:
                while link.open:  # until the test lets go: what an agent forks does not inherit its identity
                    link.receive()
                    time.sleep(0.01)
                os._exit(0)
            link.send({"taken": taken})
            while link.open:
                link.receive()
                time.sleep(0.01)
            return 0

        pid, link = fork_child(hold, lambda: None)
        made.append((pid, link))
        while not (said := link.receive()):
            time.sleep(0.01)
        return pid if said[0]["taken"] else 0

    yield make
    for pid, link in made:
        link.close()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_one_process_has_it_and_the_next_one_does_not(holder: Callable[..., int], tmp_path: Path) -> None:
    assert holder_of(tmp_path / "a") == 0
    first = holder()
    assert first and holder_of(tmp_path / "a") == first
    assert holder() == 0
    assert holder_of(tmp_path / "a") == first, "who asked did not take it away"


def test_it_ends_with_its_process_and_only_then(holder: Callable[..., int], tmp_path: Path) -> None:
    first = holder(child=True)
    os.kill(first, signal.SIGSTOP)
    assert holder_of(tmp_path / "a") == first, "stopped, it is still there"
    end_holder(tmp_path / "a")
    until = time.monotonic() + 60
    while holder_of(tmp_path / "a"):
        assert time.monotonic() < until
        time.sleep(0.01)
    assert holder(), "the process that it had forked does not have it"


def test_without_a_place_for_locks_an_agent_serves_all_the_same(tmp_path: Path) -> None:
    assert take_identity(tmp_path / "no" / "folder")
    assert holder_of(tmp_path / "no" / "folder") == 0
    end_holder(tmp_path / "no" / "folder")
