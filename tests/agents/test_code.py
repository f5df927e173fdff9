"""The code version: another one when the author has changed something, and only then."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex import Program, Schema
from dspex.agents import code as module
from dspex.agents.code import code_of
from dspex.compose.app import load_app

PROGRAM = """
import json, os.path
from dspex import Program, Schema
{imports}
class Made(Program):
    class Input(Schema):
        n: int = 0
    class Output(Schema):
        n: int
    def predict(self, input: Input) -> Output:
        {later}
        return self.Output(n=input.n)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a program's files are; what was imported from there is forgotten afterwards."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def version(folder: Path, imports: str = "", later: str = "pass", name: str = "made.py") -> str:
    """The code version of a program that is loaded from a file as `dspex up` does."""
    for known in [it for it in sys.modules if str(getattr(sys.modules[it], "__file__", "")).startswith(str(folder))]:
        del sys.modules[known]
    (folder / name).write_text(PROGRAM.format(imports=imports, later=later))
    [program] = load_app(str(folder / name))
    return code_of(program)


def test_the_same_code_is_the_same_wherever_it_stands(folder: Path) -> None:
    (folder / "other").mkdir()
    assert len(version(folder)) == 12
    assert version(folder) == version(folder, name="renamed.py") == version(folder / "other")


@pytest.mark.parametrize(
    ("file", "imports", "later"),
    [
        ("helper.py", "import helper", "pass"),
        ("helper.py", "from helper import VALUE as used", "pass"),
        ("helper.py", "", "import helper"),
        ("parts/deep/helper.py", "import parts.deep.helper", "pass"),
        ("parts/deep/helper.py", "from parts.deep import helper", "pass"),
        ("second.py", "import first", "pass"),
        ("parts/beside.py", "import parts.relative", "pass"),
        ("parts/__init__.py", "import parts.relative", "pass"),
    ],
)
def test_a_file_that_is_imported_counts(folder: Path, file: str, imports: str, later: str) -> None:
    (folder / "parts" / "deep").mkdir(parents=True)
    for each in ("parts/__init__.py", "parts/deep/__init__.py", "parts/deep/helper.py", "helper.py", "second.py",
                 "parts/beside.py"):  # fmt: skip
        (folder / each).write_text("VALUE = 1\n")
    (folder / "first.py").write_text("import second\n")
    (folder / "parts" / "relative.py").write_text("from . import beside\nfrom .beside import VALUE\n")
    before = version(folder, imports, later)
    assert version(folder, imports, later) == before
    (folder / file).write_text("VALUE = 2\n")
    assert version(folder, imports, later) != before


def test_a_file_that_nobody_imports_does_not_count(folder: Path) -> None:
    before = version(folder)
    (folder / "helper.py").write_text("VALUE = 1\n")
    assert version(folder) == before


def test_what_is_installed_does_not_count(folder: Path) -> None:
    package = folder / "site-packages" / "installed"
    package.mkdir(parents=True)
    sys.path.insert(0, str(package.parent))
    (package / "__init__.py").write_text("VALUE = 1\n")
    before = version(folder, "import installed, json, pytest")
    (package / "__init__.py").write_text("VALUE = 2\n")
    assert version(folder, "import installed, json, pytest") == before


def test_a_program_without_a_file_has_its_own_source_or_none() -> None:
    space: dict[str, object] = {"__name__": "typed_in"}
    exec(
        "from dspex import Program, Schema\n"
        "class Typed(Program):\n"
        "    class Input(Schema):\n        n: int = 0\n"
        "    class Output(Schema):\n        n: int\n"
        "    def predict(self, input):\n        return input\n",
        space,
    )
    typed = space["Typed"]
    assert isinstance(typed, type) and issubclass(typed, Program)
    assert code_of(typed) == ""


def test_a_circle_of_imports_ends_and_many_files_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "one.py").write_text("import two\n")
    (folder / "two.py").write_text("import one\n")
    assert version(folder, "import one")
    monkeypatch.setattr(module, "MAX_FILES", 2)
    before = version(folder, "import one")
    (folder / "two.py").write_text("import one  # changed\n")
    assert version(folder, "import one") == before


class Local(Program):
    """Defined in this very file."""

    class Input(Schema):
        n: int = 0

    class Output(Schema):
        n: int

    def predict(self, input: Input) -> Output:
        return self.Output(n=input.n)


def test_a_program_of_a_module_counts_with_its_file() -> None:
    assert len(code_of(Local)) == 12
