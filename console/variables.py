"""`dspex vars`: the values that a program runs on, what each may be, and what was proposed."""

from __future__ import annotations

import getpass
from shutil import get_terminal_size
from typing import Any

import click

from dspex.console.options import Options, common
from dspex.console.programs import known, program_names
from dspex.console.render import compact, dim, is_terminal, print_json, print_table
from dspex.console.sources import settings_of

__all__ = ["variables"]

ROOMY = 110


@click.command("vars", short_help="Show the values a program runs on, or propose others.")
@click.argument("program", shell_complete=program_names)
@click.argument("verb", type=click.Choice(["get", "history", "propose"]), default="get")
@click.argument("pairs", nargs=-1, metavar="[K=V]...")
@click.option("--why", default="", metavar="TEXT", help="With propose: what it is for.")
@common
def variables(options: Options, program: str, verb: str, pairs: tuple[str, ...], why: str) -> None:
    """Show a program's variables: the values in force, and what each may be.

    `history` shows what was proposed, by whom and why. `propose K=V…` adds values on top of those in force: any task
    may then run on them, by its header Dspex-Assignment. What other tasks run on stays as it is.
    """
    if bool(pairs) != (verb == "propose"):
        raise click.UsageError("propose needs values, e.g. passages=4, and nothing else takes them")
    if verb == "propose":
        _propose(options, program, settings_of(pairs), why)
    elif verb == "history":
        _history(options, program)
    else:
        _get(options, program)


def _propose(options: Options, program: str, values: dict[str, Any], why: str) -> None:
    async def work() -> dict[str, Any]:
        async with options.connect() as caller:
            who = getpass.getuser()
            return await known(caller, program, caller.propose(program, values, who=who, why=why))

    found = options.run(work())
    if options.json:
        print_json(found)
        return
    click.echo(found["assignment"])
    if not found["fresh"]:
        click.echo(dim("it was known before"), err=True)


def _history(options: Options, program: str) -> None:
    from dspex.console.programs import check_program

    async def work() -> list[dict[str, Any]]:
        from dspex.compose.story import BusSource

        async with options.connect() as caller:
            source = BusSource(caller)
            await check_program(source, program)
            return [event async for event in source.events(aggregate=f"variables.{program}.0")]

    shown = [
        {"version": it["version"], "time": it["time"], "type": it["type"], **it["data"]} for it in options.run(work())
    ]
    if options.json:
        for proposal in shown:
            print_json(proposal)
        return
    rows = [
        [it["version"], it["time"][:19], it["assignment"], compact(it["values"]), it["who"], it["why"]] for it in shown
    ]
    print_table(["version", "when (UTC)", "assignment", "values", "who", "why"], rows, right={"version"})


def _get(options: Options, program: str) -> None:
    async def work() -> tuple[dict[str, Any], int]:
        async with options.connect() as caller:
            found = await known(caller, program, caller.variables(program))
            return found, len([event async for event in caller.events(aggregate=f"variables.{program}.0")])

    found, proposals = options.run(work())
    if options.json:
        print_json({**found, "proposals": proposals})
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
    if proposals:
        click.echo(dim(f"{proposals} proposed: dspex vars {program} history"))


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
