"""Log processes for tests that write nothing of their own: `python log_process.py nats://…`.

Every line on stdin, `{"prefix": …, "folder": …}`, makes it own one more log and open the doors of `qabot`, as the log
process of a system does once somebody has registered it; then it prints the prefix.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Literal

import uvloop

from dspex.agents.grounds import OwnGround
from dspex.bus.client import Client
from dspex.bus.service import Service
from dspex.core.subjects import Subjects


async def own(
    url: str, prefix: str, folder: str, log: str = "sqlite", durability: Literal["power", "process"] = "process"
) -> None:
    client = await Client.connect(url, name="log process")
    ground = await OwnGround.stand(
        client, Subjects(prefix), name=log, folder=Path(folder), durability=durability, replicas=1, anew=True
    )
    await ground.lead(Service(client, name=f"{prefix}-log", id="test", version="0.0.0"))
    await ground.open_doors(["qabot"], ["qabot"])
    print(prefix, flush=True)  # noqa: T201
    try:
        await ground.work()
    finally:
        await ground.close()
        await client.close()


async def main(url: str) -> None:
    loop = asyncio.get_running_loop()
    owning: set[asyncio.Task[None]] = set()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        owning.add(loop.create_task(own(url, **json.loads(line))))
    for task in owning:
        task.cancel()
    await asyncio.gather(*owning, return_exceptions=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
