"""The options that every command shares, and what they lead to: settings, and a connection."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from dspex.compose.caller import Caller
    from dspex.compose.settings import Settings

__all__ = ["Options", "common"]

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What the shared flags said; None where they said nothing."""

    json: bool = False
    debug: bool = False
    nats: str | None = None
    data: str | None = None
    prefix: str | None = None

    def settings(self, file: Path | None = None, **more: object) -> Settings:
        """The settings in force, `more` being flags of the command's own. Raises ConfigurationError."""
        from dspex.compose.settings import load_settings

        return load_settings({"nats": self.nats, "data": self.data, "prefix": self.prefix, **more}, file=file)

    @asynccontextmanager
    async def connect(self, wait: float = 2.0) -> AsyncIterator[Caller]:
        """A caller on the system that is meant. Raises ConnectionFailed."""
        from dspex.compose.caller import Caller
        from dspex.compose.settings import PLACE, find_credentials, find_server
        from dspex.core.errors import ConnectionFailed

        settings = self.settings()
        url, prefix = find_server(settings)
        try:
            caller = await Caller.connect(url, prefix=prefix, wait=wait, credentials=find_credentials(settings))
        except ConnectionFailed as error:
            if settings.nats or (settings.data / PLACE).exists():
                raise
            raise ConnectionFailed(f"no system runs in {settings.data}, and {error}") from None
        try:
            yield caller
        finally:
            await caller.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a command's asynchronous part."""
        import logging

        level = logging.DEBUG if self.debug else logging.WARNING
        logging.basicConfig(format="dspex: %(message)s", level=level)
        logging.getLogger("nats").setLevel(logging.CRITICAL)
        logging.getLogger("asyncio").setLevel(logging.WARNING)
        return asyncio.run(work)


def common(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command the shared flags; it is called with `options` and its own."""

    @click.option("--json", "json_", is_flag=True, help="Print JSON: one object, or one per line.")
    @click.option("--nats", metavar="URL", help="The NATS server or servers to use.")
    @click.option("--data", metavar="DIR", type=click.Path(), help="The data folder (default: .dspex).")
    @click.option("--prefix", metavar="NAME", help="The first word of every subject (default: dspex).")
    @click.option("--debug", is_flag=True, help="Show tracebacks and what happens inside.")
    @functools.wraps(command)
    def wrapped(*, json_: bool, nats: str | None, data: str | None, prefix: str | None, debug: bool, **own: Any) -> T:
        return command(options=Options(json_, debug, nats, data, prefix), **own)

    return wrapped
