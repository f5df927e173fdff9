"""limits: how fast, how much at once and how much in all programs may work; what of it is used; changing it."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from typing import Any

import click

from dspex.console.options import Options, common
from dspex.console.programs import program_names
from dspex.console.render import dim, green, is_terminal, print_json, print_table

__all__ = ["limits"]

_VERBS = ["ls", "set", "clear"]


@click.command(short_help="Show, set or clear limits and budgets.")
@click.argument("verb", type=click.Choice(_VERBS), default="ls")
@click.argument("scope", required=False, shell_complete=program_names)
@click.argument("pairs", nargs=-1, metavar="[LIMIT=VALUE]...")
@click.option("--why", default="", metavar="TEXT", help="What the change is for; it is kept in the log.")
@common
def limits(options: Options, verb: str, scope: str | None, pairs: tuple[str, ...], why: str) -> None:
    """Show all limits and how much of each is used, or change those of one SCOPE.

    \b
    dspex limits set qabot rate=20/s concurrency=8 usd=5/day
    dspex limits set model:small tokens=100000/hour when_exhausted=wait
    dspex limits set qabot usd=none        takes one limit away
    dspex limits clear qabot               takes all of them away

    SCOPE is a program, or agent:NAME, tenant:NAME, study:NAME, model:NAME. A change is in force on all agents within
    about a second. Days and hours are of UTC.
    """
    if (verb == "ls") != (scope is None) or bool(pairs) != (verb == "set"):
        raise click.UsageError("limits ls, limits set SCOPE LIMIT=VALUE…, or limits clear SCOPE")

    async def work() -> list[dict[str, Any]]:
        async with options.connect() as caller:
            if verb == "ls":
                rows: list[dict[str, Any]] = (await caller.limits())["limits"]
                return rows
            more = {"limits": _texts(pairs)} if verb == "set" else {}
            return [await caller.limits(verb, who=getpass.getuser(), scope=scope, why=why, **more)]

    rows = options.run(work())
    if options.json:
        for row in rows:
            print_json(row)
        return
    if verb == "clear":
        click.echo(f"{scope} {green('has no limits')}")
    elif not rows:
        click.echo(dim("nothing has a limit; e.g. dspex limits set qabot rate=20/s concurrency=8 usd=5/day"), err=True)
    else:
        _show(rows)


def _texts(pairs: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not (name and sign and value):
            raise click.UsageError(f"{pair}: a limit and its value are due, e.g. rate=20/s")
        found[name] = value
    return found


def _show(rows: list[dict[str, Any]]) -> None:
    shown: list[list[str]] = []
    for row in rows:
        scope = row["scope"]
        for name, text in row["limits"].items():
            if name == "when_exhausted":
                continue
            stands = row["used"][name]
            shown.append([scope, f"{name} {text}", *_stand(stands), _renews(stands["renews"])])
            scope = ""
        if row["limits"].get("when_exhausted"):
            shown.append(["", "tasks wait", "", "until it renews", ""])
    print_table(["scope", "limit", "used", "", "renews"], shown, right={"used"})


def _stand(stands: dict[str, Any]) -> tuple[str, str]:
    """How much is used, and a bar of it."""
    from dspex.core.limits import bar

    used, of = stands["used"], stands["of"]
    percent = 100 * used / of if of else 100
    shown = f"{bar(used, of, 12)} {percent:.0f} %" if is_terminal() else f"{percent:.0f} %"
    return f"{used:.6g}", shown


def _renews(when: float | None) -> str:
    """In how long a budget renews."""
    if when is None:
        return ""
    left = max(0.0, when - datetime.now(UTC).timestamp())
    if left < 120:
        return f"in {left:.0f} s"
    for seconds, name, most in ((60, "min", 7200), (3600, "h", 172_800)):
        if left < most:
            return f"in {left / seconds:.0f} {name}"
    return f"in {left / 86_400:.0f} days"
