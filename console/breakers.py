"""`dspex breakers`: where the circuit breakers of the effects stand, and closing one by hand."""

from __future__ import annotations

import getpass
import time
from typing import Any

import click

from dspex.console.options import Options, common
from dspex.console.programs import known, program_names
from dspex.console.render import clock, is_terminal, print_json, print_table

__all__ = ["breakers"]


@click.group(short_help="Show the circuit breakers of effects, or close one by hand.")
def breakers() -> None:
    """Show the circuit breakers of effects, or close one by hand.

    A breaker is open while an effect is not called, because too many of its calls failed or were slow.
    """


@breakers.command("ls", short_help="Show where they stand.")
@click.argument("program", required=False, shell_complete=program_names)
@common
def list_(options: Options, program: str | None) -> None:
    """Show the breakers that an agent has asked since it started, all or those of a program.

    JSON: {"program", "effect", "state", "version", "calls", "failures", "slow", "window", "since", "due"}.
    """

    async def work() -> list[dict[str, Any]]:
        async with options.connect() as caller:
            return [each for each in await caller.breakers() if program in (None, each["program"])]

    found = options.run(work())
    if options.json:
        for each in found:
            print_json(each)
        return
    now = time.strftime("%Y-%m-%d", time.gmtime())
    rows = [
        [
            *(each[name] for name in ("program", "effect", "state", "calls", "failures", "slow", "window")),
            clock(each["due"], now) if each["state"] == "open" else "",
        ]
        for each in found
    ]  # fmt: skip
    columns = ["program", "effect", "state", "calls", "failures", "slow", "window", "tried again"]
    print_table(columns, rows, right={"calls", "failures", "slow"})
    if not found and is_terminal():
        click.echo("no effect with a breaker has been called since the agents started")


@breakers.command(short_help="Close one by hand.")
@click.argument("program", shell_complete=program_names)
@click.argument("effect")
@common
def reset(options: Options, program: str, effect: str) -> None:
    """Close the breaker of an effect by hand: it is called again at once. An event says who did it."""

    async def work() -> dict[str, Any]:
        async with options.connect() as caller:
            return await known(caller, program, caller.reset_breaker(program, effect, who=getpass.getuser()))

    found = options.run(work())
    if options.json:
        print_json(found)
    elif found["before"] == "closed":
        click.echo(f"the breaker of {effect} was closed already")
    else:
        click.echo(f"the breaker of {effect} was {found['before'].replace('_', '-')} and is closed")
