"""A task's past as the commands use it: events read back from JSON, and its state at a version."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from dspex.core.events import Event
    from dspex.core.task import TaskState

__all__ = ["history", "state_of", "to_event"]


def to_event(shown: dict[str, Any]) -> Event:
    """An event from the CloudEvent that the log's door gave."""
    import msgspec

    from dspex.core.codec import decode_commit

    return decode_commit(msgspec.json.encode([shown]), shown["position"])[0]


def history(shown: Iterable[dict[str, Any]], task: str, to: int | None = None) -> list[Event]:
    """The events of the task itself (not those about it, such as scores), up to version `to`."""
    events = [to_event(event) for event in shown]
    own = [event for event in events if event.aggregate.startswith("task.") and event.aggregate.endswith(f".{task}")]
    return own if to is None else [event for event in own if event.version <= to]


def state_of(state: TaskState) -> dict[str, Any]:
    """A task's state as JSON has it."""
    return {
        "state": state.status, "version": state.head.version, "attempts": state.attempts, "agent": state.agent or None,
        "assignment": state.assignment or None, "input": _value(state.input), "output": _value(state.output),
        "error": {"code": state.code, "type": state.error, "message": state.message} if state.error else None,
        "of": state.of or None, "seconds": state.seconds if state.ended else None,
    }  # fmt: skip


def _value(raw: Any) -> Any:
    return None if raw is None else json.loads(bytes(raw))
