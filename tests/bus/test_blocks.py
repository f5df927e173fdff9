"""The end of a stream, read from the files of a server that was killed."""

from __future__ import annotations

import asyncio
import random
import re
from pathlib import Path

import pytest

from dspex.bus.blocks import last_position, stream_folder
from dspex.bus.client import Client
from dspex.bus.server import Server
from dspex.bus.streams import ensure_log, jetstream_api
from dspex.core.errors import LogCorrupt
from dspex.core.subjects import Subjects

SUBJECTS = Subjects()
COUNT = 60


async def written(server: Server) -> None:
    """Messages with and without headers, some of them deleted again."""
    async with await Client.connect(server.url) as client:
        await ensure_log(client, SUBJECTS, ["qabot"])
        for number in range(COUNT):
            headers = {"Dspex-Key": f"k{number}"} if number % 3 else None
            await client.request("dspex.task.qabot", b"dspex. " * (number % 50), headers=headers)
        for position in (7, 8, 30):
            await jetstream_api(client, "STREAM.MSG.DELETE.DSPEX", {"seq": position, "no_erase": position == 8})


def end_of(server: Server) -> int:
    return last_position(server.data, SUBJECTS.stream, SUBJECTS.prefix)


def test_the_end_is_found_though_the_block_is_damaged(server: Server, tmp_path: Path) -> None:
    assert end_of(server) == 0
    asyncio.run(written(server))
    server.kill()
    assert end_of(server) == COUNT
    folder = stream_folder(server.data, SUBJECTS.stream)
    assert folder
    [block] = folder.glob("msgs/*.blk")
    whole = block.read_bytes()
    starts = [match.start() - 22 for match in re.finditer(rb"dspex\.task\.qabot", whole)]
    high = {start + byte for start in starts for byte in range(6, 12)}
    last = whole.rindex(b"dspex.task.qabot") - 22
    for _ in range(300):
        data = bytearray(whole)
        at = random.randrange(last)
        if random.random() < 0.5:
            data[at] ^= 1 << random.randrange(8)
        else:
            data[at : min(at + 700, last)] = bytes(min(at + 700, last) - at)
        block.write_bytes(data)
        try:
            assert end_of(server) == COUNT
        except LogCorrupt:  # a bit far up in a position
            assert at in high
    for size in range(0, len(whole), 37):  # wherever it was cut, it is read up to there
        block.write_bytes(whole[:size])
        assert end_of(server) <= COUNT


def test_a_position_that_no_server_should_load_is_told(server: Server) -> None:
    asyncio.run(written(server))
    server.kill()
    folder = stream_folder(server.data, SUBJECTS.stream)
    assert folder
    [block] = folder.glob("msgs/*.blk")
    data = bytearray(block.read_bytes())
    data[data.rindex(b"dspex.task.qabot") - 22 + 4 + 5] ^= 1  # its position, and 2^40
    block.write_bytes(data)
    with pytest.raises(LogCorrupt, match=f"behind position {COUNT - 1} of the log is 1099511627836"):
        end_of(server)
