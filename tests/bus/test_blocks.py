"""The end of a stream, read from the files of a server that was killed."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from dspex.bus.blocks import last_position, stream_folder
from dspex.bus.client import Client
from dspex.bus.server import Server
from dspex.bus.streams import ensure_log, jetstream_api
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
    last = whole.rindex(b"dspex.task.qabot") - 22
    for _ in range(300):
        data = bytearray(whole)
        at = random.randrange(last)
        if random.random() < 0.5:
            data[at] ^= 1 << random.randrange(8)
        else:
            data[at : min(at + 700, last)] = bytes(min(at + 700, last) - at)
        block.write_bytes(data)
        assert end_of(server) == COUNT
    for size in range(0, len(whole), 37):  # wherever it was cut, it is read up to there
        block.write_bytes(whole[:size])
        assert end_of(server) <= COUNT
