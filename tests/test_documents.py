"""What the pages say is so: their programs run, their commands work, their tables and links are right."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from dspex.compose.caller import Caller
from dspex.core.codec import decode_commit
from dspex.core.events import PAYLOADS

ROOT = Path(__file__).resolve().parents[1]
README, PROTOCOL = ROOT / "README.md", ROOT / "docs" / "protocol.md"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
NODE_MODULES = ROOT / "tests" / "e2e" / "js" / "node_modules"
UNITS = {"": 1, "s": 1, "KiB": 1 << 10, "MiB": 1 << 20}


def blocks(page: Path, language: str, containing: str = "") -> list[str]:
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for kind, text in found if kind == language and containing in text]


def block(page: Path, language: str, containing: str = "") -> str:
    [text] = blocks(page, language, containing)
    return text


class Up(NamedTuple):
    """`dspex up qa.py`, with the program of the README, in a folder of its own."""

    folder: Path
    url: str

    def run(self, *command: str) -> str:
        """What a command prints that is run beside it; it must succeed."""
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=100, cwd=self.folder, env=environment(NATS_URL=self.url)
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


def environment(**more: str) -> dict[str, str]:
    """Ours, with the interpreter's folder first on the path, as an activated environment has it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {name: value for name, value in os.environ.items() if not name.startswith(("DSPEX_", "NATS_"))} | {
        "PATH": path,
        "PYTHONUNBUFFERED": "1",
        **more,
    }


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "qa.py").write_text(blocks(README, "python")[0])
    command = block(README, "sh", "dspex up").split()
    with (folder / "words").open("w") as words:
        process = subprocess.Popen(
            [*command, "--json", "--durability", "process"],
            stdout=subprocess.PIPE, stderr=words, text=True, cwd=folder, env=environment(),
        )  # fmt: skip
    assert process.stdout
    try:
        line = process.stdout.readline()
        assert line, (folder / "words").read_text()
        yield Up(folder, json.loads(line)["nats"])
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        shutil.rmtree(folder / ".dspex", ignore_errors=True)


# -- the README


def test_the_readmes_commands_work_in_their_order(up: Up) -> None:
    lines = block(README, "sh", "dspex ask").splitlines()
    printed = {line.split()[1]: up.run("bash", "-c", line) for line in lines}
    assert "The log keeps every event" in printed["ask"]
    assert "A task is one run of a program" in printed["result"]
    assert "TaskCompleted" in printed["events"]
    assert printed["ps"].count("qabot-") == 2
    assert "letters" in printed["vars"]


def test_the_readmes_python_caller_works(tmp_path: Path) -> None:
    (tmp_path / "qa.py").write_text(blocks(README, "python")[0])
    (tmp_path / "caller.py").write_text(block(README, "python", "to_agent_system"))
    printed = Up(tmp_path, "").run(sys.executable, "caller.py").splitlines()
    assert printed[:3] == ["A task is one run of a program.", "The log keeps every event", "0.75"]
    assert printed[3].startswith("['TaskSubmitted', 'TaskClaimed', 'TaskCompleted'")


def test_the_readme_names_verbs_that_make_has() -> None:
    verbs = set(re.findall(r"\bmake ([a-z-]+)", README.read_text() + (ROOT / "CONTRIBUTING.md").read_text()))
    assert {"demo", "test"} <= verbs
    for verb in verbs - {"it"}:
        subprocess.run(["make", "-n", verb], cwd=ROOT, check=True, capture_output=True)


# -- clients in other languages


@pytest.mark.parametrize("page", [README, PROTOCOL], ids=["README", "protocol"])
def test_the_client_in_python_works(page: Path, up: Up) -> None:
    script = up.folder / "client.py"
    script.write_text(block(page, "python", "import nats"))
    assert "A task is one run of a program." in up.run(sys.executable, script.name)


@pytest.mark.parametrize("page", [README, PROTOCOL], ids=["README", "protocol"])
def test_the_client_in_javascript_works(page: Path, up: Up) -> None:
    if not NODE_MODULES.is_dir() or not shutil.which("node"):
        assert not os.environ.get("DSPEX_REQUIRE_NODE"), "node and its packages are required here"
        pytest.skip("no node, or no packages: npm install --prefix tests/e2e/js")
    link = up.folder / "node_modules"
    if not link.exists():
        link.symlink_to(NODE_MODULES)
    script = up.folder / "client.mjs"
    script.write_text(block(page, "javascript"))
    assert "A task is one run of a program." in up.run("node", script.name)


def test_the_nats_command_lines_have_sound_bodies() -> None:
    lines = block(PROTOCOL, "sh", "nats request").splitlines() + block(README, "sh", "nats request").splitlines()
    bodies = re.findall(r"'(\{.*?\})'", "\n".join(lines))
    assert len(bodies) == 5
    for body in bodies:
        json.loads(body)


# -- the protocol


async def test_every_subject_that_is_served_is_in_the_protocol(up: Up) -> None:
    text = PROTOCOL.read_text()
    async with await Caller.connect(up.url) as caller:
        services = await caller.gather("INFO")
    subjects = {endpoint["subject"] for service in services for endpoint in service["endpoints"]}
    assert len(subjects) >= 7
    for served in subjects:
        subject = re.sub(r"^(\w+\.control)\.[^.]+\.", r"\1.*.", served)  # an agent's own name
        subject = re.sub(r"\.lease\.\*$", ".lease.<program>", subject)
        assert f"`{subject}`" in text or f"`{'.'.join(subject.split('.')[:2])}.>`" in text, subject


def test_the_example_of_a_commit_is_one() -> None:
    events = decode_commit(block(PROTOCOL, "json", "specversion").encode(), 43)
    assert [(event.id, event.type) for event in events] == [
        ("task.qabot.42/1", "TaskClaimed"),
        ("task.qabot.42/2", "TaskCompleted"),
    ]


def test_every_event_is_in_the_protocol_with_its_fields() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| `[a-z]+\..*? \| (.*) \|$", PROTOCOL.read_text(), re.MULTILINE)
    told = {kind: set(re.findall(r"`(\w+)`", fields)) for names, fields in rows for kind in re.findall(r"\w+", names)}
    assert set(told) == set(PAYLOADS)
    for kind, fields in told.items():
        assert fields == set(PAYLOADS[kind].__struct_fields__), kind


def test_all_examples_of_json_are_json() -> None:
    for page in PAGES:
        for text in blocks(page, "json"):
            json.loads(text)


# -- the architecture


def bounds() -> list[tuple[str, str]]:
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Bounds")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .*? \| (.*?) \| `([\w.]+)` \| .* \|$", table, re.MULTILINE)
    return [(shown, place) for shown, place in rows if place.rpartition(".")[2][0].isupper()]


@pytest.mark.parametrize(("shown", "place"), bounds(), ids=[place for _, place in bounds()])
def test_a_bound_is_what_the_table_says(shown: str, place: str) -> None:
    module, _, name = place.rpartition(".")
    found = getattr(importlib.import_module(f"dspex.{module}"), name)
    value = found if isinstance(found, int | float) else inspect.signature(found).parameters["limit"].default
    number, _, unit = shown.replace(",", "").partition(" ")
    assert value == float(number) * UNITS[unit]


def test_there_are_bounds_in_the_table() -> None:
    assert len(bounds()) > 15


# -- all pages


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_every_decision_is_listed() -> None:
    folder = ROOT / "docs" / "decisions"
    listed = re.findall(r"\]\((.*?)\)", (folder / "README.md").read_text())
    assert listed == sorted(path.name for path in folder.glob("0*.md"))
