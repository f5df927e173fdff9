"""A task's state as JSON has it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dspex.core.task import TaskState

__all__ = ["state_of"]


def state_of(state: TaskState) -> dict[str, Any]:
    """A task's state as JSON has it."""
    return {
        "state": state.status, "version": state.head.version, "attempts": state.attempts, "agent": state.agent or None,
        "assignment": state.assignment or None, "input": _value(state.input), "output": _value(state.output),
        "error": {"code": state.code, "type": state.error, "message": state.message} if state.error else None,
        "of": state.of or None, "parent": state.forked.parent if state.forked else None,
        "at": state.forked.at if state.forked else None, "code": state.code_version or None,
        "seconds": state.seconds if state.ended else None,
    }  # fmt: skip


def _value(raw: Any) -> Any:
    return None if raw is None else json.loads(bytes(raw))
