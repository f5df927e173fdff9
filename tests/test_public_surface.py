"""What `import dspex` gives, and what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dspex

ROOT = Path(__file__).resolve().parents[1]

PUBLIC = [
    "Assignment", "AttentionWeights", "Breaker", "BreakerOpen", "BudgetExhausted", "Confidence", "ConfigurationError",
    "Conflict", "ConnectionFailed", "DeadlineExceeded", "DefinitionError", "DspexError", "EffectFailed", "Embedding",
    "Forgotten", "HttpReply", "Intensity", "InvalidAssignment", "InvalidInput", "Label", "LimitExceeded", "LogCorrupt", "LogError",
    "ModelResponse", "NotFound", "Private", "Probability", "Program", "ProgramDescription", "ProgramFailed",
    "ReasoningChain", "Replay", "Retry", "Schema", "Score", "Secret", "Space", "System", "TaskError", "Tensor",
    "TokenList", "Unavailable", "Upkeep", "adead_letters", "adiff", "adrop_task", "afind_tasks", "afork", "aretry_task",
    "cancelled", "computed", "constraint", "dead_letters", "diff", "drop_task", "effect", "find_tasks", "fork", "http",
    "idempotency_key", "retry_task", "reveal", "spend", "time_left", "variable",
]  # fmt: skip

HEAVY = {
    "aiohttp", "fastapi", "litellm", "nats", "numpy", "pandas", "pydantic", "rich", "sklearn", "skopt", "sqlite3",
    "starlette", "torch", "uvicorn", "uvloop",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert dspex.__all__ == PUBLIC


def test_every_public_name_is_there() -> None:
    assert [name for name in PUBLIC if not hasattr(dspex, name)] == []
    assert set(PUBLIC) < set(dir(dspex))


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Porgram'"):
        dspex.Porgram  # type: ignore[attr-defined]  # noqa: B018 - the access is the test


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "src/dspex/__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    seen = [alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(filter(None, seen)) == PUBLIC


@pytest.mark.parametrize(
    "code",
    [
        "import dspex",
        "from dspex.console.main import run; run(['--help'])",
        "from dspex.console.main import run; run(['--version'])",
    ],
    ids=["import", "--help", "--version"],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    loaded = output("-c", f"{code}\nimport sys; print('loaded', *sys.modules)").rpartition("loaded")[2].split()
    assert not HEAVY & {name.partition(".")[0] for name in loaded}


def test_importing_dspex_costs_less_than_importing_asyncio() -> None:
    # A ratio within one process, and the best of several, so that a busy machine does not matter.
    ratios = []
    for _ in range(5):
        lines = output("-X", "importtime", "-c", "import dspex, asyncio").splitlines()
        cost = {
            line.split("|")[2].strip(): int(line.split("|")[1])
            for line in lines
            if line.count("|") == 2 and "self" not in line
        }
        ratios.append(cost["dspex"] / cost["asyncio"])
    assert min(ratios) < 1.0, ratios


def output(*arguments: str) -> str:
    """What an interpreter of its own prints, on either stream."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
