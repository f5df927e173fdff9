"""`dspex scale`, `reload`, `drain`, `stop` and `restart`: which agents run, and on which code."""

from __future__ import annotations

import getpass
import secrets
from typing import TYPE_CHECKING, Any

import click

from dspex.console.options import Options, common
from dspex.console.programs import program_names
from dspex.console.render import clean, is_terminal, print_json, print_table

if TYPE_CHECKING:
    from dspex.compose.caller import Caller

__all__ = ["drain", "reload", "restart", "scale", "stop"]

RELOAD = 900.0
"""Seconds after which nobody waits any longer for a reload; it goes on."""

on_option = click.option("--on", metavar="SUPERVISOR", help="Which one, when several supervisors serve the program.")


@click.command(short_help="Show or set how many agents serve a program.")
@click.argument("program", required=False, shell_complete=program_names)
@click.argument("agents", required=False)
@click.option("--why", default="", metavar="TEXT", help="Why, for the log.")
@on_option
@common
def scale(options: Options, program: str | None, agents: str | None, why: str, on: str | None) -> None:
    """Show how many agents serve each program, or have AGENTS of them serve PROGRAM: 8, or 1..8 to follow the load.

    Tasks that run in agents which are too many end there. The number holds until `dspex up` is started again, whatever
    dies in between; to keep it for good, write it into dspex.toml.
    """
    if agents is not None:
        from dspex.core.scaling import Scale

        try:
            Scale.read(agents)
        except ValueError as error:
            raise click.UsageError(str(error)) from None

    async def work() -> list[dict[str, Any]]:
        async with options.connect() as caller:
            if agents is None:
                return [it for it in await caller.fleet() if program in (None, it["program"])]
            supervisor = on or await _supervisor_of(caller, str(program))
            body = {"program": program, "agents": agents, "why": why}
            return [await caller.control(supervisor, "scale", body, actor=getpass.getuser())]

    found = options.run(work())
    if options.json:
        for each in found:
            print_json(each)
    elif agents is None:
        _show_fleet(found)
    elif is_terminal():
        (it,) = found
        between = f" between {it['least']} and {it['most']}, now" if it["least"] < it["most"] else ""
        number = _agents(it["agents"])
        click.echo(f"{it['program']} gets{between} {number} under {it['supervisor']}; it had {it['was']}")


@click.command(short_help="Roll programs over to the code that is there now.")
@click.argument("program", required=False, shell_complete=program_names)
@click.option("--replace", is_flag=True, help="Let changed schemas take the place of those registered.")
@on_option
@common
def reload(options: Options, program: str | None, replace: bool, on: str | None) -> None:
    """Load the files again and roll PROGRAM, or all programs, over to the new code, one agent after the other.

    New code that cannot be loaded, or has other schemas, is refused, and the old code goes on serving. Each new agent
    serves before an old one leaves; what runs ends on the code it began with.
    """

    async def work() -> dict[str, Any]:
        async with options.connect() as caller:
            supervisor = on or await _supervisor_of(caller, program)
            body = {"id": secrets.token_hex(8), "program": program or "", "replace": replace}
            return await caller.control(supervisor, "reload", body, actor=getpass.getuser(), timeout=RELOAD)

    answer = options.run(work())
    if options.json:
        print_json(answer)
        return
    for it in answer["programs"]:
        code = f"code {it['code']}" + (f", was {it['was']}" if it["was"] else "")
        click.echo(f"{it['program']} serves with {code} ({_agents(it['agents'])})")


@click.command(short_help="Have an agent, or all of a supervisor, end when its tasks have.")
@click.argument("name")
@common
def drain(options: Options, name: str) -> None:
    """Have the agent NAME take no more tasks and end when those it has have ended; its program has one agent less then.

    With the name of a supervisor all of its agents do, and what else it runs goes on: a server, the archive.
    """
    _tell(options, name, "drain", "takes no more tasks, and ends when those it has have ended")


@click.command(short_help="End an agent, or a whole `dspex up`.")
@click.argument("name")
@common
def stop(options: Options, name: str) -> None:
    """End the agent NAME: its tasks have a few seconds, what is left is done by others. Its program has one agent less.

    With the name of a supervisor its `dspex up` ends in order, as with Ctrl-C.
    """
    _tell(options, name, "stop", "ends")


@click.command(short_help="Replace an agent by a new process.")
@click.argument("name")
@common
def restart(options: Options, name: str) -> None:
    """Replace the agent NAME: a new process serves first, then it takes no more tasks and ends."""
    _tell(options, name, "restart", "is being replaced")


def _tell(options: Options, name: str, verb: str, what: str) -> None:
    async def work() -> dict[str, Any]:
        async with options.connect() as caller:
            return await caller.control(name, verb, {}, actor=getpass.getuser())

    answer = options.run(work())
    if options.json:
        print_json(answer)
    elif is_terminal():
        click.echo(f"{clean(name)} {what}")


async def _supervisor_of(caller: Caller, program: str | None) -> str:
    """The one supervisor that serves the program, or the only one there is. Raises NotFound, InvalidInput."""
    from dspex.core.errors import InvalidInput, NotFound

    fleet = await caller.fleet()
    found = sorted({it["supervisor"] for it in fleet if program in (None, it["program"])})
    if len(found) == 1:
        return str(found[0])
    if not found:
        have = ", ".join(sorted({it["program"] for it in fleet})) or "nothing"
        raise NotFound(f"no supervisor serves {clean(program or 'anything')[:80]}; what is served is {have}")
    raise InvalidInput(f"{program or 'more than one program'} is served under {', '.join(found)}: say which with --on")


def _show_fleet(fleet: list[dict[str, Any]]) -> None:
    if not fleet:
        click.echo("dspex: no supervisor runs here that says what it serves; `dspex ps` shows what runs", err=True)
        return
    columns = ["program", "supervisor", "agents", "serving", "code", "why"]
    rows = []
    for it in fleet:
        bounds = f" of {it['least']}..{it['most']}" if it["least"] < it["most"] else ""
        why = ", ".join(part for part in (it["by"], it["why"]) if part)
        rows.append([it["program"], it["supervisor"], f"{it['agents']}{bounds}", it["serving"], it["code"], why])
    print_table(columns, rows, right={"serving"})


def _agents(number: int) -> str:
    return f"{number} agent{'' if number == 1 else 's'}"
