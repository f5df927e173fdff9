"""What every log does, whatever it is built on. A backend is done when its subclass of LogContract passes, and for one
that a log process is to own, of BackendContract too. See docs/backends.md; needs pytest and pytest-asyncio.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from typing import Protocol

import pytest

from dspex.core.codec import encode_commit, events_of
from dspex.core.errors import LogError
from dspex.core.events import Event, Head, TaskDeadLettered
from dspex.core.ports import Appended, Backend, Conflict, Entry, Log, Stored, Taken
from dspex.core.subjects import Subjects

__all__ = ["BackendContract", "LogContract", "Place", "commit", "positions", "put"]

TASK = "task.qabot.1"


class Place(Protocol):
    """Where a test's log lives. `open` gives the same log each time, `another` a new one."""

    subjects: Subjects

    async def open(self) -> Log: ...
    async def another(self) -> Log: ...
    async def close(self) -> None: ...


def commit(aggregate: str, after: int = 0, count: int = 1, mark: str = "") -> list[Event]:
    """Events that follow version `after`; `mark` tells one writer's from another's."""
    return [
        Event(
            aggregate=aggregate,
            version=after + number,
            time="2026-11-23T10:00:00.000000Z",
            source="tests",
            correlation="1",
            causation="1",
            data=TaskDeadLettered(attempts=number, reason=mark),
        )
        for number in range(1, count + 1)
    ]


async def put(log: Log, aggregate: str, count: int = 1, each: int = 1, head: Head | None = None) -> Head:
    """Append `count` commits of `each` events, one after the other."""
    head = head or Head()
    for _ in range(count):
        result = await log.append(aggregate, commit(aggregate, head.version, each), head)
        assert isinstance(result, Appended)
        head = result.head
    return head


def positions(entries: Sequence[Entry]) -> list[int]:
    return [entry.position for entry in entries]


async def take(tail: AsyncIterator[Entry], count: int) -> list[Entry]:
    return [await anext(tail) for _ in range(count)]


class LogContract:
    """Subclasses give a fixture `place`."""

    limit = 8 * 1024 * 1024

    @pytest.fixture
    async def log(self, place: Place) -> AsyncIterator[Log]:
        log = await place.open()
        yield log
        await log.close()

    # -- append

    async def test_an_append_moves_the_head(self, log: Log) -> None:
        first = await log.append(TASK, commit(TASK, count=3), Head())
        assert isinstance(first, Appended)
        assert first.head.version == 3 and first.head.position >= 1
        second = await log.append(TASK, commit(TASK, after=3), first.head)
        assert isinstance(second, Appended)
        assert second.head.version == 4 and second.head.position > first.head.position

    async def test_an_append_to_an_old_head_is_a_conflict_and_writes_nothing(self, log: Log) -> None:
        head = await put(log, TASK, count=2, each=2)
        before = await log.head()
        assert await log.append(TASK, commit(TASK, mark="late"), Head()) == Conflict(head)
        assert await log.head() == before
        assert len(await log.read(TASK)) == 2

    async def test_an_append_ahead_of_the_head_is_a_conflict(self, log: Log) -> None:
        head = await put(log, TASK)
        ahead = Head(head.version, head.position + 1000)
        assert await log.append(TASK, commit(TASK, after=1), ahead) == Conflict(head)
        empty = await log.append("task.qabot.2", commit("task.qabot.2", after=1), ahead)
        assert empty == Conflict(Head())

    async def test_of_64_writers_with_the_same_head_one_wins(self, log: Log) -> None:
        head = await put(log, TASK, each=2)
        results = await asyncio.gather(
            *(log.append(TASK, commit(TASK, after=2, count=1 + i % 3, mark=str(i)), head) for i in range(64))
        )
        (winner,) = [result for result in results if isinstance(result, Appended)]
        assert [result for result in results if result != winner] == [Conflict(winner.head)] * 63
        kept = await log.read(TASK)
        assert len(kept) == 2 and kept[-1].position == winner.head.position

    async def test_the_same_append_again_gives_the_same_answer(self, log: Log) -> None:
        head = await put(log, TASK)
        again = commit(TASK, after=1, count=2, mark="twice")
        first = await log.append(TASK, again, head)
        assert await log.append(TASK, again, head) == first
        assert isinstance(first, Appended)
        assert len(await log.read(TASK)) == 2

    async def test_the_same_append_at_the_same_time_is_stored_once(self, log: Log) -> None:
        head = await put(log, TASK)
        again = commit(TASK, after=1, mark="twice")
        results = await asyncio.gather(*(log.append(TASK, again, head) for _ in range(8)))
        assert len(set(map(repr, results))) == 1 and isinstance(results[0], Appended)
        assert len(await log.read(TASK)) == 2

    async def test_the_same_append_after_reopening_gives_the_same_answer(self, place: Place, log: Log) -> None:
        first = await log.append(TASK, commit(TASK), Head())
        await log.close()
        log = await place.open()
        assert await log.append(TASK, commit(TASK), Head()) == first
        assert len(await log.read(TASK)) == 1
        await log.close()

    async def test_an_append_whose_caller_left_can_be_made_again(self, log: Log) -> None:
        left = asyncio.create_task(log.append(TASK, commit(TASK, mark="left"), Head()))
        await asyncio.sleep(0)
        left.cancel()
        with suppress(asyncio.CancelledError):
            await left
        result = await log.append(TASK, commit(TASK, mark="left"), Head())
        (kept,) = await log.read(TASK)
        assert result == Appended(Head(1, kept.position))

    async def test_the_same_append_after_others_is_a_conflict(self, log: Log) -> None:
        head = await put(log, TASK, count=2)
        assert await log.append(TASK, commit(TASK), Head()) == Conflict(head)

    @pytest.mark.parametrize(
        ("events", "expected"),
        [
            ([], Head()),
            (commit(TASK, after=1), Head()),
            (commit(TASK), Head(1, 1)),
            ([*commit(TASK), *commit(TASK, after=2)], Head()),
            ([*commit(TASK), *commit(TASK)], Head()),
            (commit("task.qabot.2"), Head()),
        ],
        ids=["none", "too high", "too low", "a hole", "twice", "another aggregate"],
    )
    async def test_events_that_do_not_follow_are_refused(self, log: Log, events: list[Event], expected: Head) -> None:
        with pytest.raises(ValueError, match=TASK):
            await log.append(TASK, events, expected)
        assert await log.head() == 0

    @pytest.mark.parametrize("name", ["task", "task.qabot", "task.qa bot.1", "task.qabot.*", "task.qabot.1.2", ""])
    async def test_what_is_no_aggregate_is_refused(self, log: Log, name: str) -> None:
        with pytest.raises(ValueError):
            await log.append(name, commit(name), Head())
        assert await log.head() == 0

    async def test_a_thousand_appends_at_once(self, log: Log) -> None:
        names = [f"task.qabot.{number}" for number in range(1000)]
        results = await asyncio.gather(*(log.append(name, commit(name), Head()) for name in names))
        taken = {result.head.position for result in results if isinstance(result, Appended)}
        assert len(taken) == 1000
        assert positions(await log.scan(0, 2000)) == sorted(taken)

    # -- reading

    async def test_an_aggregate_is_read_oldest_first(self, log: Log, place: Place) -> None:
        bodies = [encode_commit(commit(TASK, after=2 * i, count=2)) for i in range(30)]
        await put(log, "task.qabot.2")
        head = await put(log, TASK, count=30, each=2)
        await put(log, "task.qabot.2x")
        entries = await log.read(TASK)
        assert [entry.body for entry in entries] == bodies
        assert {entry.subject for entry in entries} == {place.subjects.event(TASK)}
        assert positions(entries) == sorted(positions(entries)) and entries[-1].position == head.position
        events = [event for entry in entries for event in events_of(entry, place.subjects)]
        assert [event.version for event in events] == list(range(1, 61))

    async def test_a_long_aggregate(self, log: Log) -> None:
        head = await put(log, TASK, count=1200)
        entries = await log.read(TASK)
        assert len(entries) == 1200 and entries[-1].position == head.position

    async def test_reads_show_every_acknowledged_append(self, log: Log) -> None:
        head = Head()
        for _ in range(50):
            head = await put(log, TASK, head=head)
            last = await log.last(TASK)
            assert last is not None and last.position == head.position
            assert (await log.read(TASK))[-1] == last
            assert await log.entry(head.position) == last
            assert await log.head() == head.position

    async def test_what_is_not_there(self, log: Log) -> None:
        assert await log.head() == 0
        assert await log.read(TASK) == []
        assert await log.last(TASK) is None
        assert await log.scan(0) == []
        head = await put(log, TASK)
        assert await log.read("task.qabot.2") == []
        assert await log.last("task.qabot.2") is None
        assert await log.entry(0) is None
        assert await log.entry(-1) is None
        assert await log.entry(head.position + 1) is None
        assert await log.scan(head.position) == []
        assert await log.scan(head.position + 100) == []
        assert await log.scan(0, limit=0) == []

    async def test_every_way_to_an_entry_shows_the_same(self, log: Log, place: Place) -> None:
        head = await put(log, TASK, count=3)
        at = await log.store(place.subjects.door("task", "qabot"), b"{}", {"Dspex-Key": "k"})
        scanned = await log.scan(0)
        tail = log.tail(0)
        assert await take(tail, 4) == scanned
        await tail.aclose()  # type: ignore[attr-defined]
        assert await log.read(TASK) == scanned[:3]
        assert [await log.entry(position) for position in positions(scanned)] == scanned
        assert await log.last(TASK) == scanned[2]
        assert [scanned[2].position, scanned[3].position] == [head.position, at]
        assert all(1.7e9 < entry.time < 1e11 for entry in scanned)
        assert [entry.time for entry in scanned] == sorted(entry.time for entry in scanned)
        assert [entry.headers for entry in scanned] == [{}, {}, {}, {"Dspex-Key": "k"}]

    # -- scan

    async def test_a_scan_gives_everything_in_order(self, log: Log) -> None:
        heads = [await put(log, f"task.qabot.{i}") for i in range(25)]
        everything = positions(await log.scan(0))
        assert everything == [head.position for head in heads]
        assert positions(await log.scan(heads[9].position)) == everything[10:]
        assert positions(await log.scan(-5)) == everything

    async def test_a_scan_can_be_taken_in_pieces(self, log: Log) -> None:
        for i in range(25):
            await put(log, f"task.qabot.{i}")
        pieces: list[Entry] = []
        while piece := await log.scan(pieces[-1].position if pieces else 0, limit=7):
            assert len(piece) <= 7
            pieces += piece
        assert pieces == await log.scan(0)

    async def test_a_scan_with_a_filter(self, log: Log, place: Place) -> None:
        event, door = place.subjects.event, place.subjects.door
        names = ["task.qabot.1", "task.qabot.2", "task.summary.1", "agent.qabot.1"]
        for _ in range(2):
            for name in names:
                last = await log.last(name)
                version = 0 if last is None else 1
                await put(log, name, head=Head(version, last.position if last is not None else 0))
            await log.store(door("task", "qabot"), b"{}", {})
        everything = await log.scan(0)
        wanted: dict[str, Callable[[str], bool]] = {
            ">": lambda subject: True,
            event("task.qabot.1"): lambda subject: subject == event("task.qabot.1"),
            event("task.qabot.*"): lambda subject: subject.startswith(event("task.qabot.")),
            event("*.qabot.1"): lambda subject: subject in (event("task.qabot.1"), event("agent.qabot.1")),
            event("task.>"): lambda subject: subject.startswith(event("task.")),
            door("task", "*"): lambda subject: subject == door("task", "qabot"),
            door("task", "qabot"): lambda subject: subject == door("task", "qabot"),
            event("task.nobot.>"): lambda subject: False,
            event("task.qabot"): lambda subject: False,
        }
        for subject, matches in wanted.items():
            expected = [entry for entry in everything if matches(entry.subject)]
            assert await log.scan(0, subject=subject) == expected, subject
            assert (
                await log.scan(everything[4].position, 1, subject)
                == [entry for entry in expected if entry.position > everything[4].position][:1]
            ), subject

    @pytest.mark.parametrize("subject", ["", "a..b", ">.a", "a b", "a."])
    async def test_what_is_no_filter_is_refused(self, log: Log, subject: str) -> None:
        with pytest.raises(ValueError):
            await log.scan(0, subject=subject)

    async def test_a_scan_goes_on_over_many_entries(self, log: Log) -> None:
        names = [f"task.qabot.{number}" for number in range(3000)]
        await asyncio.gather(*(log.append(name, commit(name), Head()) for name in names))
        first = await log.scan(0, 2500)
        assert len(first) == 2500
        assert len(first + await log.scan(first[-1].position)) == 3000

    # -- tail

    async def test_a_tail_sees_old_and_new_in_order_while_others_write(self, log: Log) -> None:
        await put(log, "task.qabot.0", count=20)

        async def write(name: str) -> None:
            await put(log, name, count=40)

        async def read() -> list[Entry]:
            seen: list[Entry] = []
            async for entry in log.tail(0):
                seen.append(entry)
                if len(seen) == 140:
                    break
            return seen

        reading = asyncio.create_task(read())
        await asyncio.gather(*(write(f"task.qabot.{i}") for i in (1, 2, 3)))
        assert await reading == await log.scan(0)

    async def test_a_tail_starts_where_it_is_told_and_filters(self, log: Log, place: Place) -> None:
        head = await put(log, TASK, count=3)
        tail = log.tail(head.position, place.subjects.event("task.qabot.*"))
        coming = asyncio.create_task(take(tail, 2))
        await put(log, "agent.qabot.1", count=3)
        head = await put(log, TASK, head=head)
        other = await put(log, "task.qabot.2")
        assert positions(await coming) == [head.position, other.position]
        await tail.aclose()  # type: ignore[attr-defined]

    async def test_a_tail_on_an_empty_log_waits_for_the_first_entry(self, log: Log) -> None:
        tail = log.tail(0)
        coming = asyncio.create_task(take(tail, 1))
        await asyncio.sleep(0)
        head = await put(log, TASK)
        assert positions(await coming) == [head.position]
        await tail.aclose()  # type: ignore[attr-defined]

    async def test_tails_end_when_the_log_is_closed(self, place: Place, log: Log) -> None:
        await put(log, TASK, count=2)
        both = asyncio.Event()

        async def read() -> int:
            seen = 0
            async for _ in log.tail(0):
                seen += 1
                if seen == 2:
                    both.set()
            return seen

        reading = asyncio.create_task(read())
        await both.wait()
        await log.close()
        assert await reading == 2

    # -- doors

    async def test_a_door_message_comes_back_as_it_was(self, log: Log, place: Place) -> None:
        headers = {
            "Dspex-Key": "schlüssel-鍵-🔑",
            "Dspex-Actor": "Zoë: she said",
            "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "x-lower": "",
        }
        for door in ("task", "outcome", "signal"):
            subject = place.subjects.door(door, "qabot")
            position = await log.store(subject, b'{"question": "why?"}', headers)
            entry = await log.entry(position)
            assert entry is not None
            assert (entry.subject, entry.body) == (subject, b'{"question": "why?"}')
            assert entry.headers == headers
            assert await log.head() == position

    async def test_an_empty_body_and_no_headers(self, log: Log, place: Place) -> None:
        position = await log.store(place.subjects.door("task", "qabot"), b"", {})
        entry = await log.entry(position)
        assert entry is not None and entry.body == b"" and entry.headers == {}
        assert await log.scan(0) == [entry]

    async def test_an_empty_body_with_headers(self, log: Log, place: Place) -> None:
        position = await log.store(place.subjects.door("task", "qabot"), b"", {"a": "b"})
        entry = await log.entry(position)
        assert entry is not None and entry.body == b"" and entry.headers == {"a": "b"}
        assert await log.scan(0) == [entry]

    async def test_bytes_are_kept_exactly(self, log: Log, place: Place) -> None:
        door = place.subjects.door("task", "qabot")
        bodies = [bytes(range(256)), b"\r\n\r\n", b"\x00" * 100, b"NATS/1.0\r\n\r\n", "ü".encode("utf-16")]
        for body in bodies:
            await log.store(door, body, {})
        assert [entry.body for entry in await log.scan(0)] == bodies
        assert [e.body if (e := await log.entry(i)) else None for i in range(1, 6)] == bodies

    async def test_headers_that_look_like_the_servers_own_deceive_nobody(self, log: Log, place: Place) -> None:
        """A client may put anything into a header; what an entry is comes from where it stands."""
        forged = {"Nats-Subject": place.subjects.event(TASK), "Nats-Sequence": "999", "Nats-Stream": "OTHER"}
        forged |= {"Nats-Time-Stamp": "2001-01-01T00:00:00Z", "Nats-Num-Pending": "0"}
        door = place.subjects.door("task", "qabot")
        position = await log.store(door, b"[]", forged)
        await put(log, TASK, count=2)
        tail = log.tail(0)
        first = [(await log.scan(0))[0], await log.entry(position), *await take(tail, 1)]
        await tail.aclose()  # type: ignore[attr-defined]
        for entry in first:
            assert entry is not None
            assert (entry.position, entry.subject, entry.headers) == (position, door, forged)
            assert entry.time > 1.7e9
        assert len(await log.read(TASK)) == 2

    @pytest.mark.parametrize("subject", ["event.task.qabot.1", "ask.qabot", "task", "task.*", "task.>", "task.a b"])
    async def test_what_is_no_stored_door_is_refused(self, log: Log, place: Place, subject: str) -> None:
        with pytest.raises(ValueError):
            await log.store(f"{place.subjects.prefix}.{subject}", b"{}", {})
        assert await log.head() == 0

    @pytest.mark.parametrize(("name", "value"), [("a", "b\r\nc: d"), ("a: b", "c"), ("", "c"), ("a\n", "b")])
    async def test_headers_that_would_become_others_are_refused(
        self, log: Log, place: Place, name: str, value: str
    ) -> None:
        with pytest.raises(ValueError):
            await log.store(place.subjects.door("task", "qabot"), b"{}", {name: value})
        assert await log.head() == 0

    # -- size

    async def test_a_body_near_the_limit_comes_back_whole(self, log: Log, place: Place) -> None:
        room = self.limit - 4096
        result = await log.append(TASK, commit(TASK, mark="x" * room), Head())
        assert isinstance(result, Appended)
        at = await log.store(place.subjects.door("task", "qabot"), b"\xff" * room, {"a": "b"})
        entries = await log.scan(0)
        assert [len(entry.body) >= room for entry in entries] == [True, True]
        assert await log.read(TASK) == entries[:1]
        assert await log.entry(at) == entries[1]
        again = await log.append(TASK, commit(TASK, mark="x" * room), Head())
        assert again == result

    async def test_what_is_over_the_limit_is_refused_and_the_log_goes_on(self, log: Log, place: Place) -> None:
        limit = f"{self.limit:,}"[:3]
        with pytest.raises(LogError, match=rf"8,\d\d\d,\d\d\d bytes .*{limit}"):
            await log.append(TASK, commit(TASK, mark="x" * self.limit), Head())
        door = place.subjects.door("task", "qabot")
        with pytest.raises(LogError, match="bytes"):
            await log.store(door, b"x" * (self.limit + 1), {})
        with pytest.raises(LogError, match="bytes"):
            await log.store(door, b"x" * (self.limit - 10), {"a": "b"})
        assert await log.head() == 0
        await put(log, TASK)

    # -- life

    async def test_a_log_survives_reopening(self, place: Place, log: Log) -> None:
        head = await put(log, TASK, count=3)
        await log.store(place.subjects.door("task", "qabot"), b"{}", {"Dspex-Key": "ü"})
        before, epoch = await log.scan(0), log.epoch
        await log.close()
        log = await place.open()
        assert await log.scan(0) == before
        assert log.epoch == epoch
        after = await put(log, TASK, head=head)
        assert after.version == 4 and after.position > before[-1].position
        await log.close()

    async def test_another_log_has_another_epoch(self, place: Place, log: Log) -> None:
        other = await place.another()
        assert other.epoch and log.epoch and other.epoch != log.epoch
        await other.close()

    async def test_a_closed_log_says_so(self, place: Place, log: Log) -> None:
        await put(log, TASK)
        await log.close()
        await log.close()
        door = place.subjects.door("task", "qabot")
        for work in (
            log.append(TASK, commit(TASK, after=1), Head(1, 1)), log.store(door, b"{}", {}), log.read(TASK),
            log.last(TASK), log.entry(1), log.scan(0), log.head(), anext(log.tail(0)),
        ):  # fmt: skip
            with pytest.raises(LogError, match="closed"):
                await work


class BackendContract(LogContract):
    """The same for a log that a log process can own: rows as they come from the bus."""

    @pytest.fixture
    async def backend(self, log: Log) -> Backend:
        assert callable(getattr(log, "put", None)), "a backend has a method put"
        return log  # type: ignore[return-value]

    async def test_rows_are_kept_as_they_came(self, backend: Backend, place: Place) -> None:
        subject, body = place.subjects.event(TASK), b'[{"not": "understood",  "by": "anybody"}]'
        door = place.subjects.door("task", "qabot")
        first, second = await asyncio.gather(backend.put(subject, body, {}, 0), backend.put(door, b"", {"a": "ü"}))
        assert isinstance(first, Stored) and isinstance(second, Stored)
        assert (first.position, second.position) == (1, 2)
        found = await backend.scan(0)
        assert [(entry.subject, entry.body, entry.headers) for entry in found] == [
            (subject, body, {}), (door, b"", {"a": "ü"})
        ]  # fmt: skip
        assert [entry.time for entry in found] == [first.time, second.time]

    async def test_of_rows_that_expect_the_same_the_first_is_stored(self, backend: Backend, place: Place) -> None:
        subject = place.subjects.event(TASK)
        putting = [backend.put(subject, b"[%d]" % number, {}, 0) for number in range(20)]
        found = await asyncio.gather(*putting)
        assert isinstance(found[0], Stored) and found[0].position == 1
        assert found[1:] == [Taken(1)] * 19
        assert await backend.put(subject, b"[0]", {}, 7) == Taken(1)
        assert await backend.put(place.subjects.event("task.qabot.2"), b"[0]", {}, 7) == Taken(0)
        assert len(await backend.scan(0)) == 1

    async def test_rows_and_appends_see_each_other(self, backend: Backend, place: Place) -> None:
        body = encode_commit(commit(TASK))
        stored = await backend.put(place.subjects.event(TASK), body, {}, 0)
        assert isinstance(stored, Stored)
        assert await backend.append(TASK, commit(TASK, mark="late"), Head()) == Conflict(Head(1, stored.position))
        head = await put(backend, TASK, head=Head(1, stored.position))
        assert await backend.put(place.subjects.event(TASK), body, {}, stored.position) == Taken(head.position)

    async def test_positions_follow_the_order_of_the_calls(self, backend: Backend, place: Place) -> None:
        door = place.subjects.door("task", "qabot")
        found = await asyncio.gather(*(backend.put(door, b"%d" % number, {}) for number in range(500)))
        assert [row.position for row in found] == list(range(1, 501))
        assert [entry.body for entry in await backend.scan(0)] == [b"%d" % number for number in range(500)]

    async def test_a_closed_backend_takes_nothing(self, backend: Backend, place: Place) -> None:
        await backend.close()
        with pytest.raises(LogError, match="closed"):
            await backend.put(place.subjects.door("task", "qabot"), b"{}", {})
