"""What cannot be used: a taken port, a folder that cannot be written or is in use, a full disk."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.e2e.running import Running
from tests.store.disks import fill


def check_refused(system: Running, *words: str) -> None:
    """It ended with code 1 and one sentence, and left no process behind."""
    assert system.wait() == 1
    said = system.words.strip()
    assert said.count("\n") == 0 and "Traceback" not in said, said
    assert all(word in said for word in words), said


async def test_a_taken_port_means_the_next_free_one(systems: Callable[..., Running]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with systems(("Nap", 1), port=taken) as system:
            assert taken < int(system.url.rpartition(":")[2]) < taken + 100
            async with await system.plain() as plain:
                assert (await plain.ask("nap", {"n": 1})).json["n"] == 1


def test_a_second_system_on_the_same_folder_is_refused_and_the_first_goes_on(systems: Callable[..., Running]) -> None:
    with systems(("Nap", 1)) as first:
        second = systems(("Nap", 1)).launch()
        check_refused(second, "uses the data folder", str(first.root))
        assert first.process and first.process.poll() is None and len(first.below_supervisor()) == 3


@pytest.mark.parametrize("folder", ["/proc/dspex", "/dev/null/dspex"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, folder: str) -> None:
    system = Running(tmp_path / "data", ("Nap", 1))
    system.spec["data"] = folder
    check_refused(system.launch(), folder, "--data")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(systems: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o500)
    check_refused(systems(("Nap", 1)).launch(), "data", "--data")


def test_a_name_file_that_holds_rubbish_is_replaced(systems: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "name").write_bytes(b"\xff\xfe rubbish")
    with systems(("Nap", 1)) as system:
        assert system.url


def test_a_server_that_cannot_start_is_one_sentence(systems: Callable[..., Running], tmp_path: Path) -> None:
    (tmp_path / "data" / "server").mkdir(parents=True)
    (tmp_path / "data" / "server" / "jetstream").write_text("a file where the store should be")
    check_refused(systems(("Nap", 1)).launch(), "nats-server")


@pytest.mark.parametrize(
    ("app", "word"),
    [("no-such-file.py", "no-such-file.py"), ("broken.py", "broken.py:1"), ("programs.py:Missing", "Missing")],
)
def test_an_app_that_cannot_be_loaded_is_one_sentence(
    systems: Callable[..., Running], tmp_path: Path, app: str, word: str
) -> None:
    (tmp_path / "broken.py").write_text("def (\n")
    (tmp_path / "programs.py").write_text("x = 1\n")
    system = systems((str(tmp_path / app), 1)).launch()
    assert system.wait() == 1
    refused = [event for event in system.events if event["event"] == "refused"]
    assert len(refused) == 1 and word in refused[0]["reason"] and "\n" not in refused[0]["reason"]
    assert "Traceback" not in system.words


def test_a_full_disk_at_the_start_is_one_sentence_and_a_later_start_works(
    systems: Callable[..., Running], small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(48 << 20)
    filler = fill(disk)
    system = systems(("Nap", 1), folder="disk0/data", words=disk.parent / "words").launch()
    check_refused(system, "No space left")
    filler.unlink()
    with systems(("Nap", 1), folder="disk0/data", words=disk.parent / "words") as system:
        assert system.url


async def test_a_server_that_cannot_be_started_again_is_tried_until_it_can(
    systems: Callable[..., Running], small_disk: Callable[[int], Path]
) -> None:
    disk = small_disk(48 << 20)
    with systems(("Nap", 1), folder="disk0/data", words=disk.parent / "words") as system:
        async with await system.plain() as plain:
            task = await plain.submit("nap", {"n": 1})
            filler = fill(disk)
            os.kill(system.server(), signal.SIGKILL)
            system.event("crashed", role="server")
            await asyncio.sleep(1)
            filler.unlink()
            system.event("serving", after=len(system.events), role="server", timeout=90)
            assert (await plain.final("nap", task)).json["n"] == 1
            assert (await plain.final("nap", await plain.submit("nap", {"n": 2}))).json["n"] == 2
