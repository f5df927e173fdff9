"""Large values in a NATS object store (ADR-20), and keys in a stream of their own.

The bucket is laid out as every NATS client expects, so `nats object get dspex <sha256>` works. Reads come from the
stream's leader. The streams are made by whoever first has something to keep.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import msgspec

from dspex.bus.streams import ensure_stream, jetstream_api
from dspex.core.errors import ConnectionFailed, Forgotten, LogCorrupt, LogError, NotFound
from dspex.core.headers import EXPECTED
from dspex.core.ports import MAX_OBJECT, Connection, Kept, KeyChange, Message
from dspex.core.subjects import Subjects, valid_token

__all__ = ["CHUNK", "NatsKeys", "NatsObjects", "ensure_aside", "erase_message"]

CHUNK = 128 << 10
"""Bytes of an object in one message."""
IN_FLIGHT = 32
"""Messages of one object under way."""
TRIES = 8
"""Tries of one operation, 4.5 s in all when nobody answers."""
NO_STREAM = 10059
GONE = {10037, 10043, 10057, NO_STREAM}
"""JetStream's words for a message or stream that is not there."""
UNPROVEN = {10071, 10158, 10164}
"""Wrong last sequence, or another append under way in the cluster: read, then decide."""


class NatsObjects:
    """The `Objects` port in the bucket of a program; `replicas` is how many copies are wanted."""

    def __init__(self, connection: Connection, subjects: Subjects, replicas: int = 3, *, program: str = "") -> None:
        self._connection, self.bucket, self._replicas = connection, subjects.bucket_of(program), replicas
        self._stream = f"OBJ_{self.bucket}"

    async def put(self, data: bytes) -> str:
        if len(data) > MAX_OBJECT:
            raise LogError(f"a value has {len(data):,} bytes and the object store takes {MAX_OBJECT:,}")
        digest = hashlib.sha256(data)
        name = digest.hexdigest()
        for attempt in range(TRIES):
            try:
                await self._put(name, data, base64.urlsafe_b64encode(digest.digest()).decode())
                return name
            except (ConnectionFailed, TimeoutError) as error:
                why = str(error) or "no answer"
                await _pause(attempt)
        raise LogError(f"the object store did not take {name}: {why}")

    async def get(self, name: str) -> bytes | None:
        for _ in range(TRIES):
            found = await self._meta(name)
            if found is None:
                return None
            data = await self._chunks(found[1]["nuid"], int(found[1]["size"]))
            if hashlib.sha256(data).hexdigest() == name:
                return data
            again = await self._meta(name)
            if again is not None and again[0] == found[0]:
                raise LogCorrupt(f"the object {name} is not what was put: its checksum differs")
        raise LogError(f"the object {name} was put again and again while it was read")

    async def delete(self, name: str, *, before: float | None = None) -> bool:
        found = await self._meta(name)
        if found is None or (before is not None and found[2] > before):
            return False
        # By its number: what is put at this very moment gets another, and chunks of its own.
        await erase_message(self._connection, self._stream, found[0])
        await self._erase_chunks(found[1]["nuid"])
        return True

    async def list(self) -> list[Kept]:
        found: list[Kept] = []
        after = 0
        while (message := await self._next(after, f"$O.{self.bucket}.M.>")) is not None:
            after = message["seq"]
            meta = msgspec.json.decode(message["body"])
            if not meta.get("deleted"):
                found.append(Kept(meta["name"], meta["size"], message["time"]))
        return found

    async def tidy(self, before: float) -> int:
        """Remove chunks that no object names."""
        what = {"subjects_filter": f"$O.{self.bucket}.C.>"}
        info = await jetstream_api(self._connection, f"STREAM.INFO.{self._stream}", what)
        if "error" in info:
            return 0
        loose = {subject.rpartition(".")[2] for subject in info["state"].get("subjects") or ()}
        after = 0
        while loose and (message := await self._next(after, f"$O.{self.bucket}.M.>")) is not None:
            after = message["seq"]
            loose.discard(msgspec.json.decode(message["body"]).get("nuid", ""))
        gone = 0
        for nuid in loose:
            first = await self._next(0, self._chunk(nuid))
            if first is not None and first["time"] < before:
                await self._erase_chunks(nuid)
                gone += 1
        return gone

    # -- inside

    async def _put(self, name: str, data: bytes, digest: str) -> None:
        old = await self._meta(name)
        nuid = secrets.token_hex(11)
        size = min(CHUNK, self._connection.max_payload - 1024)
        chunks = [data[start : start + size] for start in range(0, len(data), size)]
        if chunks and old is None:  # the first of all finds out whether there is a bucket
            await self._send_first(self._chunk(nuid), chunks[0])
        for start in range(old is None, len(chunks), IN_FLIGHT):
            part = chunks[start : start + IN_FLIGHT]
            for reply in await asyncio.gather(*(self._connection.call(self._chunk(nuid), each) for each in part)):
                _stored(reply)
        meta = {
            "name": name, "bucket": self.bucket, "nuid": nuid, "size": len(data), "chunks": len(chunks),
            "digest": f"SHA-256={digest}", "mtime": "0001-01-01T00:00:00Z", "options": {"max_chunk_size": size},
        }  # fmt: skip
        body = msgspec.json.encode(meta)
        await self._send_first(self._name(name), body, {"Nats-Rollup": "sub"})
        if old is not None:
            await self._erase_chunks(old[1]["nuid"])

    async def _send_first(self, subject: str, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        reply = await self._connection.call(subject, body, headers=headers)
        if reply.status == 503:  # nobody has made it yet, or it has no leader just now
            await ensure_stream(self._connection, _bucket(self.bucket, self._replicas))
            reply = await self._connection.call(subject, body, headers=headers)
        _stored(reply)

    async def _meta(self, name: str) -> tuple[int, dict[str, Any], float] | None:
        message = await _message(self._connection, self._stream, {"last_by_subj": self._name(name)})
        if message is None:
            return None
        meta: dict[str, Any] = msgspec.json.decode(message["body"])
        return None if meta.get("deleted") else (message["seq"], meta, message["time"])

    async def _chunks(self, nuid: str, size: int) -> bytes:
        parts: list[bytes] = []
        after = have = 0
        while have < size and (message := await self._next(after, self._chunk(nuid))) is not None:
            parts.append(message["body"])
            after, have = message["seq"], have + len(message["body"])
        return b"".join(parts)

    async def _erase_chunks(self, nuid: str) -> None:
        while (message := await self._next(0, self._chunk(nuid))) is not None:
            await erase_message(self._connection, self._stream, message["seq"])

    async def _next(self, after: int, subject: str) -> dict[str, Any] | None:
        return await _message(self._connection, self._stream, {"seq": after + 1, "next_by_subj": subject})

    def _chunk(self, nuid: str) -> str:
        return f"$O.{self.bucket}.C.{nuid}"

    def _name(self, name: str) -> str:
        return f"$O.{self.bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"


class NatsKeys:
    """The `Keys` port in a stream: one message a key. Forgetting puts a word in its place that it was forgotten, then
    overwrites it; whoever dies in between has made it unusable, and the next one overwrites it."""

    def __init__(self, connection: Connection, subjects: Subjects, replicas: int = 3) -> None:
        self._connection, self._subjects, self._replicas = connection, subjects, replicas

    async def create(self, name: str, key: bytes | None = None) -> bytes:
        if not valid_token(name):
            raise ValueError(f"{name!r} cannot be a key's name")
        key = secrets.token_bytes(32) if key is None else key
        if await self._append(name, {"key": base64.b64encode(key).decode()}, 0):
            return key
        return await self.get(name)

    async def get(self, name: str) -> bytes:
        message = await self._newest(name)
        if message is None:
            what = f"the key {name} is not here, and what it seals cannot be read without it"
            raise NotFound(what, type="MissingKey")
        key = _key_in(message)
        if key is None:
            raise Forgotten(f"the key {name} was forgotten, and with it what it sealed")
        return key

    async def forget(self, name: str) -> bool:
        while True:
            newest = await self._newest(name)
            if newest is not None and _key_in(newest) is None:
                break
            if await self._append(name, {"forgotten": True}, newest["seq"] if newest else 0):
                break
        had = False
        subject = self._subjects.key(name)
        while message := await _message(self._connection, self._stream(name), {"seq": 1, "next_by_subj": subject}):
            if _key_in(message) is None:
                break
            await erase_message(self._connection, self._stream(name), message["seq"])
            had = True
        return had

    async def changes(self, after: int, limit: int = 1000, program: str = "") -> list[KeyChange]:
        found: list[KeyChange] = []
        every, stream = self._subjects.keys(program), self._subjects.key_stream_of(program)
        while len(found) < limit:
            message = await _message(self._connection, stream, {"seq": after + 1, "next_by_subj": every})
            if message is None:
                break
            after = message["seq"]
            found.append(KeyChange(after, message["subject"].rpartition(".")[2], _key_in(message)))
        return found

    async def _newest(self, name: str) -> dict[str, Any] | None:
        return await _message(self._connection, self._stream(name), {"last_by_subj": self._subjects.key(name)})

    def _stream(self, name: str) -> str:
        return self._subjects.key_stream_of(self._subjects.owner(name))

    async def _append(self, name: str, what: object, last: int) -> bool:
        """Whether it was stored, behind a message of that number and no other."""
        body, subject = msgspec.json.encode(what), self._subjects.key(name)
        for attempt in range(TRIES):
            try:
                reply = await self._connection.call(subject, body, headers={EXPECTED: str(last)})
                if reply.status == 503:
                    if not self._subjects.tenants:  # there the registrar has made it, or nobody may
                        await ensure_stream(self._connection, _key_stream(self._subjects, self._replicas))
                    await _pause(attempt - 1)
                    continue
                answer = msgspec.json.decode(reply.data)
                if "error" not in answer:
                    return True
                error = answer["error"]
                if error.get("err_code") not in UNPROVEN and error.get("code") != 503:
                    raise LogError(f"the keys' stream refused {name}: {error.get('description', '')}")
                newest = await self._newest(name)  # it may be ours, sent before a reply was lost
                if newest is not None and newest["seq"] != last:
                    return bool(newest["body"] == body)
                await _pause(attempt)
            except (ConnectionFailed, TimeoutError):
                await _pause(attempt)
        raise LogError(f"the keys' stream did not take {name}")


async def ensure_aside(connection: Connection, subjects: Subjects, program: str, replicas: int = 3) -> None:
    """Make what a program keeps beside the log, unless it is there: its agents may not, where there are access rules.
    Raises LogError."""
    await ensure_stream(connection, _key_stream(subjects, replicas, program))
    await ensure_stream(connection, _bucket(subjects.bucket_of(program), replicas))


async def erase_message(connection: Connection, stream: str, position: int) -> None:
    """Take a message out of a stream and overwrite its bytes on disk. One that is gone already is fine; a stream that
    is not there is a LogError, for then the message is somewhere else."""
    answer = await jetstream_api(connection, f"STREAM.MSG.DELETE.{stream}", {"seq": position})
    error = answer.get("error")
    if error and error.get("err_code") not in GONE - {NO_STREAM}:
        raise LogError(f"JetStream did not erase position {position}: {error.get('description', 'no reason given')}")


def _bucket(bucket: str, replicas: int) -> dict[str, Any]:
    """An object store as NATS clients make one."""
    return {
        "name": f"OBJ_{bucket}", "description": "dspex: values too large for the log",
        "subjects": [f"$O.{bucket}.C.>", f"$O.{bucket}.M.>"], "retention": "limits", "storage": "file",
        "num_replicas": replicas, "max_msgs": -1, "max_bytes": -1, "max_age": 0, "discard": "new",
        "allow_rollup_hdrs": True, "allow_direct": True, "deny_delete": False, "deny_purge": False,
        "duplicate_window": 100_000_000,
    }  # fmt: skip


def _key_stream(subjects: Subjects, replicas: int, program: str = "") -> dict[str, Any]:
    return {
        "name": subjects.key_stream_of(program), "description": "dspex: keys of private values; never archived",
        "subjects": [subjects.keys(program)], "retention": "limits", "storage": "file", "num_replicas": replicas,
        "max_msgs": -1, "max_bytes": -1, "max_age": 0, "discard": "new", "allow_direct": False,
        "allow_rollup_hdrs": False, "deny_delete": False, "duplicate_window": 100_000_000,
    }  # fmt: skip


async def _pause(attempt: int) -> None:
    await asyncio.sleep(min(0.1 * 2**attempt, 1.0) if attempt >= 0 else 0.0)


def _stored(reply: Message) -> None:
    """Raises TimeoutError for what may pass with time, LogError for what does not."""
    if reply.status == 503:
        raise TimeoutError("the object store has no leader")
    error = msgspec.json.decode(reply.data).get("error")
    if error and error.get("code") == 503:
        raise TimeoutError(error.get("description"))
    if error:
        raise LogError(f"the object store refused a value: {error.get('description', 'no reason given')}")


async def _message(connection: Connection, stream: str, what: Mapping[str, object]) -> dict[str, Any] | None:
    """A message as the stream's leader has it: `subject`, `seq`, `time` and `body`; None when there is none."""
    for attempt in range(TRIES):
        try:
            answer = await jetstream_api(connection, f"STREAM.MSG.GET.{stream}", what)
        except ConnectionFailed as error:
            why = str(error)
        else:
            problem = answer.get("error")
            if problem is None:
                found = answer["message"]
                when = datetime.fromisoformat(found["time"][:26].rstrip("Z") + "+00:00").timestamp()
                body = base64.b64decode(found.get("data", ""))
                return {"subject": found["subject"], "seq": found["seq"], "time": when, "body": body}
            if problem.get("err_code") in GONE:
                return None
            why = problem.get("description", "no reason given")
            if problem.get("code") != 503:
                raise LogError(f"JetStream refused to read {stream}: {why}")
        await _pause(attempt)
    raise LogError(f"{stream} cannot be read: {why}")


def _key_in(message: Mapping[str, Any]) -> bytes | None:
    """The key in a message; None when it says that the key was forgotten."""
    found = msgspec.json.decode(message["body"])
    return base64.b64decode(found["key"]) if "key" in found else None
