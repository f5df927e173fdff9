"""Raw nats-py baselines: what the same machine does with the same server when dspex is not there.

Each is a process of its own that prints one JSON line; `run.py` starts them.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import nats
import uvloop
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig

STREAM, CONSUMER, SUBJECT = "RAWQ", "work", "raw.work"
REPLY = b'{"text":"a question of the usual length, more or less"}'


async def pull(url: str, count: int) -> dict[str, float]:
    """Drain a preloaded JetStream work queue: overlapping pulls, decode JSON, send one reply a task, acknowledge."""
    client = await nats.connect(url)
    done = asyncio.Event()
    seen = asked = 0
    first = 0.0
    inbox = client.new_inbox()
    pull_subject = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{CONSUMER}"
    body = json.dumps({"batch": 200, "expires": 20_000_000_000}).encode()

    async def handle(message: Msg) -> None:
        nonlocal seen, asked, first
        if not message.reply:
            return
        if not seen:
            first = time.perf_counter()
        json.loads(message.data)
        seen += 1
        await client.publish("raw.reply", REPLY)
        await client.publish(message.reply, b"+ACK")
        if asked - seen <= 200 and asked < count:
            asked += 200
            await client.publish(pull_subject, body, reply=inbox)
        if seen == count:
            done.set()

    await client.subscribe(inbox, cb=handle)
    asked = 400
    await client.publish(pull_subject, body, reply=inbox)
    await client.publish(pull_subject, body, reply=inbox)
    await done.wait()
    await client.flush()
    seconds = time.perf_counter() - first
    await client.close()
    return {"per_second": count / seconds}


async def fetch(url: str, count: int) -> dict[str, float]:
    """The same with nats-py's own pull subscription, a hundred at a time."""
    client = await nats.connect(url)
    subscription = await client.jetstream().pull_subscribe_bind(CONSUMER, STREAM)
    seen, first = 0, time.perf_counter()
    while seen < count:
        for message in await subscription.fetch(100):
            json.loads(message.data)
            await client.publish("raw.reply", REPLY)
            await message.ack()
            seen += 1
    await client.flush()
    seconds = time.perf_counter() - first
    await client.close()
    return {"per_second": count / seconds}


async def push(url: str, count: int) -> dict[str, float]:
    """The same with nats-py's push subscription and a callback."""
    client = await nats.connect(url)
    done = asyncio.Event()
    seen, first = 0, 0.0

    async def handle(message: Msg) -> None:
        nonlocal seen, first
        first = first or time.perf_counter()
        json.loads(message.data)
        await client.publish("raw.reply", REPLY)
        await message.ack()
        seen += 1
        if seen == count:
            done.set()

    config = ConsumerConfig(max_ack_pending=65_536)
    await client.jetstream().subscribe(
        SUBJECT, queue=CONSUMER, durable=CONSUMER, cb=handle, manual_ack=True, config=config
    )
    await done.wait()
    await client.flush()
    seconds = time.perf_counter() - first
    await client.close()
    return {"per_second": count / seconds}


async def queue_group(url: str, count: int) -> dict[str, float]:
    """Serve a core NATS queue group: decode JSON, publish one reply a task. Nothing is stored anywhere."""
    client = await nats.connect(url)
    done = asyncio.Event()
    seen = 0
    first = 0.0

    async def handle(message: Msg) -> None:
        nonlocal seen, first
        if not seen:
            first = time.perf_counter()
        json.loads(message.data)
        seen += 1
        await client.publish(message.reply, b'{"text":"ok"}')
        if seen == count:
            done.set()

    await client.subscribe("raw.group", queue="q", cb=handle)
    await client.flush()
    print(json.dumps({"ready": True}), flush=True)
    await done.wait()
    await client.flush()
    seconds = time.perf_counter() - first
    await client.close()
    return {"per_second": count / seconds}


async def responder(url: str, count: int) -> dict[str, float]:
    """Answer requests until killed: decode JSON, reply."""
    client = await nats.connect(url)

    async def handle(message: Msg) -> None:
        json.loads(message.data)
        await message.respond(b'{"text":"ok"}')

    await client.subscribe("raw.ask", cb=handle)
    await client.flush()
    print(json.dumps({"ready": True}), flush=True)
    await asyncio.Event().wait()
    return {}


def main() -> None:
    kind, url, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
    work = {"pull": pull, "fetch": fetch, "push": push, "queue_group": queue_group, "responder": responder}[kind]
    print(json.dumps(uvloop.run(work(url, count))), flush=True)


if __name__ == "__main__":
    main()
