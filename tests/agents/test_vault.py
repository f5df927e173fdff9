"""Values put away and brought back, on the stores in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw
from tests.core.test_sealing import payloads

from dspex.agents.vault import Key, Vault, held_of, kept_input, master_from, submission_of, task_key
from dspex.core import headers as h
from dspex.core.codec import decode_commit, encode_commit, events_of, sealed_in
from dspex.core.errors import ConfigurationError, Forgotten, LogCorrupt, NotFound
from dspex.core.events import EffectRecorded, Event, Payload, TaskClaimed, TaskCompleted, TaskFailed, TaskSubmitted
from dspex.core.sealing import Guard, text_of, unseal
from dspex.core.subjects import Subjects
from dspex.store.aside import MemoryKeys, MemoryObjects

PRIVATE = Guard(frozenset({"ssn"}), frozenset({"verdict"}))


class Sealer:
    """Seals what is of a private program, or the effects of one name."""

    def __init__(self, vault: Vault, *, program: bool = False, effect: str = "") -> None:
        self.vault, self.program, self.effect = vault, program, effect

    def is_private(self, payload: Payload) -> bool:
        return self.program or (isinstance(payload, EffectRecorded) and payload.name == self.effect)

    async def key(self) -> Key:
        return await self.vault.key_of({}, "epoch", "42")


def vault(inline: int = 1000, master: bytes = b"") -> Vault:
    return Vault(MemoryKeys(), MemoryObjects(), inline=inline, master=master)


def events(payloads: Sequence[Payload]) -> list[Event]:
    made = [
        Event("task.vetting.42", number, "2026-11-23T10:00:00Z", "a", "42", "42", payload)
        for number, payload in enumerate(payloads, 1)
    ]
    return decode_commit(encode_commit(made), 7)


def plain(payload: Payload) -> bytes:
    return msgspec.json.encode(payload)


@given(st.lists(payloads, min_size=1, max_size=4), st.booleans(), st.integers(0, 60))
async def test_what_was_put_away_is_brought_back_as_it_was(given: list[Payload], private: bool, inline: int) -> None:
    kept_in = vault(inline)
    sealer = Sealer(kept_in, program=private)
    kept = await kept_in.put_away(given, "vetting", PRIVATE if private else Guard(), sealer)
    assert [type(each) for each in kept] == [type(each) for each in given]
    back = await kept_in.bring_back(events(kept))
    assert [plain(event.data) for event in back] == [plain(each) for each in given]
    again = await kept_in.put_away(given, "vetting", PRIVATE if private else Guard(), sealer)
    assert [plain(each) for each in again] == [plain(each) for each in kept], "the same append when it is tried again"


async def test_a_small_open_value_stays_where_it_is() -> None:
    kept_in = vault()
    output = TaskCompleted(output=Raw(b'{"a":1}'))
    assert await kept_in.put_away([output], "p", Guard(), Sealer(kept_in)) == [output]
    assert await kept_in.objects.list() == []


async def test_a_large_open_value_goes_by_its_hash() -> None:
    kept_in = vault()
    body = b'"' + b"x" * 5000 + b'"'
    [kept] = await kept_in.put_away([TaskCompleted(output=Raw(body))], "p", Guard(), Sealer(kept_in))
    held = held_of(kept)
    assert held is not None
    assert (held.blob, held.size, held.key) == (hashlib.sha256(body).hexdigest(), len(body), "")
    assert await kept_in.objects.get(held.blob) == body, "as JSON, so that anybody can read it"


async def test_a_large_private_value_is_sealed_in_the_store_too() -> None:
    kept_in = vault()
    given = EffectRecorded(key="p.f#0", name="f", digest="d", request=Raw(b'[["SECRET"],{}]'), result=Raw(b'"' + b"SECRET" * 900 + b'"'))
    [kept] = await kept_in.put_away([given], "p", PRIVATE, Sealer(kept_in, program=True))
    held = held_of(kept)
    assert held is not None and held.blob and held.key
    assert b"SECRET" not in (await kept_in.objects.get(held.blob) or b"SECRET")
    assert b"SECRET" not in plain(kept)
    assert isinstance(kept, EffectRecorded)
    assert (kept.digest, bytes(kept.request)) == ("", b"null"), "the hash of a guess would tell"


async def test_only_the_private_effect_of_an_open_program_is_sealed() -> None:
    kept_in = vault()
    given = [EffectRecorded(key=f"p.{name}#0", name=name, digest="d", result=Raw(b"1")) for name in ("hide", "show")]
    hidden, shown = await kept_in.put_away(given, "p", Guard(), Sealer(kept_in, effect="hide"))
    assert (held_of(hidden) is not None, held_of(shown)) == (True, None)


async def test_a_failure_that_says_why_nothing_opens_stays_readable() -> None:
    kept_in = vault()
    failure = TaskFailed(code=410, type="Forgotten", message="what task 42 held was forgotten")
    assert await kept_in.put_away([failure], "p", PRIVATE, Sealer(kept_in, program=True)) == [failure]
    other = TaskFailed(code=500, type="ValueError", message="SECRET", detail="SECRET")
    [kept] = await kept_in.put_away([other], "p", PRIVATE, Sealer(kept_in, program=True))
    assert b"SECRET" not in plain(kept)


async def test_what_is_missing_is_named() -> None:
    kept_in = vault()
    [sealed] = await kept_in.put_away([TaskFailed(code=500, type="E", message="m")], "vetting", PRIVATE, Sealer(kept_in, program=True))
    [large] = await kept_in.put_away([TaskCompleted(output=Raw(b'"' + b"x" * 2000 + b'"'))], "p", Guard(), Sealer(kept_in))
    elsewhere = vault()
    with pytest.raises(NotFound, match="task 42 holds private values: the key epoch-42 is not here"):
        await elsewhere.bring_back(events([sealed]))
    with pytest.raises(NotFound, match=r"TaskCompleted of task 42 names the object \w{64}, which is not in"):
        await elsewhere.bring_back(events([large]))
    await kept_in.keys.forget("epoch-42")
    with pytest.raises(Forgotten, match="what task 42 held was forgotten and cannot be read"):
        await kept_in.bring_back(events([sealed]))


async def test_an_effect_does_not_open_in_anothers_place() -> None:
    kept_in = vault()
    given = EffectRecorded(key="p.f#0", name="f", digest="d", result=Raw(b"1"))
    [kept] = await kept_in.put_away([given], "vetting", PRIVATE, Sealer(kept_in, program=True))
    moved = msgspec.structs.replace(kept, key="p.f#1")
    with pytest.raises(LogCorrupt, match="a sealed value of vetting does not open"):
        await kept_in.bring_back(events([moved]))


async def test_a_submission_is_sealed_with_a_key_of_its_own() -> None:
    kept_in = vault()
    body = b'{"name":"Ann","ssn":"SECRET"}'
    stored, headers = await kept_in.sealed_message("vetting", body, PRIVATE)
    assert b"SECRET" not in stored and b'"name":"Ann"' in stored
    key = await kept_in.key_of(headers, "epoch", "42")
    assert unseal(key.key, text_of(sealed_in(stored)), "vetting/input") == body
    other, more = await kept_in.sealed_message("vetting", body, PRIVATE)
    assert (other != stored, more != headers) == (True, True), "the same input twice cannot be told"


async def test_a_submission_that_was_erased_is_told_by_its_task() -> None:
    kept_in = vault()
    key = await kept_in.key_of({}, "epoch", "42")
    assert key.name == task_key("epoch", "42")
    body = b'{"name":"Ann","ssn":"SECRET"}'
    sealed = kept_input(key, "vetting", body, PRIVATE, {"Dspex-Key": "k"}, 1700000000.25)
    story = events([TaskClaimed(attempt=1, agent="a", assignment="b"), sealed])
    entry = submission_of("42", story, Subjects())
    assert entry is not None
    assert (entry.position, entry.time, entry.subject) == (42, 1700000000.25, "dspex.task.vetting")
    assert entry.headers == {"Dspex-Key": "k", h.SEALED: key.name}
    [event] = await kept_in.bring_back(events_of(entry, Subjects()))
    assert isinstance(event.data, TaskSubmitted)
    assert bytes(event.data.input) == body
    assert submission_of("42", story[:1], Subjects()) is None


async def test_keys_are_sealed_with_the_master_key() -> None:
    ring, store = MemoryKeys(), MemoryObjects()
    one = Vault(ring, store, master=b"m" * 32)
    key = await one.make("k")
    assert key not in (await ring.get("k")) and len(key) == 32
    assert await one.find("k") == await one.make("k") == key
    with pytest.raises(NotFound, match="the key k cannot be used: it is sealed with a master key"):
        await Vault(ring, store).find("k")
    with pytest.raises(NotFound, match="another master key"):
        await Vault(ring, store, master=b"n" * 32).find("k")
    bare = await Vault(ring, store).make("old")
    assert await one.find("old") == bare, "keys from before there was one are still read"


def test_a_master_key_is_a_reference(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MASTER", "m" * 40)
    (tmp_path / "master").write_text("m" * 40 + "\n")
    (tmp_path / "master").chmod(0o600)
    assert master_from("env:MASTER") == master_from(f"file:{tmp_path}/master") != b""
    assert master_from("") == b""
    monkeypatch.setenv("SHORT", "m")
    for reference, why in (("env:NOBODY", "leads to nothing"), ("file:/nowhere", "leads to nothing"), ("env:SHORT", "has 1 characters; 32 are due")):
        with pytest.raises(ConfigurationError, match=why):
            master_from(reference)
