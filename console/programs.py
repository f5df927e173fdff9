"""Which programs there are: to complete a name that is being typed, and to tell a misspelt one."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import click

from dspex.console.options import Options
from dspex.console.render import clean

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from dspex.compose.caller import Caller
    from dspex.compose.story import Source
    from dspex.core.errors import NotFound

__all__ = ["check_program", "known", "program_names"]

T = TypeVar("T")


async def known(caller: Caller, program: str, call: Coroutine[Any, Any, T]) -> T:
    """The answer of a program's door; a misspelt program is told from one that no agent serves now."""
    from dspex.core.errors import InvalidInput, NotFound, Unavailable

    try:
        return await call
    except ValueError as error:  # the client's own limit, before anything was sent
        raise InvalidInput(str(error)) from None
    except (NotFound, Unavailable) as error:
        if "nobody serves" not in error.message and "no program" not in error.message:
            raise
        programs = await caller.programs()
        if program in programs:
            raise Unavailable(f"no agent serves {program} now; `dspex ps` shows what runs") from None
        raise _unknown(program, programs) from None


async def check_program(source: Source, program: str | None) -> None:
    """Raise NotFound for a program that the log has never heard of: an empty answer would hide a misspelling."""
    from dspex.compose.story import BusSource
    from dspex.core.errors import Unavailable
    from dspex.core.subjects import valid_token

    if program is None:
        return
    if valid_token(program):
        try:
            async for _ in source.events(aggregate=f"program.{program}.0"):
                return
        except Unavailable:  # a client of a system with access rules does not read the log: the door itself tells
            return
    if isinstance(source, BusSource):
        raise _unknown(program, await source.caller.programs())
    registered = {str(e["aggregate"]).split(".")[1] async for e in source.events() if e["type"] == "ProgramRegistered"}
    raise _unknown(program, sorted(registered))


def _unknown(program: str, programs: list[str]) -> NotFound:
    from dspex.core.errors import NotFound

    known = f"those known are {', '.join(programs)}" if programs else "`dspex up FILE` runs one"
    return NotFound(f"there is no program {clean(program)[:80]}; {known}")


def program_names(ctx: click.Context, _: click.Parameter, typed: str) -> list[CompletionItem]:
    """For shell completion: the programs that run, as far as they can be found quickly."""
    from click.shell_completion import CompletionItem

    options = Options(nats=ctx.params.get("nats"), data=ctx.params.get("data"), prefix=ctx.params.get("prefix"))

    async def find() -> set[str]:
        async with options.connect(wait=0.2) as caller:
            return set(await caller.programs())

    try:
        names = asyncio.run(find())
    except Exception:  # a shell that completes must not see errors
        return []
    return [CompletionItem(name) for name in sorted(names) if name.startswith(typed)]
