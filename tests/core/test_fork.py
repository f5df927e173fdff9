"""What a fork shares, what is set in it, and the dry run: pure, on histories made here."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
from tests.core.recording import history, record

from dspex import InvalidInput, Program, Schema, effect, variable
from dspex.core import headers as h
from dspex.core.dry import Changed, DryReport, dry_run
from dspex.core.events import EffectRecorded, Event, Payload, TaskClaimed, TaskForked, TaskRetried, TaskSleeping
from dspex.core.fork import separated, shared, with_input
from dspex.core.history import remembered
from dspex.core.replay import replay

performed: list[Any] = []


@effect
async def step(n: int) -> int:
    performed.append(n)
    return n * 10


@effect
def plain(n: int) -> int:
    performed.append(n)
    return n + 1


class In(Schema):
    n: int = 1


class Out(Schema):
    value: Any = None


class Counts(Program):
    """As many steps as it is told, then two at once, then one in a thread."""

    name = "counts"
    Input, Output = In, Out
    times = variable(2, low=1, high=9)

    async def predict(self, input: In) -> Out:
        found: list[Any] = [self.random().random(), self.now()]
        found += [await step(input.n + number) for number in range(self.times)]
        found += await asyncio.gather(step(100), step(200))
        await self.sleep(7)
        return Out(value=[*found, await plain(1)])


class Threads(Program):
    """In a thread."""

    name = "threads"
    Input, Output = In, Out

    def predict(self, input: In) -> Out:
        one = plain(input.n)
        self.sleep(5)
        return Out(value=[one, plain(one), self.signal("go")])


def story(*payloads: Payload) -> list[Event]:
    return history(Counts(), "7", {}, list(payloads))


def made(key: str, **more: Any) -> EffectRecorded:
    return EffectRecorded(key=key, name=key, digest="d", **more)


CLAIM = TaskClaimed(attempt=1, agent="a", assignment="x")


def dry(program: Program, events: list[Event], at: int, body: bytes | None = None) -> DryReport:
    performed.clear()
    report = asyncio.run(dry_run(program, events, "7", at, body))
    assert performed == [] and report.performed == 0
    return report


def test_the_records_up_to_the_version_are_shared() -> None:
    events = story(CLAIM, made("a"), made("b"), made("c"))
    part = shared(events, "7", 3)
    assert part.forked == TaskForked(parent="7", at=3, seed="7", records=2)
    assert [event.version for event in part.records] == [2, 3]


def test_a_wait_that_is_under_way_is_shared_and_one_that_is_over_is_its_record() -> None:
    events = story(CLAIM, made("a"), TaskSleeping(key="z", until=5.0), TaskSleeping(key="y", signal="go"), made("z"))
    assert shared(events, "7", 4).forked.waits == {"z": 5.0, "y": None}
    assert shared(events, "7", 5).forked.waits == {"y": None}


def test_what_a_retry_forgets_is_not_shared() -> None:
    retried = TaskRetried(retry=1, type="E", message="m", until=1.0)
    kept = shared(story(CLAIM, made("a"), made("b", error="m:E"), retried), "7", 4)
    assert [event.version for event in kept.records] == [2]
    clean = shared(story(CLAIM, made("a"), msgspec.structs.replace(retried, clean=True), CLAIM, made("c")), "7", 5)
    assert (clean.forked.life, [event.version for event in clean.records]) == (1, [5])


def test_a_fork_of_a_fork_draws_the_numbers_of_the_first() -> None:
    events = story(TaskForked(parent="3", at=2, seed="1", life=2, records=1), CLAIM, made("a"), made("b"))
    part = shared(events, "7", 4)
    assert (part.forked.seed, part.forked.life, part.forked.records) == ("1", 2, 2)
    assert shared(events, "7", 0).forked.seed == "7"  # nothing is shared, also not its numbers


@pytest.mark.parametrize("at", [-1, 5, 99])
def test_a_version_that_is_not_there_is_refused(at: int) -> None:
    with pytest.raises(InvalidInput, match=rf"task 7 has versions 0 to 2, there is no {at}"):
        shared(story(CLAIM, made("a")), "7", at)


def test_the_memory_of_a_fork_knows_what_is_shared_and_what_is_missing() -> None:
    forked = TaskForked(parent="3", at=9, seed="1", life=4, records=2, waits={"w": 3.0})
    half = remembered(story(forked, CLAIM, made("a")))
    assert (half.missing, half.shared, half.life, half.until) == (1, {"a"}, 4, {"w": 3.0})
    whole = remembered(story(forked, CLAIM, made("a"), CLAIM, made("b"), made("c")))
    assert (whole.missing, whole.shared, set(whole.records)) == (0, {"a", "b"}, {"a", "b", "c"})
    anew = remembered(story(forked, CLAIM, made("a"), TaskRetried(retry=1, type="E", message="m", until=1.0, clean=True)))
    assert (anew.life, anew.seed, anew.shared, anew.missing) == (5, "1", set(), 0)


def test_settings_are_of_the_input_or_variables() -> None:
    assert separated({"input.n": 2, "times": 3, "reader.k": 4}, ["n"]) == ({"n": 2}, {"times": 3, "reader.k": 4})
    with pytest.raises(InvalidInput, match=r"the input has no field 'm'; it has n"):
        separated({"input.m": 2}, ["n"])


def test_fields_of_an_input_are_set_by_path() -> None:
    body = b'{"n": 1, "user": {"name": "Ada"}}'
    assert with_input(body, {}) is body
    assert msgspec.json.decode(with_input(body, {"n": 2, "user.name": "Eve", "new.deep": 3})) == {
        "n": 2, "user": {"name": "Eve"}, "new": {"deep": 3},
    }  # fmt: skip
    with pytest.raises(InvalidInput, match=r"input\.n\.x cannot be set"):
        with_input(body, {"n.x": 2})


@pytest.mark.parametrize("text", ["", "42", "42@", "@7", "x@7", "42@-1", "42@7.5", "4²@7", f"{'9' * 30}@1"])
def test_a_fork_header_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="a task and one of its versions are due"):
        h.fork_of({h.FORK: text})


def test_a_fork_header_is_read() -> None:
    assert h.fork_of({h.FORK: "42@7"}) == ("42", 7)
    assert h.fork_of({}) is None


def test_a_dry_run_stops_at_the_first_effect_that_is_not_shared() -> None:
    events = record(Counts(), n=1)
    report = dry(Counts(), events, 3)
    assert report.outside is not None
    assert (report.outside.place, report.outside.request) == ("counts.step#1", "step(2)")
    assert "test_fork.py:" in report.outside.where
    assert (report.shared, report.used, report.changed, report.output) == (2, 2, [], None)


def test_a_dry_run_of_everything_ends_in_the_recorded_output() -> None:
    events = record(Counts(), n=1)
    report = dry(Counts(), events, events[-1].version)
    assert report.outside is None and report.output == msgspec.json.decode(events[-1].data.output)  # type: ignore[attr-defined]


def test_a_dry_run_with_other_values_goes_another_way() -> None:
    events = record(Counts(), n=1)
    both_at_once = 6
    report = dry(Counts(times=5), events, both_at_once)
    # The shared places keep their records, although the third and fourth step ask for something else there now.
    assert report.outside and report.outside.request == "step(5)"
    assert report.changed == [
        Changed("counts.step#2", "step(100)", "step(3)"), Changed("counts.step#3", "step(200)", "step(4)")
    ]  # fmt: skip


def test_a_dry_run_with_another_input_keeps_what_is_shared_and_says_so() -> None:
    events = record(Counts(), n=1)
    report = dry(Counts(), events, 3, b'{"n": 5}')
    assert report.changed == [Changed("counts.step#0", "step(1)", "step(5)")]
    assert report.outside and report.outside.request == "step(6)"


def test_a_dry_run_in_a_thread_waits_for_no_time_and_stops_at_a_signal() -> None:
    events = record(Threads(), signals={"go": 1}, n=1)
    assert [event.type for event in events].count("EffectRecorded") == 4
    two = dry(Threads(), events, 2)
    assert (two.outside and two.outside.request, two.slept) == ("plain(2)", 5)
    asks = dry(Threads(), events, 4)
    assert asks.outside and asks.outside.request == "signal('go')"


def test_a_dry_run_that_fails_says_how() -> None:
    class Fails(Counts):
        name = "counts"

        async def predict(self, input: In) -> Out:
            raise KeyError(await step(1))

    events = record(Fails(), n=1)
    report = dry(Fails(), events, 2)
    assert (report.error, report.outside, report.output) == ("KeyError: 10", None, None)


def test_a_dry_run_refuses_a_body_that_is_no_input() -> None:
    events = record(Counts(), n=1)
    with pytest.raises(InvalidInput, match="n: an integer is due"):
        asyncio.run(dry_run(Counts(), events, "7", 2, b'{"n": "x"}'))


def test_a_fork_is_replayed_on_what_it_shares_whatever_it_would_ask_for_there() -> None:
    parent = record(Counts(), n=1)
    part = shared(parent, "7", 3)
    copies = [event.data for event in part.records]
    whole = record(Counts(), task="9", n=5)  # what the fork does by itself comes from a run of its own
    keys = {copy.key for copy in copies if isinstance(copy, EffectRecorded)}
    rest = [it.data for it in whole[2:] if getattr(it.data, "key", "") not in keys]
    output = msgspec.json.decode(whole[-1].data.output)  # type: ignore[attr-defined]
    random, now, _, *others = output["value"]
    drawn = msgspec.json.decode(parent[-1].data.output)["value"][0]  # type: ignore[attr-defined]
    now = msgspec.json.decode(copies[0].result)  # type: ignore[attr-defined]
    ended = msgspec.structs.replace(rest[-1], output=msgspec.Raw(msgspec.json.encode({"value": [drawn, now, 10, *others]})))
    assert random != drawn
    events = history(Counts(), "9", {"n": 5}, [part.forked, CLAIM, *copies, *rest[:-1], ended])
    report = asyncio.run(replay(Counts(), events, "9"))
    assert report.same, report.difference
    # What it did by itself must fit, as ever.
    other = asyncio.run(replay(Counts(), history(Counts(), "9", {"n": 6}, [e.data for e in events[1:]]), "9"))
    assert other.difference is not None and other.difference.kind == "arguments"
