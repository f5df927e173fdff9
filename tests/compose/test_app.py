"""Finding the programs in a user's file, and the mistakes it may hold."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from dspex.compose.app import load_app, split_app
from dspex.core.errors import ConfigurationError

PROGRAM = """
from dspex import Program, Schema, variable


class One(Program):
    class Input(Schema):
        n: int

    class Output(Schema):
        n: int

    def predict(self, input: Input) -> Output:
        return self.Output(n=input.n)


class Two(One):
    pass
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "qa.py"
    path.write_text(PROGRAM)
    return path


def names(app: object) -> list[str]:
    return [program.__name__ for program in load_app(str(app))]


def test_all_programs_of_a_file(file: Path) -> None:
    assert names(file) == ["One", "Two"]


def test_the_one_that_is_named(file: Path) -> None:
    assert names(f"{file}:Two") == ["Two"]


def test_a_part_of_another_is_not_served_by_itself(file: Path) -> None:
    file.write_text(PROGRAM + textwrap.dedent("""
        class Whole(One):
            part = variable(One, choices=[One, Two])
    """))
    assert names(file) == ["Whole"]


def test_what_a_file_imports_is_not_its_own(file: Path) -> None:
    (file.parent / "user.py").write_text("from qa import One\nclass Mine(One): pass\n")
    assert names(file.parent / "user.py") == ["Mine"]


def test_two_files_of_one_name_in_two_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "app.py").write_text(PROGRAM.replace("Two", f"Of{folder.upper()}"))
    assert names(tmp_path / "a" / "app.py") == ["One", "OfA"]
    assert names(tmp_path / "b" / "app.py") == ["One", "OfB"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\n", "defines no program"), ("def (\n", r"qa\.py:1: SyntaxError"), ("\n1 / 0\n", r"qa\.py:2: ZeroDivisionError"),
        ("import no_such_module\n", "no_such_module"), ("raise SystemExit('no')\n", "SystemExit"),
        ("\xff", "qa.py"), (PROGRAM.replace("n: int", "n: object()"), "qa.py"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_that_says_where(file: Path, source: str, words: str) -> None:
    file.write_bytes(source.encode("latin-1"))
    with pytest.raises(ConfigurationError, match=words) as refused:
        load_app(str(file))
    assert "\n" not in str(refused.value)


def test_a_syntax_error_is_placed_once_here_or_in_the_file_that_was_imported(file: Path) -> None:
    file.write_text("x = (\n")
    with pytest.raises(ConfigurationError) as refused:
        load_app(str(file))
    assert str(refused.value) == f"{file}:1: SyntaxError: '(' was never closed"
    (file.parent / "half.py").write_text("\n\ny = (\n")
    file.write_text("import half\n")
    with pytest.raises(ConfigurationError, match=r"qa\.py:1: SyntaxError: .*half\.py, line 3"):
        load_app(str(file))


def test_a_name_that_is_not_there_is_refused_with_those_that_are(file: Path) -> None:
    with pytest.raises(ConfigurationError, match="no program Three; it has One, Two"):
        load_app(f"{file}:Three")


@pytest.mark.parametrize("app", ["nowhere.py", "nowhere.py:One", "/tmp", ""])
def test_a_file_that_is_not_there_is_refused(app: str) -> None:
    with pytest.raises(ConfigurationError, match="there is no file"):
        load_app(app)


def test_a_colon_in_the_path_of_a_file_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "a:b.py"
    path.write_text(PROGRAM)
    assert split_app(str(path)) == (path, None)
    assert split_app("qa.py:One") == (Path("qa.py"), "One")
