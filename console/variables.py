"""`dspex vars`: the values that a program runs on, and what each may be."""

from __future__ import annotations

from shutil import get_terminal_size
from typing import Any

import click

from dspex.console.options import Options, common
from dspex.console.programs import known, program_names
from dspex.console.render import compact, dim, is_terminal, print_json, print_table

__all__ = ["variables"]

ROOMY = 110


@click.command("vars", short_help="Show the values a program runs on.")
@click.argument("program", shell_complete=program_names)
@click.argument("verb", type=click.Choice(["get"]), default="get")
@common
def variables(options: Options, program: str, verb: str) -> None:
    """Show a program's variables: the values in force, and what each may be."""

    async def work() -> dict[str, Any]:
        async with options.connect() as caller:
            return await known(caller, program, caller.variables(program))

    found = options.run(work())
    if options.json:
        print_json(found)
        return
    values, space = found["values"], found["space"]
    rows = [
        [
            path,
            compact(values[path]) if path in values else "not active",
            _range(about),
            _condition(about),
            about.get("doc", ""),
        ]
        for path, about in space["variables"].items()
    ]
    rows += [
        [path, compact(values.get(path)), "computed", f"from {', '.join(inputs)}", ""]
        for path, inputs in space.get("computed", {}).items()
    ]
    names = ["variable", "value", "may be", "active", "what it is"]
    # In a narrow terminal there is no room for words, and half a word helps nobody.
    shown = len(names) if not is_terminal() or get_terminal_size().columns >= ROOMY else len(names) - 1
    print_table(names[:shown], [row[:shown] for row in rows])
    for rule in space.get("constraints", ()):
        click.echo(f"{', '.join(rule['paths'])}: {rule['message'] or 'a rule between them must hold'}")
    click.echo(dim(f"\n{program}, version {found['version']}, assignment {found['assignment']}"))


def _range(about: dict[str, Any]) -> str:
    """`1 to 20`, `terse, full`, `text`."""
    if about.get("choices"):
        return ", ".join(compact(choice) for choice in about["choices"])
    if about.get("low") is not None and about.get("high") is not None:
        text = f"{about['low']:g} to {about['high']:g}"
        if about.get("step") not in (None, 1):
            text += f" by {about['step']:g}"
        return text + (", log" if about.get("log") else "")
    return {"boolean": "true, false"}.get(about["kind"], str(about["kind"]))


def _condition(about: dict[str, Any]) -> str:
    conditions = about.get("when") or ()
    if not conditions:
        return "always"
    return " and ".join(f"{rule['path']} = {' or '.join(map(compact, rule['values']))}" for rule in conditions)
