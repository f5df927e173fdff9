"""dspex: machine learning programs as production software, on NATS.

Everything public is here and is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "dspex.core.program": ("Program", "ProgramDescription"),
    "dspex.core.breaker": ("Breaker",),
    "dspex.core.effects": ("cancelled", "effect", "idempotency_key", "spend", "time_left"),
    "dspex.core.retry": ("Retry",),
    "dspex.core.schema": ("Schema",),
    "dspex.core.supervision": ("Intensity",),
    "dspex.core.upkeep": ("Upkeep",),
    "dspex.core.variables": ("computed", "constraint", "variable"),
    "dspex.core.space": ("Assignment", "Space"),
    "dspex.core.types": (
        "AttentionWeights", "Confidence", "Embedding", "Label", "ModelResponse", "Private", "Probability",
        "ReasoningChain", "Score", "Tensor", "TokenList",
    ),
    "dspex.core.errors": (
        "BreakerOpen", "BudgetExhausted", "ConfigurationError", "Conflict", "ConnectionFailed", "DeadlineExceeded",
        "DefinitionError",
        "DspexError", "EffectFailed", "Forgotten", "InvalidAssignment", "InvalidInput", "LimitExceeded", "LogCorrupt",
        "LogError", "NotFound", "ProgramFailed", "TaskError", "Unavailable",
    ),
    "dspex.agents.secrets": ("Secret", "reveal"),
    "dspex.compose.find": ("afind_tasks", "find_tasks"),
    "dspex.compose.forks": ("afork", "fork"),
    "dspex.compose.letters": (
        "adead_letters", "adrop_task", "aretry_task", "dead_letters", "drop_task", "retry_task",
    ),
    "dspex.compose.http": ("HttpReply", "http"),
    "dspex.compose.replays": ("Replay", "adiff", "diff"),
    "dspex.compose.system": ("System",),
}  # fmt: skip
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_WHERE)

if TYPE_CHECKING:
    from dspex.agents.secrets import Secret as Secret
    from dspex.agents.secrets import reveal as reveal
    from dspex.compose.find import afind_tasks as afind_tasks
    from dspex.compose.find import find_tasks as find_tasks
    from dspex.compose.forks import afork as afork
    from dspex.compose.forks import fork as fork
    from dspex.compose.http import HttpReply as HttpReply
    from dspex.compose.http import http as http
    from dspex.compose.letters import adead_letters as adead_letters
    from dspex.compose.letters import adrop_task as adrop_task
    from dspex.compose.letters import aretry_task as aretry_task
    from dspex.compose.letters import dead_letters as dead_letters
    from dspex.compose.letters import drop_task as drop_task
    from dspex.compose.letters import retry_task as retry_task
    from dspex.compose.replays import Replay as Replay
    from dspex.compose.replays import adiff as adiff
    from dspex.compose.replays import diff as diff
    from dspex.compose.system import System as System
    from dspex.core.breaker import Breaker as Breaker
    from dspex.core.effects import cancelled as cancelled
    from dspex.core.effects import effect as effect
    from dspex.core.effects import idempotency_key as idempotency_key
    from dspex.core.effects import spend as spend
    from dspex.core.effects import time_left as time_left
    from dspex.core.errors import BreakerOpen as BreakerOpen
    from dspex.core.errors import BudgetExhausted as BudgetExhausted
    from dspex.core.errors import ConfigurationError as ConfigurationError
    from dspex.core.errors import Conflict as Conflict
    from dspex.core.errors import ConnectionFailed as ConnectionFailed
    from dspex.core.errors import DeadlineExceeded as DeadlineExceeded
    from dspex.core.errors import DefinitionError as DefinitionError
    from dspex.core.errors import DspexError as DspexError
    from dspex.core.errors import EffectFailed as EffectFailed
    from dspex.core.errors import Forgotten as Forgotten
    from dspex.core.errors import InvalidAssignment as InvalidAssignment
    from dspex.core.errors import InvalidInput as InvalidInput
    from dspex.core.errors import LimitExceeded as LimitExceeded
    from dspex.core.errors import LogCorrupt as LogCorrupt
    from dspex.core.errors import LogError as LogError
    from dspex.core.errors import NotFound as NotFound
    from dspex.core.errors import ProgramFailed as ProgramFailed
    from dspex.core.errors import TaskError as TaskError
    from dspex.core.errors import Unavailable as Unavailable
    from dspex.core.program import Program as Program
    from dspex.core.program import ProgramDescription as ProgramDescription
    from dspex.core.retry import Retry as Retry
    from dspex.core.schema import Schema as Schema
    from dspex.core.space import Assignment as Assignment
    from dspex.core.space import Space as Space
    from dspex.core.supervision import Intensity as Intensity
    from dspex.core.types import AttentionWeights as AttentionWeights
    from dspex.core.types import Confidence as Confidence
    from dspex.core.types import Embedding as Embedding
    from dspex.core.types import Label as Label
    from dspex.core.types import ModelResponse as ModelResponse
    from dspex.core.types import Private as Private
    from dspex.core.types import Probability as Probability
    from dspex.core.types import ReasoningChain as ReasoningChain
    from dspex.core.types import Score as Score
    from dspex.core.types import Tensor as Tensor
    from dspex.core.types import TokenList as TokenList
    from dspex.core.upkeep import Upkeep as Upkeep
    from dspex.core.variables import computed as computed
    from dspex.core.variables import constraint as constraint
    from dspex.core.variables import variable as variable


def __getattr__(name: str) -> Any:
    module = _WHERE.get(name)
    if module is None:
        raise AttributeError(f"module 'dspex' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
