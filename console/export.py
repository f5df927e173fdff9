"""`dspex export`: tasks into a file that can be replayed anywhere."""

from __future__ import annotations

import click

from dspex.console.options import Options, common
from dspex.console.programs import program_names
from dspex.console.render import print_json
from dspex.console.sources import log_option, opened

__all__ = ["export"]


@click.command(short_help="Write tasks to a file that replays without a server.")
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--task", "tasks", multiple=True, metavar="ID", help="Only this task; may be given again.")
@click.option("--program", "programs", multiple=True, help="Only this program's tasks.", shell_complete=program_names)
@click.option("--with-keys", is_flag=True, help="Also the keys of private values: whoever has the file reads them.")
@log_option
@common
def export(
    options: Options, file: str, tasks: tuple[str, ...], programs: tuple[str, ...], with_keys: bool, log: str | None
) -> None:
    """Write tasks to a new SQLite file, with their positions, times and headers.

    The file goes anywhere: `dspex replay TASK --log FILE` and the other commands with --log need no server. It
    holds the inputs, outputs and results of effects as they are in the log, and large ones too. What is private is
    sealed in it, and opens only with --with-keys.
    """

    async def work() -> int:
        from dspex.compose.export import export as write

        async with opened(options, log) as source:
            prefix = options.settings().prefix
            return await write(source, file, tasks=tasks, programs=programs, prefix=prefix, keys=with_keys)

    entries = options.run(work())
    if options.json:
        print_json({"file": file, "entries": entries})
    else:
        click.echo(f"{file} has {entries:,} entries; `dspex tasks --log {file}` lists the tasks")
