"""views: the tables beside the archive that tasks are found by; how far they are, and making them again."""

from __future__ import annotations

from typing import Any

import click

from dspex.console.options import Options, common
from dspex.console.render import print_json, print_table, yellow

__all__ = ["views"]


@click.command(short_help="Show the views of the archive, or make one again.")
@click.argument("verb", required=False, type=click.Choice(["ls", "rebuild", "drop"]), default="ls")
@click.argument("name", required=False)
@common
def views(options: Options, verb: str, name: str | None) -> None:
    """Show how far each view of the archive is, or rebuild NAME, or drop it.

    Views are computed from the archive and may be thrown away: nothing but time is lost. One that was dropped stays
    so until it is rebuilt.
    """
    if (verb == "ls") != (name is None):
        raise click.UsageError("views ls, views rebuild NAME, or views drop NAME")

    async def work() -> dict[str, Any]:
        import msgspec

        async with options.connect() as caller:
            change = {} if verb == "ls" else {verb: name}
            return msgspec.json.decode(await caller.archive("views", change), type=dict[str, Any])

    _show(options, options.run(work()))


def _show(options: Options, found: dict[str, Any]) -> None:
    """Each view, and how many positions of the archive it has still to take in."""
    rows = [
        {
            "view": view["name"], "version": view["version"], "position": max(view["position"], 0),
            "lag": None if view["position"] < 0 else max(found["position"] - view["position"], 0),
            "state": "dropped" if view["position"] < 0 else "stopped" if view["trouble"] else "follows",
            "trouble": view["trouble"],
        }
        for view in found["views"]
    ]  # fmt: skip
    if options.json:
        for row in rows:
            print_json(row)
        return
    columns = ["view", "version", "position", "lag", "state", "trouble"]
    print_table(columns, [[row[name] for name in columns] for row in rows], right={"version", "position", "lag"})
    if found["trouble"]:
        click.echo(f"{yellow('dspex:')} {found['trouble']}", err=True)
