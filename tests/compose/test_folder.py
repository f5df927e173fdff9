"""A data folder: one system at a time, a name that stays, a note of where it is reached."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dspex.compose.folder import Folder
from dspex.compose.settings import PLACE
from dspex.core.errors import ConfigurationError


def test_its_name_stays(tmp_path: Path) -> None:
    names = set()
    for _ in range(3):
        folder = Folder(tmp_path / "data")
        names.add(folder.name)
        folder.close()
    assert len(names) == 1 and len(names.pop()) == 4


def test_two_folders_have_two_names(tmp_path: Path) -> None:
    folders = [Folder(tmp_path / str(n)) for n in range(5)]
    assert len({folder.name for folder in folders}) > 1
    for folder in folders:
        folder.close()


@pytest.mark.parametrize("rubbish", [b"", b"\xff\xfe", b"not a name", b"ABCD", b"abcde"])
def test_a_name_that_is_none_is_replaced(tmp_path: Path, rubbish: bytes) -> None:
    (tmp_path / "name").write_bytes(rubbish)
    folder = Folder(tmp_path)
    assert len(folder.name) == 4 and (tmp_path / "name").read_text() == folder.name
    folder.close()


def test_one_at_a_time_and_the_holder_is_named(tmp_path: Path) -> None:
    first = Folder(tmp_path)
    with pytest.raises(ConfigurationError, match=rf"process {os.getpid()}\) uses the data folder"):
        Folder(tmp_path)
    first.close()
    Folder(tmp_path).close()


def test_the_note_is_there_while_it_runs(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.announce("nats://127.0.0.1:4222", "dspex")
    assert json.loads((tmp_path / PLACE).read_text()) == {
        "nats": "nats://127.0.0.1:4222", "pid": os.getpid(), "prefix": "dspex",
    }  # fmt: skip
    folder.close()
    assert not (tmp_path / PLACE).exists()


HOLD = """
import os, sys, time
from pathlib import Path
from dspex.compose.folder import Folder
folder = Folder(Path(sys.argv[1]))
if os.fork() == 0:  # has the lock, too, as every process of a system
    time.sleep(float(sys.argv[2]))
    os._exit(0)
print("held", flush=True)
time.sleep(100)
"""


def test_it_waits_for_the_orphans_of_a_killed_system(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "1"], stdout=subprocess.PIPE)
    assert holder.stdout and holder.stdout.readline()
    holder.kill()
    Folder(tmp_path).close()
    holder.wait()
    holder.stdout.close()


@pytest.mark.parametrize("place", ["/proc/dspex", "/dev/null/dspex"])
def test_a_place_that_cannot_be_a_folder_is_refused(place: str) -> None:
    with pytest.raises(ConfigurationError, match="choose another"):
        Folder(Path(place))
