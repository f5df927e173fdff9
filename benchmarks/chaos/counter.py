"""A process of its own that writes down each effect that is really performed, before the effect may go on.

    python benchmarks/chaos/counter.py SOCKET FILE

It is outside of every fault. Attempts tell it when they began by the machine's monotonic clock, which nothing shifts.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path


async def serve(socket: str, file: Path) -> None:
    with file.open("a", buffering=1) as book:

        async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                line = json.loads(await reader.readline())
                line["at"] = time.time()
                line["began"] += time.time() - time.monotonic()
                book.write(json.dumps(line) + "\n")
                writer.write(b"ok\n")
                await writer.drain()
            except (ValueError, OSError):
                pass  # whoever told it died in the middle of a line: nothing was performed
            finally:
                writer.close()

        async with await asyncio.start_unix_server(one, socket, backlog=1024) as server:
            print("ready", flush=True)
            await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], Path(sys.argv[2])))
