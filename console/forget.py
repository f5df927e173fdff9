"""`dspex forget`: what a task holds is gone, and the log stays whole."""

from __future__ import annotations

import getpass
from typing import Any

import click

from dspex.console.options import Options, common
from dspex.console.render import print_json

__all__ = ["forget"]


@click.command(short_help="Forget what a task holds, for good.")
@click.argument("task")
@click.option("--reason", default="", metavar="TEXT", help="Why; the log keeps it.")
@click.option("--force", is_flag=True, help="Also one that has not ended: it fails at its next step.")
@common
def forget(options: Options, task: str, reason: str, force: bool) -> None:
    """Destroy the keys of a task's private values, and remove the objects that only it names.

    Its events stay, so the log and the archive still verify; what was sealed in them can never be read again.
    """

    async def work() -> dict[str, Any]:
        async with options.connect() as caller:
            return await caller.forget(task, reason, actor=getpass.getuser(), force=force)

    gone = options.run(work())
    if options.json:
        print_json(gone)
        return
    keys, objects = _counted(gone["keys"], "key"), _counted(gone["objects"] + gone["later"], "object")
    later = f" ({gone['later']} of them within minutes)" if gone["later"] else ""
    click.echo(f"task {task} is forgotten: {keys} destroyed, {objects} removed{later}")


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
