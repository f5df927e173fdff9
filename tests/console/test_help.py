"""What a newcomer meets first: the help, the version, the completion; and how fast."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
from tests.console.shells import Shell, environment

HEAVY = {"numpy", "nats", "uvloop", "litellm", "skopt", "pydantic", "rich", "msgspec", "sklearn"}
PROBE = """
import sys
from dspex.console.main import COMMANDS, run
for name in COMMANDS:
    assert run([name, "--help"]) == 0, name
assert run(["--help"]) == 0
print("loaded:", *sys.modules)
"""


def seconds(*command: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *command], env=environment(), check=True, capture_output=True)
    return time.perf_counter() - started


def test_no_help_imports_what_only_work_needs() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], env=environment(), capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert not loaded & HEAVY
    assert "dspex.console.demo" in loaded, "the probe looked at every command"


def test_help_costs_a_few_starts_of_python() -> None:
    plain = min(seconds("-c", "pass") for _ in range(5))
    assert min(seconds("-m", "dspex", "--help") for _ in range(5)) < 40 * plain


def test_importing_dspex_imports_nothing_else() -> None:
    probe = "import sys; before = set(sys.modules); import dspex; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", probe], env=environment(), capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & HEAVY


def test_without_a_command_the_help_is_shown(shell: Shell) -> None:
    ran = shell()
    assert ran.code == 0
    assert "dspex demo" in ran.out
    assert all(len(line) <= 80 for line in ran.out.splitlines())
    assert "..." not in ran.out.partition("Commands:")[2], "no command's help is cut off"


def test_version(shell: Shell) -> None:
    assert shell("--version").out.startswith("dspex 0.")


def test_a_misspelt_command_is_a_usage_error_with_a_guess(shell: Shell) -> None:
    ran = shell("evnts", "--json")
    assert (ran.code, ran.json["error"]["type"]) == (2, "UsageError")
    assert ran.err == "dspex: there is no command evnts; did you mean events?; see `dspex --help`\n"


def test_an_unknown_flag_is_a_usage_error_in_one_line(shell: Shell) -> None:
    ran = shell("ps", "--jsn")
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.count("\n") == 1
    assert "--jsn" in ran.err


@pytest.mark.parametrize("name", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: Shell, name: str) -> None:
    ran = shell("completion", name)
    assert ran.code == 0
    assert "_DSPEX_COMPLETE" in ran.out


def test_the_completion_knows_commands_and_running_programs(system: Shell) -> None:
    def completed(words: str, position: int) -> str:
        variables = {"_DSPEX_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(position)}
        return system(env=variables).out

    assert completed("dspex rep", 1) == "plain,replay\n"
    assert completed("dspex ask e", 2) == "plain,echo\n"
