"""cost: what the effects of programs have cost, summed up from the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dspex.console.options import Options, common
from dspex.console.programs import check_program, program_names
from dspex.console.render import dim, print_json, print_table
from dspex.console.sources import log_option, opened

if TYPE_CHECKING:
    from dspex.core.costs import CostQuery, Costs

__all__ = ["cost"]

_KINDS = ["program", "model", "day", "task"]


@click.command(short_help="Show what the effects of programs have cost.")
@click.argument("program", required=False, shell_complete=program_names)
@click.option("--task", metavar="TASK", help="Of one task.")
@click.option(
    "--by", type=click.Choice(_KINDS), multiple=True,
    help="A row for each program, model, day (UTC) or task; may be given more than once (default: program and model).",
)  # fmt: skip
@log_option
@common
def cost(options: Options, program: str | None, task: str | None, by: tuple[str, ...], log: str | None) -> None:
    """Show what effects have cost: calls, tokens and dollars, as they reported them.

    Each number is the sum of what stands in the log. A running system sums it up in its archive, a file (--log) is
    read by itself.
    """
    from dspex.core.costs import CostQuery

    query = CostQuery(program=program or "", task=task or "", by=list(by) or ["program", "model"])
    found = options.run(_find(options, query, log))
    if options.json:
        for row in found.rows:
            shown = {name: getattr(row, name) for name in query.by}
            print_json({**shown, "calls": row.calls, "tokens": row.tokens, "usd": row.usd})
        return
    if not found.rows:
        nothing = "nothing in the log has cost anything; `@effect(usd=…)` and `dspex.spend` say what does"
        click.echo(dim(nothing), err=True)
        return
    rows = [
        [*(getattr(row, name) or "—" for name in query.by), f"{row.calls:,}", f"{row.tokens:,}", f"{row.usd:,.4f}"]
        for row in found.rows
    ]
    if len(rows) > 1:
        sums = [sum(row.calls for row in found.rows), sum(row.tokens for row in found.rows)]
        usd = sum(row.usd for row in found.rows)
        rows.append(["all", *[""] * (len(query.by) - 1), *(f"{each:,}" for each in sums), f"{usd:,.4f}"])
    print_table([*query.by, "calls", "tokens", "usd"], rows, right={"task", "calls", "tokens", "usd"})
    if found.more:
        click.echo("dspex: there are more rows; ask for one program or task", err=True)


async def _find(options: Options, query: CostQuery, log: str | None) -> Costs:
    from dspex.compose.costs import costs

    async with opened(options, log) as source:
        await check_program(source, query.program or None)
        return await costs(source, query)
