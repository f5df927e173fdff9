"""Was everything done that was acknowledged, once, and was everybody told what the log says?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from benchmarks.chaos.evidence import Evidence, Violation
from benchmarks.chaos.history import ENDED, Op
from benchmarks.chaos.told import TERMINAL, Door, Event, Told, same
from benchmarks.chaos.workload import step

__all__ = ["acknowledged", "answers", "cancelled", "ended_once", "endings", "hanging", "keys", "signals"]


def acknowledged(seen: Evidence) -> Iterator[Violation]:
    """Whatever was acknowledged to a client is in the log as the client sent it."""
    doors = {"submit": "task", "ask": "task", "signal": "signal", "cancel": "signal", "score": "outcome"}
    for op in seen.history.of(*doors):
        position = op.task if op.action in ("submit", "ask") else op.position
        if op.outcome != "ok" or not position:
            continue
        door = seen.told.doors.get(position)
        if door is None or (door.door, door.program) != (doors[op.action], op.program):
            yield Violation("acknowledged", f"{op.client} was told that its {op.action} is there", op.task, position)
        elif not same(door.json, op.body) or door.key != op.key:
            what = f"the {op.action} of {op.client} is in the log as another"
            yield Violation("acknowledged", what, op.task, position)


def ended_once(seen: Evidence) -> Iterator[Violation]:
    """Every task in the log has one ending, which is its last event; and there are no events of what is no task."""
    for door in seen.told.tasks():
        events = seen.told.events(door.position)
        types = [event.type for event in events if event.type in TERMINAL]
        if not types:
            yield Violation("ended_once", f"it has not ended: {[event.type for event in events][-3:]}", door.position)
        elif len(types) > 1:
            yield Violation("ended_once", f"it ended more than once: {types}", door.position)
        elif events[-1].type not in TERMINAL:
            yield Violation("ended_once", f"{events[-1].type} after its end", door.position, events[-1].position)
    for name, events in seen.told.aggregates.items():
        kind, program, id = name.split(".")
        submission = seen.told.doors.get(int(id)) if kind == "task" and id.isdecimal() else None
        if kind == "task" and (submission is None or (submission.door, submission.program) != ("task", program)):
            yield Violation("ended_once", f"events of {name}, which nobody submitted", 0, events[0].position)


def endings(seen: Evidence) -> Iterator[Violation]:
    """Each task ended as its input says; one with a key perhaps as a duplicate, one that somebody cancelled so."""
    cancels = _cancels(seen.told)
    for door in seen.told.tasks():
        due, ending = seen.expected(door.json, door.headers), seen.told.ending(door.position)
        if due is None or ending is None:
            continue
        may = due.types | ({"TaskDuplicate"} if door.key else set())
        if any(signal.position < ending.position for signal in cancels.get(door.position, ())):
            may |= {"TaskCancelled"}
        if due.waits and seen.told.aggregates.get(f"inbox.{door.program}.{door.position}"):
            may |= {"TaskCompleted"}
        if ending.type not in may:
            yield Violation("endings", f"{ending.type}: {ending.data}, and {sorted(may)} was due", door.position)
        elif ending.type == "TaskFailed" and ending.data.get("code") != due.code:
            yield Violation("endings", f"it failed with {ending.data}, and {due.code} was due", door.position)
        elif ending.type == "TaskCompleted" and due.output is not None and not same(ending.data["output"], due.output):
            yield Violation("endings", f"it gave {ending.data['output']}, and {due.output} was due", door.position)


def answers(seen: Evidence) -> Iterator[Violation]:
    """What a client was told of a task is what the log says of it, and was not told before the log said it."""
    told = seen.told
    for op in seen.history.of("ask", "result"):
        if not op.task or op.outcome != "ok":
            continue
        if op.task not in told.doors:
            yield Violation("answers", f"{op.client} was told of a task that is not in the log", op.task)
            continue
        ending = told.ending(told.original(op.task))
        if op.code == 202:
            own = told.ending(op.task)  # a duplicate that nobody has looked at yet is none so far
            if ending and own and max(ending.time, own.time) + seen.skew < op.began:
                yield Violation("answers", f"{op.client} was told {op.answer} after its end", op.task, ending.position)
        elif op.code not in ENDED:
            yield Violation("answers", f"{op.client} was told {op.code}: {op.answer}", op.task)
        elif ending is None:
            yield Violation("answers", f"{op.client} was told {op.answer} of a task that has not ended", op.task)
        elif wrong := _differs(op, ending):
            yield Violation("answers", f"{op.client} was told {wrong}", op.task, ending.position)
        elif op.ended + 0.001 + seen.skew < ending.time:
            yield Violation("answers", f"{op.client} was told before the log had it", op.task, ending.position)


def _differs(op: Op, ending: Event) -> str:
    """How an answer differs from the log's ending; "" when it does not."""
    data: dict[str, Any] = ending.data
    due = {"TaskCompleted": 0, "TaskCancelled": 409, "TaskDeadLettered": 500}.get(ending.type, data.get("code"))
    if op.code != due:
        return f"{op.code}, and the log says {ending.type} {due}"
    if ending.type == "TaskCompleted":
        return "" if same(op.answer, data["output"]) else f"{op.answer}, and the log says {data['output']}"
    kind = data.get("type", ending.type)
    said = op.answer.get("error", {}).get("type") if isinstance(op.answer, dict) else None
    return "" if said == kind else f"{said}, and the log says {kind}"


def hanging(seen: Evidence) -> Iterator[Violation]:
    """Every client got done."""
    for name in seen.hanging:
        yield Violation("hanging", f"{name} hangs")


def keys(seen: Evidence) -> Iterator[Violation]:
    """Of all tasks with one key, one ran: it is the one that the key is bound to, and the others say so."""
    holders: dict[tuple[str, str], list[Door]] = defaultdict(list)
    for door in seen.told.tasks():
        if 1 <= len(door.key) <= 256 and not door.garbled:
            holders[door.program, door.key].append(door)
    bound: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, events in seen.told.aggregates.items():
        if name.startswith("key."):
            for event in events:
                bound[name.split(".")[1], event.data["key"]].append(str(event.data["task"]))
    for (program, key), doors in holders.items():
        tasks = bound.get((program, key), [])
        if len(tasks) > 1:
            yield Violation("keys", f"the key {key} of {program} is bound to {tasks}")
        for door in doors:
            events = seen.told.events(door.position)
            last = events[-1] if events else None
            if tasks and str(door.position) == tasks[0]:
                if last and last.type == "TaskDuplicate":
                    yield Violation("keys", f"it has the key {key}, and ended as a duplicate", door.position)
            elif last and last.type == "TaskDuplicate" and [str(last.data["of"])] != tasks:
                yield Violation("keys", f"a duplicate of {last.data['of']}, and {key} is of {tasks}", door.position)
            elif any(event.type in ("EffectRecorded", "TaskCompleted") for event in events):
                yield Violation("keys", f"it ran, and the key {key} is bound to {tasks}", door.position)


def cancelled(seen: Evidence) -> Iterator[Violation]:
    """What ended as cancelled was cancelled by somebody; what could only end so, and was cancelled, did."""
    cancels = _cancels(seen.told)
    for door in seen.told.tasks():
        ending, signals = seen.told.ending(door.position), cancels.get(door.position, [])
        if ending and ending.type == "TaskCancelled" and not any(s.position < ending.position for s in signals):
            yield Violation("cancelled", "nobody had cancelled it", door.position, ending.position)


def signals(seen: Evidence) -> Iterator[Violation]:
    """Each signal is in its task's inbox once, and a task that waited for one gave what the first of them makes."""
    for name, events in seen.told.aggregates.items():
        kind, program, id = name.split(".")
        received = [event for event in events if event.type == "SignalReceived"]
        if kind != "inbox" or not id.isdecimal():
            continue
        positions = [event.data["position"] for event in received]
        if len(set(positions)) < len(positions):
            yield Violation("signals", f"one signal came into the inbox twice: {positions}", int(id))
        for event in received:
            door = seen.told.doors.get(event.data["position"])
            meant = seen.told.original(door.names) if door else 0
            if door is None or (door.door, door.program, meant) != ("signal", program, int(id)):
                yield Violation("signals", "a signal in its inbox that nobody sent", int(id), event.position)
            elif not same(event.data["value"], door.json.get("value")):
                yield Violation("signals", "a signal in its inbox is another than was sent", int(id), event.position)
        first = min(received, key=lambda event: event.data["position"], default=None)
        task = seen.told.doors.get(int(id))
        due = seen.expected(task.json, task.headers) if task else None
        ending = seen.told.ending(int(id))
        if task and due and due.output is None and first and ending and ending.type == "TaskCompleted":
            output = {"n": task.json["n"], "value": step(first.data["value"])}
            if not same(ending.data["output"], output):
                yield Violation("signals", f"it gave {ending.data['output']}, and {output} was due", int(id))


def _cancels(told: Told) -> dict[int, list[Door]]:
    found: dict[int, list[Door]] = defaultdict(list)
    for door in told.doors.values():
        if door.cancels:
            found[told.original(door.names)].append(door)
    return found
