"""The folders at the root, the links, the wheel and the sdist are the same package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WHEEL = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
SDIST = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]

NOT_PACKAGES = {"tests", "benchmarks", "docs", "src"}
FOLDERS = {path.parent.name for path in ROOT.glob("*/__init__.py")} - NOT_PACKAGES
OWN = {"src/dspex/__init__.py", "src/dspex/__main__.py", "src/dspex/py.typed"}


# -- the lock


def test_the_lock_has_every_dependency_with_hashes_and_no_word_of_a_registry() -> None:
    text = (ROOT / "requirements.lock").read_text()
    pinned = dict(re.findall(r"^([a-z0-9-]+)==([^ ;]+)", text, re.MULTILINE))
    for each in map(Requirement, PROJECT["project"]["dependencies"]):
        version = pinned.get(each.name)
        assert version and each.specifier.contains(version), f"{each}: `make lock`"
    entries = re.split(r"^(?=[a-z0-9-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(pinned) and all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"://|--index|--find-links|@ file", text)


# -- the lists


def test_every_folder_has_its_link_and_every_link_its_folder() -> None:
    links = {path.name for path in (ROOT / "src/dspex").iterdir() if path.is_symlink()}
    assert links == FOLDERS
    for name in links:
        assert (ROOT / "src/dspex" / name).readlink() == Path("../..") / name


def test_the_wheel_is_made_of_every_folder() -> None:
    assert set(WHEEL["only-include"]) == FOLDERS | {"docs"} | OWN
    assert WHEEL["sources"] == {"src/dspex": "dspex"} | {name: f"dspex/{name}" for name in FOLDERS | {"docs"}}


def test_the_sdist_has_what_the_wheel_is_made_of() -> None:
    listed = set(SDIST["only-include"])
    assert listed >= set(WHEEL["only-include"]) | {"pyproject.toml", PROJECT["project"]["readme"], "LICENSE", "tests"}
    assert [path for path in listed if not (ROOT / path).exists()] == []


def test_the_import_order_names_every_room() -> None:
    [contract] = PROJECT["tool"]["importlinter"]["contracts"]
    layers = {name.strip().removeprefix("dspex.") for layer in contract["layers"] for name in layer.split("|")}
    assert layers == FOLDERS - {"examples"}
    assert set(PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]) == layers


def test_the_version_is_said_once() -> None:
    import dspex

    assert dspex.__version__ == PROJECT["project"]["version"]


# -- the artefacts


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, the wheel made of the sdist, and in `direct` the wheel made of the tree."""
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--no-isolation", str(ROOT)]
    run(*build, "--outdir", str(folder))
    run(*build, "--wheel", "--outdir", str(folder / "direct"))
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel; our dependencies it borrows from this one."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home)
    python = home / "bin" / "python"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        str(wheel_of(built)),
    )
    [site] = home.glob("lib/python*/site-packages")
    # A path named in a .pth file is searched, but its own .pth files (the editable dspex) are not read.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_has_every_module_and_every_data_file(built: Path) -> None:
    names = set(zipfile.ZipFile(wheel_of(built)).namelist())
    wanted = {
        f"dspex/{path.relative_to(ROOT)}"
        for folder in FOLDERS | {"docs"}
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".md", ".jsonl", ".html", ".js")
    }
    assert wanted - names == set()
    assert {"dspex/__init__.py", "dspex/__main__.py", "dspex/py.typed"} <= names


def test_the_wheel_has_nothing_else(built: Path) -> None:
    names = zipfile.ZipFile(wheel_of(built)).namelist()
    inside = {name.split("/")[1] for name in names if name.startswith("dspex/")}
    assert inside == FOLDERS | {"docs", "__init__.py", "__main__.py", "py.typed"}
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"dspex"}
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_from_the_sdist_is_the_wheel_from_the_tree(built: Path) -> None:
    ours, direct = (zipfile.ZipFile(wheel_of(folder)) for folder in (built, built / "direct"))
    assert {info.filename: info.CRC for info in ours.infolist()} == {
        info.filename: info.CRC for info in direct.infolist()
    }


def test_the_sdist_has_the_tests_and_no_rubbish(built: Path) -> None:
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    assert {"Makefile", "tests/conftest.py", "tests/test_packaging.py", "docs/architecture.md", "LICENSE"} <= names
    assert not [
        name for name in names if "__pycache__" in name or "node_modules" in name or ".dspex" in name.split("/")
    ]


def test_the_installed_wheel_imports_whole(installed: Path) -> None:
    code = (
        "import dspex, importlib, pkgutil\n"
        "names = [m.name for m in pkgutil.walk_packages(dspex.__path__, 'dspex.') if not m.name.endswith('__main__')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(dspex.__file__, *names)"
    )
    file, *names = run(str(installed), "-W", "ignore", "-c", code).split()
    assert Path(file).is_relative_to(installed.parents[1])
    assert {f"dspex.{folder}" for folder in FOLDERS} <= set(names)


def test_the_installed_command_works(installed: Path) -> None:
    assert "dspex up" in run(str(installed), "-m", "dspex", "--help")
    assert "dspex up" in run(str(installed.with_name("dspex")), "--help")
    assert run(str(installed.with_name("dspex")), "--version").split()[1] == PROJECT["project"]["version"]


def test_the_installed_example_finds_its_documents(installed: Path) -> None:
    code = "from dspex.examples.docs_qa import QABot; print(QABot()(question='What is a commit?').source)"
    assert run(str(installed), "-c", code).startswith("docs/")


def wheel_of(folder: Path) -> Path:
    [wheel] = folder.glob("*.whl")
    return wheel


def run(*command: str) -> str:
    """What a command prints; it must succeed, away from the tree and from what the tests have set."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DSPEX_", "NATS_"))
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd="/", env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


KNOWN_BAD = {"litellm": ("1.82.7", "1.82.8")}
"""Versions that were malicious, or had to be withdrawn: nobody gets them, not even by way of another package."""


@pytest.mark.parametrize("package", KNOWN_BAD)
def test_versions_that_are_known_to_be_bad_are_kept_out(package: str) -> None:
    refused = next(each for each in PROJECT["tool"]["uv"]["constraint-dependencies"] if each.startswith(package))
    locked = (ROOT / "requirements.lock").read_text().lower()
    for version in KNOWN_BAD[package]:
        assert f"!={version}" in refused
        assert f"{package}=={version} " not in locked
