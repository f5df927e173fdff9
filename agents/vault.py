"""Values on their way into events and back: what is private is sealed, what is large goes to the object store first.

The object is put before the commit that names it, and the key is stored before anything is sealed with it. So whoever
dies in between leaves an object or a key that nothing names, never a name for what is not there.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, Raw

from dspex.core import headers as h
from dspex.core.codec import NOT_JSON, sealed_body
from dspex.core.errors import ConfigurationError, Forgotten, LogCorrupt, NotFound
from dspex.core.events import Event, Held, InputSealed, Payload
from dspex.core.ports import Entry, Keys, Objects
from dspex.core.sealing import (
    INLINE,
    KEY,
    Guard,
    hidden,
    open_part,
    opened,
    place_of,
    seal,
    text_of,
    unseal,
    value_of,
    with_value,
)
from dspex.core.subjects import Subjects

__all__ = [
    "Key", "Sealer", "Vault", "held_of", "kept_input", "master_from", "sealed_input", "sealed_signal", "submission_of",
    "task_key",
]  # fmt: skip

MIN_MASTER = 32
"""Characters of a master key, at least: it is used as it is, and must not be guessed."""
READABLE = ("Forgotten", "MissingKey")
"""Failures that say why nothing can be sealed or opened; they hold nothing private."""


@dataclass(frozen=True)
class Key:
    """A key and its name."""

    name: str
    key: bytes


class Sealer(Protocol):
    """Somebody with payloads to keep: whose program is private as a whole, or some of whose effects are."""

    def is_private(self, payload: Payload) -> bool: ...
    async def key(self) -> Key: ...


def task_key(epoch: str, task: str, owner: str = "") -> str:
    """The name of a task's own key. The epoch tells it from the same position of another log; `owner` is the program,
    where there are access rules."""
    return f"{owner}-{epoch}-{task}" if owner else f"{epoch}-{task}"


def master_from(reference: str) -> bytes:
    """The master key that a reference leads to; b"" for none. Raises ConfigurationError."""
    if not reference:
        return b""
    from dspex.agents.secrets import reveal

    try:
        words = reveal(reference).strip()
    except ConfigurationError as error:
        raise ConfigurationError(f"[privacy] key leads to nothing that can be read: {error}") from None
    if len(words) < MIN_MASTER:
        raise ConfigurationError(f"[privacy] key = {reference!r} has {len(words)} characters; {MIN_MASTER} are due")
    return hashlib.sha256(words.encode()).digest()


def held_of(payload: Payload) -> Held | None:
    """Where the rest of a payload is; None when it is all there."""
    held = getattr(payload, "held", UNSET)
    return held if isinstance(held, Held) and (held.key or held.blob) else None


class Vault:
    """Keys and objects, and what goes through them. `inline` is how many bytes of a value an event may hold, `owner`
    the program that names its keys after itself, where there are access rules."""

    def __init__(
        self, keys: Keys, objects: Objects, *, inline: int = INLINE, master: bytes = b"", owner: str = ""
    ) -> None:
        self.keys, self.objects, self._inline, self._master = keys, objects, inline, master
        self._owner = owner

    # -- keys

    async def make(self, name: str) -> bytes:
        """The key of this name, made now unless it is there. Raises Forgotten, NotFound as `find` does."""
        if not self._master:
            return self._plain(name, await self.keys.create(name))
        fresh = seal(self._master, secrets.token_bytes(KEY), f"key/{name}")
        return self._plain(name, await self.keys.create(name, fresh))

    async def find(self, name: str) -> bytes:
        """The key of this name. Raises Forgotten, and NotFound when it is not here or the master key is another."""
        return self._plain(name, await self.keys.get(name))

    def _plain(self, name: str, kept: bytes) -> bytes:
        if len(kept) == KEY:
            return kept
        try:
            return unseal(self._master or bytes(KEY), kept, f"key/{name}")
        except LogCorrupt:
            what = "it is sealed with another master key" if self._master else "it is sealed with a master key"
            raise NotFound(f"the key {name} cannot be used: {what} (`[privacy] key`)", type="MissingKey") from None

    # -- bodies of door messages

    async def sealed_message(self, program: str, body: bytes, guard: Guard) -> tuple[bytes, dict[str, str]]:
        """A body that came for a private program, as it is stored: sealed with a key of its own, which is kept first.
        What goes into its headers names the key."""
        name = f"{self._owner}-s{secrets.token_hex(16)}" if self._owner else f"s{secrets.token_hex(16)}"
        key = Key(name, await self.make(name))
        value, held = sealed_input(key, program, body, guard)
        return sealed_body(value, held.sealed), {h.SEALED: name}

    async def key_of(self, headers: Mapping[str, str], epoch: str, task: str) -> Key:
        """The key of a task: the one that its submission is sealed with, or its own, made now when it has none.
        Raises Forgotten, NotFound."""
        name = h.sealed(headers)
        if name is not None:
            return Key(name, await self.find(name))
        name = task_key(epoch, task, self._owner)
        return Key(name, await self.make(name))

    # -- into events

    async def put_away(self, payloads: Sequence[Payload], program: str, guard: Guard, sealer: Sealer) -> list[Payload]:
        """The payloads as the log keeps them. Raises LogError when a store does not answer."""
        return [await self._put_away(payload, program, guard, sealer) for payload in payloads]

    async def _put_away(self, payload: Payload, program: str, guard: Guard, sealer: Sealer) -> Payload:
        if held_of(payload):
            return payload
        if sealer.is_private(payload) and getattr(payload, "type", "") not in READABLE:
            return await self._sealed(payload, program, guard, await sealer.key())
        value = value_of(payload)
        if value is None or len(bytes(value)) <= self._inline:
            return payload
        body = bytes(value)
        blob = await self.objects.put(body)
        return with_value(payload, Raw(b"null"), Held(blob=blob, size=len(body)))

    async def _sealed(self, payload: Payload, program: str, guard: Guard, key: Key) -> Payload:
        parts = hidden(payload, guard)
        if parts is None:
            return payload
        shown, text = parts
        sealed = seal(key.key, text, place_of(program, payload))
        held = Held(key=key.name, sealed=base64.b64encode(sealed).decode())
        if len(sealed) > self._inline:
            held = Held(key=key.name, blob=await self.objects.put(sealed), size=len(sealed))
        return msgspec.structs.replace(shown, held=held)

    # -- and back

    async def bring_back(self, events: Iterable[Event]) -> list[Event]:
        """The events with all that they hold. Raises Forgotten, NotFound with a sentence that names what is missing,
        LogCorrupt for what is not what was put away, LogError when a store does not answer."""
        found: list[Event] = []
        keys: dict[str, bytes] = {}
        for event in events:
            held = held_of(event.data)
            if held is None:
                found.append(event)
                continue
            data = await self._brought_back(event, held, keys)
            found.append(msgspec.structs.replace(event, data=data))
        return found

    async def _brought_back(self, event: Event, held: Held, keys: dict[str, bytes]) -> Payload:
        data, task = event.data, event.aggregate.rpartition(".")[2]
        if held.key and held.key not in keys:
            try:
                keys[held.key] = await self.find(held.key)
            except Forgotten:
                raise Forgotten(f"what task {task} held was forgotten and cannot be read", task=task) from None
            except NotFound as error:
                what = f"task {task} holds private values: {error.message}"
                raise NotFound(what, task=task, type=error.type) from None
        body = text_of(held.sealed) if held.sealed else b""
        if held.blob:
            blob = await self.objects.get(held.blob)
            if blob is None:
                what = f"{event.type} of task {task} names the object {held.blob}, which is not in the object store"
                raise NotFound(what, task=task, type="MissingValue")
            body = blob
        if not held.key:
            return with_value(data, Raw(body))
        text = unseal(keys[held.key], body, place_of(event.aggregate.split(".")[1], data))
        return opened(data, text)


def sealed_input(key: Key, program: str, body: bytes, guard: Guard, what: str = "input") -> tuple[Raw, Held]:
    """A body's open part, and the whole of it sealed. Nothing is open of what may hold a secret in a reference's place,
    or of a signal."""
    sealed = base64.b64encode(seal(key.key, body, f"{program}/{what}")).decode()
    shown = Raw(b"null") if guard.secret or what != "input" else open_part(body, guard.input)
    return shown, Held(key=key.name, sealed=sealed)


def sealed_signal(key: Key, program: str, body: bytes) -> bytes:
    """A signal's body, sealed; whose it is and what it is called can be seen, so that it finds its task."""
    try:
        value = msgspec.json.decode(body)
    except NOT_JSON:
        value = None
    shown = {name: value[name] for name in ("task", "name") if name in value} if isinstance(value, dict) else {}
    _, held = sealed_input(key, program, body, Guard(), "signal")
    return msgspec.json.encode({**shown, "open": None, "sealed": held.sealed})


def kept_input(
    key: Key, program: str, body: bytes, guard: Guard, headers: Mapping[str, str], stored: float, subject: str = ""
) -> InputSealed:
    """A private input that came in the open, as the task's own events keep it; and whose it is, when `subject` says."""
    value, held = sealed_input(key, program, body, guard)
    kept = {name: value for name, value in h.ours(headers).items() if name.lower() != h.SUBJECT.lower()}
    if subject.count(".") > 2:
        kept[h.SUBJECT] = subject
    return InputSealed(input=value, held=held, stored=stored, headers=kept)


def submission_of(task: str, events: Iterable[Event], subjects: Subjects) -> Entry | None:
    """The submission of a task whose message was erased, sealed, as its events keep it; None when they do not."""
    for event in events:
        if isinstance(event.data, InputSealed):
            kept = event.data
            body = sealed_body(kept.input, kept.held.sealed)
            headers = {**kept.headers, h.SEALED: kept.held.key}
            subject = headers.pop(h.SUBJECT, "") or subjects.door("task", event.aggregate.split(".")[1])
            return Entry(position=int(task), time=kept.stored, subject=subject, body=body, headers=headers)
    return None
