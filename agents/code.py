"""Which code a program is: a fingerprint over its file and over every file of its author that it imports."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from dspex.core.program import Program

__all__ = ["code_of", "files_of"]

MAX_FILES = 2000
"""Files that count; of a program that imports more, the rest does not."""
_INSTALLED = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}


def code_of(program: type[Program]) -> str:
    """A fingerprint of the program's code, 12 hex digits: of the file that defines it and of the author's own files
    that this one imports, directly or not. Installed packages and what is no Python file do not count. Of a program
    without a file, as in a notebook, its own source; "" when there is none to read."""
    found = _bodies(program)
    if not found:
        try:
            source = inspect.getsource(program)
        except (OSError, TypeError):
            return ""
        return hashlib.sha256(source.encode()).hexdigest()[:12]
    digest = hashlib.sha256()
    for name, body in sorted(found.values()):
        digest.update(f"{name}\0{len(body)}\0".encode() + body)
    return digest.hexdigest()[:12]


def files_of(program: type[Program]) -> list[Path]:
    """The files that count for its fingerprint; none for a program without a file."""
    return list(_bodies(program))


def _bodies(program: type[Program]) -> dict[Path, tuple[str, bytes]]:
    """Each file, with the name of its module and what is in it."""
    module = sys.modules.get(program.__module__)
    path = _file(module)
    if module is None or path is None:
        return {}
    # The first file has no name here: the same code is the same wherever the file stands and however it was loaded.
    found: dict[Path, tuple[str, bytes]] = {path: ("", path.read_bytes())}
    todo = [(module.__name__, module.__package__ or "", found[path][1])]
    while todo and len(found) < MAX_FILES:
        for name in _imports(*todo.pop()):
            other = sys.modules.get(name)
            path = _file(other) if other else _unloaded(name)
            if path is None or path in found or name.partition(".")[0] == "dspex" or _installed(path):
                continue
            found[path] = (name, path.read_bytes())
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            todo.append((name, package, found[path][1]))
    return found


def _file(module: ModuleType | None) -> Path | None:
    """The Python file of a module; None when it has none."""
    name = getattr(module, "__file__", None)
    path = Path(name).resolve() if name else None
    return path if path and path.suffix == ".py" and path.is_file() else None


def _unloaded(name: str) -> Path | None:
    """The file of a module that is imported later, inside a function. Looking must not import anything."""
    if "." in name:
        return None
    with contextlib.suppress(ImportError, ValueError, AttributeError):
        spec = importlib.util.find_spec(name)
        if spec and spec.origin and spec.origin.endswith(".py"):
            return Path(spec.origin).resolve()
    return None


def _installed(path: Path) -> bool:
    return "site-packages" in path.parts or any(path.is_relative_to(folder) for folder in _INSTALLED)


def _imports(name: str, package: str, body: bytes) -> Iterator[str]:
    """The full names of what a file imports, and of what these may be."""
    try:
        tree = ast.parse(body)
    except (SyntaxError, ValueError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield from (".".join(parts[:count]) for count in range(1, len(parts) + 1))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                with contextlib.suppress(ImportError):
                    base = importlib.util.resolve_name("." * node.level + base, package)
            if base:
                yield base
                yield from (f"{base}.{alias.name}" for alias in node.names)
