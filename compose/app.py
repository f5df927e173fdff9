"""Finding the programs in a user's file: `file.py` or `file.py:Program`."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

from dspex.core.errors import ConfigurationError, DspexError
from dspex.core.program import Program

__all__ = ["load_app", "split_app"]


def split_app(app: str) -> tuple[Path, str | None]:
    """`qa.py:QABot` as a path and a class name."""
    path, _, name = app.partition(":") if not Path(app).exists() else (app, "", "")
    return Path(path), name or None


def load_app(app: str) -> list[type[Program]]:
    """The program classes that `app` names: the one after the colon, else all that the file defines and that are not
    part of another. Raises ConfigurationError with one sentence: no such file, a mistake in it, no program in it."""
    path, name = split_app(app)
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}; give one like qa.py or qa.py:QABot")
    module = _module(path)
    if name is not None:
        found = getattr(module, name, None)
        if not (isinstance(found, type) and issubclass(found, Program)):
            have = ", ".join(program.__name__ for program in _programs(module)) or "none"
            raise ConfigurationError(f"{path} has no program {name}; it has {have}")
        return [found]
    programs = _programs(module)
    if not programs:
        raise ConfigurationError(f"{path} defines no program; a program is a class with Input, Output and predict")
    parts = {part for program in programs for part in _parts(program)}
    return [program for program in programs if program not in parts] or programs


def _module(path: Path) -> ModuleType:
    """The file as a module. Its folder is importable while it runs, as it is for a script."""
    resolved = path.resolve()
    name = f"dspex_app_{resolved.stem}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(resolved.parent) not in sys.path:
        sys.path.insert(0, str(resolved.parent))
    try:
        spec.loader.exec_module(module)
    except DspexError as error:
        raise ConfigurationError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:
        # A syntax error's own text names the line once more; one in an imported file has to name that file.
        said = error.msg if isinstance(error, SyntaxError) and error.filename == str(resolved) else error
        raise ConfigurationError(f"{path}{_line(error, resolved)}: {type(error).__name__}: {said}") from error
    return module


def _line(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f":{error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f":{lines[-1]}" if lines else ""


def _programs(module: ModuleType) -> list[type[Program]]:
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Program) and value.__module__ == module.__name__
        and value.__definition__ is not None
    ]  # fmt: skip


def _parts(program: type[Program]) -> set[type[Program]]:
    """The programs that this one is made of."""
    definition = program.__definition__
    assert definition is not None, "only concrete programs are asked"
    parts = {type(template) for template in definition.templates.values() if isinstance(template, Program)}
    for module in definition.modules.values():
        parts |= {part for part in module.programs if issubclass(part, Program)}
    return parts
