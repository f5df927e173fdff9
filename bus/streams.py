"""Streams and consumers as data, and the few calls that bring a server to that data.

The log's stream never enables message schedules, rollup or per-message TTL, has no age, count or byte limit, and
states its consumer limit: each of these loses or forges acknowledged messages in some corner (see the decisions).
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from dspex.core.errors import ConfigurationError, LogCorrupt, LogError
from dspex.core.ports import Connection, Message
from dspex.core.subjects import STORED_DOORS, Subjects

__all__ = [
    "ACK_WAIT", "EPOCH", "RESTORED", "Known", "consumer_name", "ensure_consumers", "ensure_log", "ensure_queue",
    "has_stream", "jetstream_api", "lease_stream", "log_bytes", "log_stream", "queue_stream", "restored_to",
    "set_doors", "shorten_memory", "split_timers", "storage_left", "stream_names", "task_consumer", "tasks_at",
    "timer_stream",
]  # fmt: skip

ACK_WAIT = 0.75
"""Seconds after which a task whose holder sends no beat is given to another agent."""

SIGNAL_WAIT = 2.0
"""The same for signals, which take a few reads and an append."""

EPOCH = "dspex.epoch"
RESTORED = "dspex.restored"
"""How far the log was rebuilt from an archive, in the stream's metadata."""
MAX_CONSUMERS = 10_000
MAX_QUEUED = 100_000
MAX_QUEUED_BYTES = 256 << 20
"""Bounds of a log process's queue; what does not fit waits in the log."""
LEAST_MEMORY = 100_000_000
"""Nanoseconds for which JetStream remembers message ids at least."""
ASK_AGAIN = 0.5
"""Seconds until what may be asked twice is asked again; then twice as long, up to `LONGEST`."""
LONGEST = 4.0
_REPEATABLE = ("STREAM.INFO.", "STREAM.MSG.GET.", "CONSUMER.INFO.", "STREAM.CREATE.", "CONSUMER.CREATE.")
"""What reads, and what makes something that is the same when it is made twice."""
NOT_FOUND = {10059, 10014}  # stream not found, consumer not found
TOO_FEW_SERVERS = {10074, 10005}
IN_USE = {10058, 10148, 10105}


def log_stream(
    subjects: Subjects, programs: Iterable[str], replicas: int = 1, shut: Collection[tuple[str, str]] = ()
) -> dict[str, Any]:
    """The log's stream: all events, and the stored doors of every registered program but those that are `shut`, pairs
    of door and program."""
    doors = [
        subject
        for program in sorted(programs) for door in STORED_DOORS if (door, program) not in shut
        for subject in subjects.filters(door, program)
    ]  # fmt: skip
    return {
        "name": subjects.stream,
        "description": "dspex: every event, and the doors of every registered program",
        "subjects": [subjects.events, *doors],
        "retention": "limits",
        "storage": "file",
        "num_replicas": replicas,
        "max_consumers": MAX_CONSUMERS,
        "max_msgs": -1,
        "max_bytes": -1,
        "max_age": 0,
        "max_msg_size": -1,
        "max_msgs_per_subject": -1,
        "discard": "old",
        "duplicate_window": 120_000_000_000,
        "allow_direct": True,
        "allow_rollup_hdrs": False,
        "allow_msg_ttl": False,
        "allow_msg_schedules": False,
        "deny_delete": False,
        "deny_purge": False,
    }


def lease_stream(subjects: Subjects, replicas: int = 1) -> dict[str, Any]:
    """One message a lease: who holds it. Its stream sequence is the fencing token."""
    return {
        "name": subjects.lease_stream,
        "description": "dspex: who holds which role",
        "subjects": [subjects.lease(">")],
        "retention": "limits",
        "storage": "file",
        "num_replicas": replicas,
        "max_msgs_per_subject": 1,
        "max_msgs": 10_000,
        "discard": "old",
        "duplicate_window": 100_000_000,
        "allow_direct": False,
    }


def timer_stream(subjects: Subjects, replicas: int = 1, program: str = "*") -> dict[str, Any]:
    """Timers that turn into wakes when they are due, and wakes that wait to be taken. The only stream with schedules,
    because whoever may write a schedule can write any of its stream's subjects."""
    return {
        "name": subjects.timers(program),
        "description": "dspex: timers of sleeping tasks, and wakes",
        "subjects": [subjects.timer(program, "*"), subjects.wake(program)],
        "retention": "workqueue",
        "storage": "file",
        "num_replicas": replicas,
        "max_msgs_per_subject": -1,
        "discard": "old",
        "duplicate_window": 100_000_000,
        "allow_msg_schedules": True,
    }


def queue_stream(subjects: Subjects, replicas: int = 1) -> dict[str, Any]:
    """What waits for agents when a log process owns the log. Disposable: the log has all that is in it, and fills it
    again, so nothing of it is flushed before it is acknowledged. A subject a message, so that nothing is in it twice;
    when it is full, the rest waits in the log."""
    return {
        "name": subjects.queue_stream,
        "description": "dspex: tasks and signals that wait for an agent; the log itself is with the log process",
        "subjects": [f"{subjects.prefix}.queue.>"],
        "retention": "workqueue",
        "storage": "file",
        "num_replicas": replicas,
        "max_consumers": MAX_CONSUMERS,
        "max_msgs": MAX_QUEUED,
        "max_bytes": MAX_QUEUED_BYTES,
        "discard": "new",
        "duplicate_window": 100_000_000,
        "allow_direct": False,
        **({"persist_mode": "async"} if replicas == 1 else {}),
    }


def consumer_name(program: str, door: str = "task") -> str:
    return f"{door}-{program}"


def task_consumer(subjects: Subjects, program: str) -> dict[str, Any]:
    """The one durable pull consumer of a program. Attempts are counted in the log, so it delivers for ever."""
    return {
        "durable_name": consumer_name(program),
        "description": f"tasks of {program}",
        **_filter(subjects.filters("task", program)),
        "deliver_policy": "all",
        "ack_policy": "explicit",
        "ack_wait": int(ACK_WAIT * 1e9),
        "max_deliver": -1,
        "max_ack_pending": 65_536,
        "max_waiting": 4_096,
        "replay_policy": "instant",
    }


async def split_timers(connection: Connection, subjects: Subjects, programs: Collection[str]) -> None:
    """Give up the stream in which a system that was open to all had the timers of every program: wake each task that
    has one there. A task that was to sleep on sets its timer again, in the stream of its program.

    It is told first and then forgotten; who dies in between tells it again, and a wake too many does no harm.
    """
    old = subjects.timer_stream
    info = await jetstream_api(connection, f"STREAM.INFO.{old}")
    if _code(info) in NOT_FOUND:
        return
    _refuse(info, f"the stream {old}")
    unused = f"{subjects.prefix}.timers-of-all"
    if info["config"]["subjects"] != [unused]:  # so that the streams of the programs can have theirs
        config = info["config"] | {"subjects": [unused]}
        _refuse(await jetstream_api(connection, f"STREAM.UPDATE.{old}", config), f"the stream {old}")
    position = 0
    while True:
        what = {"seq": position + 1, "next_by_subj": ">"}
        answer = await jetstream_api(connection, f"STREAM.MSG.GET.{old}", what)
        if "message" not in answer:
            break
        position, subject = answer["message"]["seq"], answer["message"]["subject"].split(".")
        if subject[2] not in programs:  # a stranger's
            continue
        await ensure_stream(connection, timer_stream(subjects, info["config"]["num_replicas"], subject[2]))
        body = base64.b64decode(answer["message"].get("data", ""))
        reply = await connection.request(subjects.wake(subject[2]), body, timeout=5.0)
        _refuse(msgspec.json.decode(reply.data or b'{"error": {}}'), f"a wake of {subject[2]}")
    _refuse(await jetstream_api(connection, f"STREAM.DELETE.{old}"), f"the stream {old}")


def _filter(subjects: tuple[str, ...]) -> dict[str, Any]:
    return {"filter_subject": subjects[0]} if len(subjects) == 1 else {"filter_subjects": list(subjects)}


async def shorten_memory(connection: Connection, subjects: Subjects) -> None:
    """Make the log forget message ids as soon as it can, so that nobody swallows a message by sending its id first."""
    info = await jetstream_api(connection, f"STREAM.INFO.{subjects.stream}")
    _refuse(info, f"the stream {subjects.stream}")
    if info["config"].get("duplicate_window") != LEAST_MEMORY:
        config = info["config"] | {"duplicate_window": LEAST_MEMORY}
        _refuse(await jetstream_api(connection, f"STREAM.UPDATE.{subjects.stream}", config), "the log's memory of ids")


async def jetstream_api(
    connection: Connection, verb: str, body: object = None, timeout: float = 10.0
) -> dict[str, Any]:
    """One call of the JetStream API. The reply's `error` is left for the caller; LogError when nobody answers.

    A cluster never answers what it was asked while it had no leader, so what may be asked twice is asked again.
    """
    data = b"" if body is None else msgspec.json.encode(body)
    try:
        if verb.startswith(_REPEATABLE):
            reply = await _asked(connection, f"$JS.API.{verb}", data, timeout)
        else:
            reply = await connection.request(f"$JS.API.{verb}", data, timeout=timeout)
    except TimeoutError:
        raise LogError(f"JetStream did not answer {verb} within {timeout:.0f} s") from None
    if reply.status == 503:
        raise LogError("the server has no JetStream; start nats-server with -js, or use `dspex up` without --nats")
    answer: dict[str, Any] = msgspec.json.decode(reply.data)
    return answer


async def _asked(connection: Connection, subject: str, data: bytes, timeout: float) -> Message:
    """Ask, less and less often, until one of the questions is answered. Raises TimeoutError, ConnectionFailed."""
    loop = asyncio.get_running_loop()
    deadline, wait = loop.time() + timeout, ASK_AGAIN
    asked: set[asyncio.Future[Message]] = set()
    while (left := deadline - loop.time()) > 0:
        asked.add(asyncio.ensure_future(connection.call(subject, data)))
        answered, asked = await asyncio.wait(asked, timeout=min(wait, left), return_when=asyncio.FIRST_COMPLETED)
        for each in answered:
            if not isinstance(each.exception(), TimeoutError):
                return each.result()
        wait = min(2 * wait, LONGEST)
    raise TimeoutError(f"{subject} is not answered")


@dataclass(frozen=True)
class Known:
    """What is known of a log from outside of the server that has it: which one it is, and how far it went at least."""

    epoch: str
    position: int


async def ensure_log(
    connection: Connection, subjects: Subjects, programs: Iterable[str] = (), replicas: int = 1,
    known: Known | None = None,
) -> str:  # fmt: skip
    """Create the log's stream unless it is there; return its epoch id. An existing stream is left as it is.

    `replicas` is how many copies are wanted; a server that cannot keep so many keeps one. A log that is `known` is
    never begun anew: when the server has lost the stream's description (one flipped bit does it) and still has its
    messages, it is the same log again; without them LogCorrupt is raised.
    """
    info = await jetstream_api(connection, f"STREAM.INFO.{subjects.stream}")
    if _code(info) in NOT_FOUND:
        epoch = known.epoch if known else secrets.token_hex(8)
        config = log_stream(subjects, programs, replicas) | {"metadata": {EPOCH: epoch}}
        info = await _create(connection, config)
        if _code(info) in IN_USE:
            info = await jetstream_api(connection, f"STREAM.INFO.{subjects.stream}")
        elif known and "error" not in info and info["state"]["last_seq"] < known.position:
            await jetstream_api(connection, f"STREAM.DELETE.{subjects.stream}")
            raise LogCorrupt(
                f"the server has no log {subjects.stream} any more, and the archive has it up to {known.position}: "
                "`dspex restore` makes it again from archive.db; to begin a new log, move archive.db and archive.head "
                "away"
            )
    _refuse(info, f"the stream {subjects.stream}")
    epoch = info["config"].get("metadata", {}).get(EPOCH)
    if not epoch:
        raise LogError(f"the stream {subjects.stream} was not made by dspex; choose another prefix")
    return str(epoch)


async def ensure_queue(
    connection: Connection, subjects: Subjects, epoch: str, *, replicas: int = 1, anew: bool = False
) -> None:
    """Create a log process's queue unless it is there. One that is of another log than `epoch` is made anew when that
    is wanted; otherwise ConfigurationError."""
    name = subjects.queue_stream
    info = await jetstream_api(connection, f"STREAM.INFO.{name}")
    known = info.get("config", {}).get("metadata", {}).get(EPOCH)
    if known is not None and known != epoch:
        if not anew:
            raise ConfigurationError(
                f"the log of {subjects.prefix} on this server is {known}, and the one in this data folder is {epoch}; "
                f"choose another --prefix, or remove the stream {name} if that log is gone for good"
            )
        _refuse(await jetstream_api(connection, f"STREAM.DELETE.{name}"), f"to forget the stream {name}")
    if known != epoch:
        await ensure_stream(connection, queue_stream(subjects, replicas) | {"metadata": {EPOCH: epoch}})


async def has_stream(connection: Connection, name: str) -> bool:
    """Whether a stream of that name is there."""
    info = await jetstream_api(connection, f"STREAM.INFO.{name}")
    if _code(info) in NOT_FOUND:
        return False
    _refuse(info, f"the stream {name}")
    return True


async def stream_names(connection: Connection, subject: str) -> list[str]:
    """The streams that hold something under a subject."""
    found: list[str] = []
    while True:
        answer = await jetstream_api(connection, "STREAM.NAMES", {"subject": subject, "offset": len(found)})
        _refuse(answer, "the names of its streams")
        names = answer.get("streams") or []
        found += names
        if not names or len(found) >= int(answer.get("total", 0)):
            return found


async def ensure_stream(connection: Connection, config: dict[str, Any]) -> None:
    """Create a stream unless one of that name is there."""
    answer = await _create(connection, config)
    if _code(answer) not in IN_USE:
        _refuse(answer, f"the stream {config['name']}")


async def _create(connection: Connection, config: dict[str, Any]) -> dict[str, Any]:
    """Create a stream with the replicas wanted, or with one where there are not enough servers."""
    answer = await jetstream_api(connection, f"STREAM.CREATE.{config['name']}", config)
    if config["num_replicas"] > 1 and _code(answer) in TOO_FEW_SERVERS:
        return await _create(connection, config | {"num_replicas": 1})
    return answer


async def restored_to(connection: Connection, subjects: Subjects) -> int:
    """The position up to which the log was rebuilt from an archive; 0 when it never was."""
    info = await jetstream_api(connection, f"STREAM.INFO.{subjects.stream}")
    _refuse(info, f"the stream {subjects.stream}")
    return int(info["config"].get("metadata", {}).get(RESTORED, 0))


async def set_doors(
    connection: Connection, subjects: Subjects, programs: Iterable[str], shut: Collection[tuple[str, str]] = ()
) -> None:
    """Bring the stream's subjects to the events and the doors of exactly these programs, but those that are `shut`."""
    info = await jetstream_api(connection, f"STREAM.INFO.{subjects.stream}")
    _refuse(info, f"the stream {subjects.stream}")
    config = info["config"]
    wanted = log_stream(subjects, programs, shut=shut)["subjects"]
    if sorted(config["subjects"]) != sorted(wanted):
        answer = await jetstream_api(
            connection, f"STREAM.UPDATE.{subjects.stream}", config | {"subjects": wanted}, timeout=30
        )
        _refuse(answer, "the programs' doors")


async def log_bytes(connection: Connection, subjects: Subjects) -> int:
    """How many bytes the log's stream has."""
    info = await jetstream_api(connection, f"STREAM.INFO.{subjects.stream}")
    _refuse(info, f"the stream {subjects.stream}")
    return int(info["state"]["bytes"])


async def storage_left(connection: Connection) -> int | None:
    """Bytes that the account may still store; None when it has no bound."""
    info = await jetstream_api(connection, "INFO")
    _refuse(info, "to say how much is stored")
    most = int(info["limits"]["max_storage"])
    return None if most < 0 else max(0, most - int(info["storage"]))


async def tasks_at(connection: Connection, subjects: Subjects, program: str) -> int:
    """How many tasks of a program wait in the log's stream or run."""
    info = await jetstream_api(connection, f"CONSUMER.INFO.{subjects.stream}.{consumer_name(program)}")
    return 0 if "error" in info else int(info["num_pending"]) + int(info["num_ack_pending"])


async def ensure_consumers(
    connection: Connection, subjects: Subjects, program: str, *, queued: bool = False
) -> float:
    """Create the program's consumers (tasks, signals, wakes), or bring existing ones to today's configuration.
    `queued`: tasks and signals come from a log process's queue.

    Returns when the consumer of tasks was made, in seconds since the epoch: it may be a second one, and deliver again
    what was stored before.
    """
    made = 0.0
    task, doors, stream = task_consumer(subjects, program), subjects.filters("signal", program), subjects.stream
    if queued:
        task["filter_subject"] = subjects.queue("task", program, "*")
        doors, stream = (subjects.queue("signal", program, "*"),), subjects.queue_stream
    signal = task | {
        "durable_name": consumer_name(program, "signal"), "description": f"signals to tasks of {program}",
        **_filter(doors), "ack_wait": int(SIGNAL_WAIT * 1e9),
    }  # fmt: skip
    wake = {name: value for name, value in task.items() if name != "filter_subjects"} | {
        "durable_name": consumer_name(program, "wake"), "description": f"sleeping tasks of {program} to go on",
        "filter_subject": subjects.wake(program),
    }  # fmt: skip
    for place, config in ((stream, task), (stream, signal), (subjects.timers(program), wake)):
        name = config["durable_name"]
        answer = await jetstream_api(
            connection,
            f"CONSUMER.CREATE.{place}.{name}" + (f".{config['filter_subject']}" if "filter_subject" in config else ""),
            {"stream_name": place, "config": config, "action": ""},
            timeout=30,
        )
        _refuse(answer, f"the consumer {name}")
        if config is task:
            made = datetime.fromisoformat(answer["created"]).timestamp()
    return made


def _code(answer: dict[str, Any]) -> int:
    return int(answer.get("error", {}).get("err_code", 0))


def _refuse(answer: dict[str, Any], what: str) -> None:
    if "error" in answer:
        raise LogError(f"JetStream refused {what}: {answer['error'].get('description', 'no reason given')}")
