"""A progress bar a row, with lines written above; nothing moves when nobody looks."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import click

from dspex.console.render import is_terminal

__all__ = ["Progress"]


class Progress:
    """Bars for `totals` by name. `silent` writes nothing at all."""

    def __init__(self, totals: dict[str, int], silent: bool = False) -> None:
        self._silent = silent
        self._bars: Any = None
        self._rows: dict[str, Any] = {}
        if silent or not is_terminal():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("  {task.description}"), BarColumn(bar_width=36), MofNCompleteColumn(), TimeElapsedColumn(),
            console=Console(highlight=False),
        )  # fmt: skip
        width = max(map(len, totals))
        self._rows = {name: self._bars.add_task(name.ljust(width), total=total) for name, total in totals.items()}

    def __enter__(self) -> Self:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._bars.stop()

    def step(self, name: str) -> None:
        if self._bars:
            self._bars.advance(self._rows[name])

    def write(self, lines: list[str]) -> None:
        """Lines above the bars."""
        for line in lines:
            if self._bars:
                from rich.text import Text

                self._bars.console.print(Text.from_ansi(f"  {line}"))
            elif not self._silent:
                click.echo(f"  {line}")
