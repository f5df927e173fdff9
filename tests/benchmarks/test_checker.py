"""The history checker of the fault campaigns: a good run passes, and each check finds what breaks its promise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from benchmarks.chaos.check_effects import idempotency_key
from benchmarks.chaos.check_state import decoded
from benchmarks.chaos.checker import CHECKS, check
from benchmarks.chaos.evidence import Archived, Evidence, Snapshot, Views
from benchmarks.chaos.history import History, Op, Performance, load
from benchmarks.chaos.told import Row, Told
from benchmarks.chaos.workload import job, step, value_of

from dspex.core.aggregates import FOLDS

AGENT = "/agents/chaos-aaaa-1"
CLAIM = {"agent": "chaos-aaaa-1", "assignment": "0" * 32, "code": "c0de"}


class Book:
    """A log and a history that are written by hand, one second a row."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.ops: list[Op] = []
        self.performed: list[Performance] = []
        self.versions: dict[str, int] = {}

    def door(self, door: str, body: Any, **headers: str) -> int:
        position = len(self.rows) + 1
        named = {f"Dspex-{name.title()}": value for name, value in headers.items()}
        self.rows.append(Row(position, float(position), f"dspex.{door}.chaos", named, json.dumps(body).encode()))
        return position

    def commit(self, aggregate: str, *events: tuple[str, dict[str, Any]], source: str = AGENT) -> int:
        position, batch = len(self.rows) + 1, []
        for kind, data in events:
            version = self.versions[aggregate] = self.versions.get(aggregate, 0) + 1
            batch.append({
                "specversion": "1.0", "id": f"{aggregate}/{version}", "source": source, "type": kind,
                "time": "2026-11-23T11:08:33.276670Z", "aggregate": aggregate, "version": version, "correlationid": "1",
                "causationid": "1", "dataschema": f"urn:dspex:{kind}:1", "data": data,
            })  # fmt: skip
        self.rows.append(Row(position, float(position), f"dspex.event.{aggregate}", {}, json.dumps(batch).encode()))
        return position

    def task(self, kind: str, n: int, key: str = "", action: str = "submit", **headers: str) -> int:
        body = {"n": n, "kind": kind, "seconds": 2.0 if kind == "nap" else 0.0}
        task = self.door("task", body, **({"key": key} if key else {}), **headers)
        self.op(action, task=task, body=body, key=key)
        return task

    def op(self, action: Any, **said: Any) -> Op:
        now = float(len(self.rows))
        self.ops.append(Op("c1", action, now, ended=now + 0.1, outcome="ok", **said))
        return self.ops[-1]

    def effect(self, task: int, place: str, value: int) -> tuple[str, dict[str, Any]]:
        now = float(len(self.rows))
        self.performed.append(Performance(idempotency_key(task, 0, place), str(value), CLAIM["agent"], "a", now - 0.4, now + 0.7))
        return "EffectRecorded", {"key": place, "name": "step", "digest": "d", "result": step(value)}

    def evidence(self) -> Evidence:
        told = Told(self.rows)
        tasks = {
            door.position: {"program": "chaos", "key": door.key or None, **_row([e._asdict() for e in told.events(door.position)])}
            for door in told.tasks()
        }
        fold: Any = FOLDS["task"]
        one = next(name for name in told.aggregates if name.startswith("task."))
        events = decoded(told)[one]
        kept = Snapshot(one, fold.version, events[-1].version, fold.dump(fold(events)))
        last = self.rows[-1].position
        return Evidence(History(self.ops), told, self.performed, archived=Archived(last), views=Views(tasks, [kept], last))


def _row(events: list[dict[str, Any]]) -> dict[str, Any]:
    names = {"TaskCompleted": "completed", "TaskFailed": "failed", "TaskCancelled": "cancelled", "TaskDuplicate": "duplicate"}
    last = events[-1]
    return {
        "state": names[last["type"]], "version": len(events), "of": last["data"].get("of"),
        "attempts": sum(event["type"] == "TaskClaimed" for event in events),
        "effects": sum(event["type"] == "EffectRecorded" for event in events),
    }  # fmt: skip


def good() -> Book:
    """A run in which nothing went wrong, with one task of every kind; the ids are 1, 3, 6, 8, 12, 18, 21, 24."""
    book = Book()
    claim = ("TaskClaimed", {"attempt": 1, **CLAIM})
    quick = book.task("quick", 1, action="ask")
    book.commit(f"task.chaos.{quick}", claim, ("TaskCompleted", {"output": {"n": 1, "value": 7}}))
    book.ops[-1].answer, book.ops[-1].ended = {"n": 1, "value": 7}, 2.1
    steps = book.task("steps", 2, key="k2")
    book.commit("key.chaos.k2", ("KeyBound", {"key": "k2", "task": str(steps)}))
    done = {"output": {"n": 2, "value": value_of(2)}}
    book.commit(f"task.chaos.{steps}", claim, book.effect(steps, "/step#0", 2000), ("TaskCompleted", done))
    again = book.task("steps", 2, key="k2")
    book.commit(f"task.chaos.{again}", ("TaskDuplicate", {"of": str(steps), "key": "k2"}))
    book.op("result", task=again, answer={"n": 2, "value": value_of(2)})
    nap = book.task("nap", 3)
    book.commit(f"task.chaos.{nap}", claim, book.effect(nap, "/step#0", 3), ("TaskSleeping", {"key": "/sleep#0", "until": 10.0}))
    book.commit("agent.chaos.x", ("AgentStopped", {"pid": 1, "reason": "stop"}))
    slept = ("EffectRecorded", {"key": "/sleep#0", "name": "sleep", "digest": "", "result": None})
    second = {"output": {"n": 3, "value": step(step(3))}}
    book.commit(
        f"task.chaos.{nap}", ("TaskClaimed", {"attempt": 2, **CLAIM}), slept, book.effect(nap, "/step#1", step(3)),
        ("TaskCompleted", second),
    )  # fmt: skip
    waits = book.task("signal", 4)
    book.commit(f"task.chaos.{waits}", claim, ("TaskSleeping", {"key": "/go#0", "until": None, "signal": "go"}))
    told = {"task": waits, "name": "go", "value": 5}
    sent = book.door("signal", told)
    book.op("signal", task=waits, position=sent, body=told)
    book.commit(f"inbox.chaos.{waits}", ("SignalReceived", {"name": "go", "position": sent, "value": 5}))
    book.commit(
        f"task.chaos.{waits}", ("TaskClaimed", {"attempt": 2, **CLAIM}), book.effect(waits, "/step#0", 5),
        ("TaskCompleted", {"output": {"n": 4, "value": step(5)}}),
    )  # fmt: skip
    score = {"task": waits, "score": 1.0}
    book.op("score", task=waits, position=book.door("outcome", score), body=score)
    hold = book.task("hold", 5)
    cancel = {"task": hold, "name": "cancel", "value": None}
    book.op("cancel", task=hold, position=book.door("signal", cancel), body=cancel)
    book.commit(f"task.chaos.{hold}", ("TaskCancelled", {"reason": "", "by": ""}))
    late = book.task("late", 6, deadline="2")
    book.commit("agent.chaos.y", ("AgentStopped", {"pid": 1, "reason": "stop"}))
    book.commit(f"task.chaos.{late}", ("TaskFailed", {"code": 408, "type": "DeadlineExceeded", "message": "late"}))
    fail = book.task("fail", 7)
    book.commit(f"task.chaos.{fail}", claim, ("TaskFailed", {"code": 500, "type": "ProgramFailed", "message": "no"}))
    book.op("result", task=fail, code=500, answer={"error": {"type": "ProgramFailed", "message": "no", "task": str(fail)}})
    return book


TASKS = {"quick": 1, "steps": 3, "again": 6, "nap": 8, "signal": 12, "hold": 18, "late": 21, "fail": 24}


def test_a_good_run_passes() -> None:
    book = good()
    submissions = [row.position for row in book.rows if row.subject == "dspex.task.chaos"]
    assert submissions == list(TASKS.values())
    assert check(book.evidence()) == []


def commit_of(book: Book, task: int, last: bool = True) -> int:
    """Where in the rows the last (or first) commit of a task is."""
    found = [i for i, row in enumerate(book.rows) if row.subject == f"dspex.event.task.chaos.{task}"]
    return found[-1 if last else 0]


def edit(book: Book, at: int, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change the events of a commit as they are stored."""
    batch = json.loads(book.rows[at].body)
    change(batch)
    book.rows[at] = book.rows[at]._replace(body=json.dumps(batch).encode())


def data_of(batch: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(event["data"] for event in batch if event["type"] == kind)


def again(book: Book, task: int) -> None:
    """Append the last commit of a task once more, as the next versions."""
    row = book.rows[commit_of(book, task)]
    events = [(event["type"], event["data"]) for event in json.loads(row.body)]
    book.commit(f"task.chaos.{task}", *events)


def unsubmit(book: Book) -> None:
    book.rows[0] = book.rows[0]._replace(subject="dspex.outcome.chaos")


def other_body(book: Book) -> None:
    book.rows[17] = book.rows[17]._replace(body=b'{"n": 6, "kind": "hold", "seconds": 0.0}')


def without_ending(book: Book) -> None:
    del book.rows[commit_of(book, TASKS["quick"])]


def work_after_the_end(book: Book) -> None:
    book.commit("task.chaos.24", ("TaskClaimed", {"attempt": 2, **CLAIM}))


def of_no_task(book: Book) -> None:
    book.commit("task.chaos.2", ("TaskClaimed", {"attempt": 1, **CLAIM}))


def other_output(book: Book) -> None:
    edit(book, commit_of(book, TASKS["steps"]), lambda batch: data_of(batch, "TaskCompleted").update(output={"n": 2, "value": 0}))


def other_failure(book: Book) -> None:
    edit(book, commit_of(book, TASKS["fail"]), lambda batch: data_of(batch, "TaskFailed").update(code=503))


def completed_for_failed(book: Book) -> None:
    at = commit_of(book, TASKS["fail"])
    edit(book, at, lambda batch: batch[-1].update(type="TaskCompleted", data={"output": {"n": 7, "value": 1}}))


def told_another(book: Book) -> None:
    book.ops[0].answer = {"n": 1, "value": 8}


def told_a_code(book: Book) -> None:
    book.ops[-1].code = 0


def told_another_type(book: Book) -> None:
    book.ops[-1].answer["error"]["type"] = "KeyError"


def told_too_soon(book: Book) -> None:
    book.ops[0].ended = 1.5


def told_that_it_runs(book: Book) -> None:
    book.op("result", task=TASKS["fail"], code=202, answer={"state": "running"}).began = 99.0


def told_not_found(book: Book) -> None:
    book.op("result", task=999, answer={})


def ran_twice(book: Book) -> None:
    at, batch = commit_of(book, TASKS["again"]), json.loads(book.rows[commit_of(book, TASKS["steps"])].body)
    del book.rows[at]
    book.rows.insert(at, Row(at + 1, at + 1.0, "dspex.event.task.chaos.6", {}, b""))
    for event in batch:
        event.update(aggregate="task.chaos.6", id=f"task.chaos.6/{event['version']}")
    book.rows[at] = book.rows[at]._replace(body=json.dumps(batch).encode())


def bound_twice(book: Book) -> None:
    book.commit("key.chaos.k2", ("KeyBound", {"key": "k2", "task": "6"}))


def duplicate_of_another(book: Book) -> None:
    edit(book, commit_of(book, TASKS["again"]), lambda batch: data_of(batch, "TaskDuplicate").update(of="1"))


def holder_is_a_duplicate(book: Book) -> None:
    edit(book, commit_of(book, TASKS["steps"]), lambda batch: batch[-1].update(type="TaskDuplicate", data={"of": "6", "key": "k2"}))


def cancelled_by_nobody(book: Book) -> None:
    book.rows[18] = book.rows[18]._replace(body=b'{"task": 18, "name": "go", "value": null}')


def twice_in_the_inbox(book: Book) -> None:
    book.commit("inbox.chaos.12", ("SignalReceived", {"name": "go", "position": 14, "value": 5}))


def signal_of_nobody(book: Book) -> None:
    book.commit("inbox.chaos.12", ("SignalReceived", {"name": "go", "position": 1, "value": 5}))


def another_signal(book: Book) -> None:
    edit(book, 14, lambda batch: data_of(batch, "SignalReceived").update(value=6))


def another_value(book: Book) -> None:
    edit(book, commit_of(book, TASKS["signal"]), lambda batch: data_of(batch, "TaskCompleted").update(output={"n": 4, "value": 1}))


def recorded_twice(book: Book) -> None:
    edit(book, commit_of(book, TASKS["nap"]), lambda batch: data_of(batch, "EffectRecorded").update(key="/step#0"))


def never_performed(book: Book) -> None:
    del book.performed[0]


def performed_again(book: Book) -> None:
    first = book.performed[0]
    done = json.loads(book.rows[4].body)[-1]
    edit(book, 4, lambda batch: batch.pop())  # it did not end there
    book.versions["task.chaos.3"] = 2
    book.commit("task.chaos.3", ("TaskClaimed", {"attempt": 2, **CLAIM}), (done["type"], done["data"]))
    book.performed.append(Performance(first.key, first.value, CLAIM["agent"], "b", 50.0, 50.1))


def one_key_two_effects(book: Book) -> None:
    first = book.performed[0]
    book.performed.append(Performance(first.key, "other", first.agent, "b", first.began, first.at))


def attempt_left_out(book: Book) -> None:
    edit(book, commit_of(book, TASKS["nap"]), lambda batch: data_of(batch, "TaskClaimed").update(attempt=3))


def two_holders(book: Book) -> None:
    edit(book, commit_of(book, TASKS["nap"]), lambda batch: batch[1].update(source="/agents/chaos-aaaa-2"))


def sleepwalker(book: Book) -> None:
    edit(book, commit_of(book, TASKS["nap"]), lambda batch: batch[0].update(type="Noted", data={}))


def woken_early(book: Book) -> None:
    edit(book, commit_of(book, TASKS["nap"], last=False), lambda batch: data_of(batch, "TaskSleeping").update(until=11.5))


def slept_too_short(book: Book) -> None:
    nap = [each for each in book.performed if each.key == idempotency_key(8, 0, "/step#1")]
    nap[0].at = 9.0


def too_late_too_early(book: Book) -> None:
    book.rows[20].headers["Dspex-Deadline"] = "2.5"


def gap(book: Book) -> None:
    del book.rows[18]


def garbage(book: Book) -> None:
    book.rows.append(Row(len(book.rows) + 1, 99.0, "dspex.event.task.chaos.24", {}, b"garbage"))


def of_another_aggregate(book: Book) -> None:
    edit(book, 4, lambda batch: batch[0].update(aggregate="key.chaos.k3"))


def version_left_out(book: Book) -> None:
    edit(book, 10, lambda batch: [event.update(version=event["version"] + 1) for event in batch])


def lent_beyond_the_limit(book: Book) -> None:
    window = {"scope": "program:chaos", "resource": "usd", "window": "all"}
    lent = {**window, "lease": "l1", "holder": "chaos-aaaa-1", "amount": 6.0, "of": 5.0}
    book.commit("budget.program_chaos.usd", ("BudgetLeased", lent))


def no_such_schema(book: Book) -> None:
    edit(book, commit_of(book, TASKS["quick"]), lambda batch: batch[-1].update(dataschema="urn:dspex:TaskCompleted:9"))


MUTATIONS: dict[str, list[Callable[[Book], object]]] = {
    "acknowledged": [unsubmit, other_body],
    "ended_once": [without_ending, lambda book: again(book, 24), work_after_the_end, of_no_task],
    "endings": [other_output, other_failure, completed_for_failed],
    "answers": [told_another, told_a_code, told_another_type, told_too_soon, told_that_it_runs, told_not_found],
    "keys": [ran_twice, bound_twice, duplicate_of_another, holder_is_a_duplicate],
    "cancelled": [cancelled_by_nobody],
    "signals": [twice_in_the_inbox, signal_of_nobody, another_signal, another_value],
    "recorded_once": [recorded_twice],
    "performed": [never_performed, performed_again, one_key_two_effects],
    "claims": [attempt_left_out, two_holders, sleepwalker],
    "timers": [woken_early, slept_too_short, too_late_too_early],
    "positions": [gap, garbage, of_another_aggregate],
    "versions": [version_left_out],
    "folds": [no_such_schema],
    "budgets": [lent_beyond_the_limit],
}
CASES = [(name, mutation) for name, mutations in MUTATIONS.items() for mutation in mutations]


@pytest.mark.parametrize(("name", "mutation"), CASES, ids=[f"{name}-{m.__name__}" for name, m in CASES])
def test_each_check_finds_what_breaks_its_promise(name: str, mutation: Callable[[Book], object]) -> None:
    book = good()
    seen = book.evidence()
    mutation(book)
    seen = replace(seen, history=History(book.ops), told=Told(book.rows), performances=book.performed)
    assert name in {violation.check for violation in check(seen)}


def forgotten_row(seen: Evidence) -> Evidence:
    assert seen.views
    seen.views.tasks.pop(1)
    return seen


def other_row(seen: Evidence) -> Evidence:
    assert seen.views
    seen.views.tasks[1]["state"] = "failed"
    return seen


def row_of_no_task(seen: Evidence) -> Evidence:
    assert seen.views
    seen.views.tasks[999] = {}
    return seen


def other_snapshot(seen: Evidence) -> Evidence:
    assert seen.views
    kept = replace(seen.views.snapshots[0], version=1)
    return replace(seen, views=replace(seen.views, snapshots=[kept]))


def hanging_job(seen: Evidence) -> Evidence:
    return replace(seen, hanging=["job 7"])


def broken_chain(seen: Evidence) -> Evidence:
    return replace(seen, archived=Archived(25, faults=[(3, "its checksum is wrong")]))


def short_archive(seen: Evidence) -> Evidence:
    return replace(seen, archived=Archived(24))


BESIDE: list[tuple[str, Callable[[Evidence], Evidence]]] = [
    ("views", forgotten_row), ("views", other_row), ("views", row_of_no_task), ("snapshots", other_snapshot),
    ("hanging", hanging_job), ("archive", broken_chain), ("archive", short_archive),
]  # fmt: skip


@pytest.mark.parametrize(("name", "mutation"), BESIDE, ids=[f"{name}-{m.__name__}" for name, m in BESIDE])
def test_each_check_of_what_stands_beside_the_log_finds_it(name: str, mutation: Callable[[Evidence], Evidence]) -> None:
    assert {violation.check for violation in check(mutation(good().evidence()))} == {name}


def test_every_check_is_broken_here_once() -> None:
    assert set(MUTATIONS) | {name for name, _ in BESIDE} == set(CHECKS)


def test_what_clients_were_told_is_kept_as_lines(tmp_path: Any) -> None:
    history = History(good().ops)
    history.save(tmp_path / "history")
    assert load(tmp_path / "history").ops == history.ops


def test_a_seed_makes_the_same_jobs() -> None:
    assert [job(7, n) for n in range(50)] == [job(7, n) for n in range(50)]
    assert [job(7, n) for n in range(50)] != [job(8, n) for n in range(50)]
