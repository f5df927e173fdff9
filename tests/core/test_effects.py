"""Places, branches and records: a second run asks the same questions in the same places and gets the same answers."""

from __future__ import annotations

import asyncio
import contextvars
import json
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import Raw

from dspex import Program, Schema, effect, idempotency_key
from dspex.core.codec import decode_commit, encode_commit
from dspex.core.effects import (
    Call,
    Effect,
    Performing,
    Scope,
    ask_now,
    begin,
    branching,
    failed,
    outcome_of,
    recorded,
)
from dspex.core.errors import DefinitionError, EffectFailed
from dspex.core.events import EffectRecorded, Event
from dspex.core.request import MAX_REQUEST, request_of, shown_request

KEYS: list[str] = []


class Notes:
    """A runtime that performs everything, and remembers where it was asked."""

    def __init__(self, known: dict[str, EffectRecorded] | None = None) -> None:
        self.known = known or {}
        self.asked: list[str] = []
        self.records: dict[str, EffectRecorded] = {}
        self.loop = asyncio.get_running_loop()

    async def perform(self, call: Call) -> Any:
        self.asked.append(call.key)
        record = self.known.get(call.key)
        if record is None:
            try:
                with Performing("life", call.key):
                    record = recorded(call, await call.act(), 0.0)
            except Exception as error:
                record = failed(call, error, 0.0)
        self.records[call.key] = record
        return outcome_of(call, record)

    def perform_in_thread(self, call: Call) -> Any:
        return asyncio.run_coroutine_threadsafe(self.perform(call), self.loop).result()

    def perform_now(self, call: Call, act: Callable[[], Any]) -> Any:
        self.asked.append(call.key)
        return act()


async def run(work: Callable[[], Any], known: dict[str, EffectRecorded] | None = None) -> Notes:
    """Run `work` as a program of its own, with branches numbered as in an agent."""
    notes = Notes(known)
    asyncio.get_running_loop().set_task_factory(branching)

    async def program() -> None:
        begin(Scope("p", lambda: notes))  # type: ignore[arg-type,return-value]
        await work()

    await asyncio.Task(program(), context=contextvars.Context())
    return notes


@effect
async def fetch(n: int, seconds: float = 0.0) -> int:
    await asyncio.sleep(seconds)
    KEYS.append(idempotency_key())
    return n


@effect(name="read")
def plain(n: int) -> int:
    return n * 10


async def test_a_place_is_module_name_and_occurrence() -> None:
    async def work() -> None:
        assert [await fetch(1), await plain(2), await fetch(1)] == [1, 20, 1]

    assert (await run(work)).asked == ["p.fetch#0", "p.read#0", "p.fetch#1"]


@pytest.mark.parametrize("seconds", [(0.02, 0.0), (0.0, 0.02)])
async def test_branches_are_numbered_when_they_are_started(seconds: tuple[float, float]) -> None:
    async def branch(n: int) -> None:
        await fetch(n, seconds[n])
        await asyncio.create_task(leaf(n))

    async def leaf(n: int) -> None:
        await fetch(n + 10)

    async def work() -> None:
        await asyncio.gather(branch(0), branch(1))
        async with asyncio.TaskGroup() as group:
            group.create_task(branch(0))
            group.create_task(branch(1))
        await asyncio.create_task(branch(0))

    notes = await run(work)
    assert sorted(notes.asked) == sorted(
        [f"~{n}/p.fetch#0" for n in range(5)] + [f"~{n}~0/p.fetch#0" for n in range(5)]
    )
    assert b"".join(bytes(notes.records[f"~{n}/p.fetch#0"].result) for n in range(5)) == b"01010"


async def test_what_an_effect_does_inside_takes_no_place() -> None:
    @effect
    async def outer(n: int) -> int:
        assert await fetch(7) == 7
        return sum(await asyncio.gather(fetch(n), fetch(n)))

    found: list[int] = []

    async def branch() -> None:
        found.append(await fetch(3))

    async def work() -> None:
        found.append(await outer(1))
        await asyncio.gather(branch())

    first = await run(work)
    assert first.asked == ["p.outer#0", "~0/p.fetch#0"]
    again = await run(work, first.records)
    assert again.asked == first.asked
    assert found == [2, 3, 2, 3]


class Child(Program):
    class Input(Schema):
        n: int

    class Output(Schema):
        n: int

    async def predict(self, input: Input) -> Output:
        return self.Output(n=await fetch(input.n))


class PlainChild(Program):
    class Input(Schema):
        n: int

    class Output(Schema):
        n: int

    def predict(self, input: Input) -> Output:
        return self.Output(n=plain(input.n))


class Parent(Program):
    class Input(Schema):
        n: int

    class Output(Schema):
        n: int

    first = Child()
    second = Child()
    third = PlainChild()

    async def predict(self, input: Input) -> Output:
        one, two = await asyncio.gather(self.first(n=1), self.second(n=2))
        three = await self.third.acall(n=3)
        return self.Output(n=one.n + two.n + three.n + await fetch(0))


async def test_sub_programs_are_part_of_the_place() -> None:
    async def work() -> None:
        assert (await Parent()(n=1)).n == 33

    asked = (await run(work)).asked
    assert sorted(asked) == ["p.fetch#0", "p.third.read#0", "~0/p.first.fetch#0", "~1/p.second.fetch#0"]


async def test_outside_of_a_run_an_effect_is_its_function() -> None:
    assert await fetch(4) == 4
    assert await plain(4) == 40
    assert await asyncio.to_thread(plain, 4) == 40
    assert idempotency_key() == ""
    assert ask_now("now", lambda: 3, int) == 3


def test_outside_of_a_run_and_a_loop_too() -> None:
    assert fetch(4) == 4
    assert plain(4) == 40


async def test_the_key_is_seen_inside_and_stays_with_the_place() -> None:
    async def work() -> None:
        await asyncio.gather(fetch(1), fetch(2, 0.01))
        assert idempotency_key() == ""

    KEYS.clear()
    await run(work)
    assert sorted(KEYS) == sorted(Performing("life", f"p.fetch#{n}").idempotency_key for n in range(2))


def test_the_digest_is_of_what_was_asked() -> None:
    assert request_of("f", (1,), {"a": 1, "b": 2}) == request_of("f", (1,), {"b": 2, "a": 1})
    assert request_of("f", (1,), {}) != request_of("f", (2,), {}) != request_of("g", (2,), {})
    assert request_of("f", (object(),), {}) == request_of("f", (object(),), {})
    assert request_of("f", (Child.Input(n=1),), {}) != request_of("f", (Child.Input(n=2),), {})


def test_the_arguments_are_recorded_without_the_hidden_ones() -> None:
    def charge(card: str, cents: int, note: str = "") -> None: ...

    places = Effect(charge, hidden=("card", "note"))._hidden
    digest, request = request_of("charge", ("1234", 5), {"note": "n"}, places)
    assert json.loads(request) == [["…", 5], {"note": "…"}]
    assert digest == request_of("charge", ("1234", 5), {"note": "n"})[0] != request_of("charge", ("1", 5), {"note": "n"})[0]
    assert json.loads(request_of("charge", (), {"cents": 1}, places)[1]) == [[], {"cents": 1}]
    record = EffectRecorded(key="k", name="charge", digest=digest, request=Raw(request))
    assert shown_request(record) == "charge('…', 5, note='…')"
    assert shown_request(EffectRecorded(key="k", name="charge", digest=digest)) == f"charge {digest}"
    with pytest.raises(DefinitionError, match="cvv"):
        effect(hidden=("cvv",))(charge)


def test_a_large_request_is_kept_as_its_hash_alone() -> None:
    digest, request = request_of("f", ("x" * MAX_REQUEST,), {})
    assert request == b"null" and digest != request_of("f", ("y" * MAX_REQUEST,), {})[0]
    assert request_of("f", ("\ud800",), {})[1] == b"null"


# -- records


class Custom(Exception):
    def __init__(self, where: str, code: int) -> None:
        super().__init__(where, code)
        self.where, self.code = where, code


class Demanding(Exception):
    def __init__(self, *, where: str) -> None:
        super().__init__(f"nothing at {where}")


class Mean(Exception):
    def __init__(self, words: object = None) -> None:
        if isinstance(words, str):
            raise KeyError(words)
        super().__init__(object())

    def __str__(self) -> str:
        raise RuntimeError("no words")


class Local:
    class Inner(Exception):
        pass


async def outcome(
    act: Callable[[], Any], known: dict[str, EffectRecorded] | None
) -> tuple[Any, dict[str, EffectRecorded]]:
    found: list[Any] = []

    @effect
    async def odd() -> Any:
        return act()

    async def work() -> None:
        try:
            found.append(await odd())
        except Exception as error:
            found.append((type(error), error.args, str(error)))

    notes = await run(work, known)
    return found[0], notes.records


def raising(error: Exception) -> Callable[[], Any]:
    def act() -> Any:
        raise error

    return act


def stored(record: EffectRecorded) -> EffectRecorded:
    """The record after a way through the log."""
    event = Event(
        aggregate="task.p.1", version=1, time="2026-11-23T10:00:00Z", source="/t", correlation="1", causation="1",
        data=record,
    )  # fmt: skip
    body = encode_commit([event])
    [found] = decode_commit(body, 1)
    assert isinstance(found.data, EffectRecorded)
    return found.data


ERRORS = [
    (KeyError("nope"), KeyError), (Custom("here", 3), Custom), (Demanding(where="x"), EffectFailed),
    (Mean(3), EffectFailed), (Local.Inner("in"), Local.Inner), (ValueError("half \udc80"), ValueError),
    (ValueError(float("nan")), ValueError),
    (ValueError(1 << 80), ValueError), (ValueError(object), ValueError), (OSError(2, "none"), FileNotFoundError),
    (EffectFailed("by hand"), EffectFailed), (ValueError("x" * 5000), ValueError),
    (UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), EffectFailed),
]  # fmt: skip


@pytest.mark.parametrize(("error", "kind"), ERRORS, ids=lambda value: type(value).__name__)
async def test_an_exception_is_the_same_on_every_run(error: Exception, kind: type[Exception]) -> None:
    first, records = await outcome(raising(error), None)
    again, _ = await outcome(raising(AssertionError("performed again")), {k: stored(r) for k, r in records.items()})
    assert first[0] is kind
    assert first == again


async def test_a_class_that_is_gone_gives_effect_failed() -> None:
    class Gone(Exception):
        pass

    first, _ = await outcome(raising(Gone("away")), None)
    assert first[0] is EffectFailed
    assert "Gone: away" in first[2]


VALUES = [(1, 2), {"a": (1, 2)}, {1: 2}, {3}, b"bytes", 1.0, None, Child.Input(n=3)]


@pytest.mark.parametrize("value", VALUES, ids=repr)
async def test_a_result_is_the_same_on_every_run(value: object) -> None:
    first, records = await outcome(lambda: value, None)
    again, _ = await outcome(lambda: 1 / 0, {k: stored(r) for k, r in records.items()})
    assert first == again
    assert type(first) is type(again)


async def test_a_result_has_the_type_of_the_annotation() -> None:
    @effect
    async def typed() -> Child.Output:
        return Child.Output(n=3)

    @effect
    async def wrong() -> int:
        return "word"  # type: ignore[return-value]

    @effect
    async def formless() -> Any:
        return object()

    async def work() -> None:
        assert await typed() == Child.Output(n=3)
        with pytest.raises(EffectFailed, match="annotation"):
            await wrong()
        with pytest.raises(EffectFailed, match="cannot be recorded"):
            await formless()

    await run(work)
