"""Dead letters from Python: find them, submit one again, drop one."""

from __future__ import annotations

import getpass
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from dspex.compose.caller import Caller
from dspex.compose.find import Finder
from dspex.compose.replays import opened, wait_for
from dspex.compose.story import BusSource
from dspex.core.find import TaskQuery, TaskRow

__all__ = ["adead_letters", "adrop_task", "aretry_task", "dead_letters", "drop_task", "letter_query", "retry_task"]


def letter_query(
    program: str = "", *, since: str = "", failed: bool = False, dropped: bool = False
) -> TaskQuery:
    """The question for dead letters."""
    return TaskQuery(program=program, since=since, letters="failed" if failed else "dead", dropped=dropped)


def dead_letters(
    program: str = "", *, since: str = "", failed: bool = False, dropped: bool = False, limit: int = 50,
    log: str | Path | None = None, url: str | None = None,
) -> list[TaskRow]:  # fmt: skip
    """The tasks that were set aside, in the order in which they came: the newest `limit`, 0 being all; with `failed`
    also those whose retries are used up, with `dropped` also those that were dropped.

    `since` is when they ended, RFC 3339 in UTC. `log` is an archive, an export or another SQLite log; otherwise a
    running system is asked. Raises InvalidInput, LogError, ConnectionFailed, Unavailable.
    """
    return wait_for(
        adead_letters(program, since=since, failed=failed, dropped=dropped, limit=limit, log=log, url=url)
    )


async def adead_letters(
    program: str = "", *, since: str = "", failed: bool = False, dropped: bool = False, limit: int = 50,
    log: str | Path | None = None, url: str | None = None,
) -> list[TaskRow]:  # fmt: skip
    """Like `dead_letters`, to be awaited."""
    query = letter_query(program, since=since, failed=failed, dropped=dropped)
    async with opened(log, url) as source, Finder(source) as finder:
        return [row async for row in finder.rows(query, limit)]


def retry_task(
    task: str | int, *, clean: bool = False, values: Mapping[str, Any] | None = None, url: str | None = None
) -> str:
    """Submit a task that ended without an output again, and give the new one's id; asking for the same retry twice is
    one task. It goes on with what was recorded, unless `clean`; `values` sets variables by path, and fields of the
    input as `"input.<field>"`. The results of the old one are from then on those of the new.

    Raises NotFound, Conflict for a task that is under way or has its output, InvalidInput, Unavailable.
    """
    return wait_for(aretry_task(task, clean=clean, values=values, url=url))


async def aretry_task(
    task: str | int, *, clean: bool = False, values: Mapping[str, Any] | None = None, url: str | None = None
) -> str:
    """Like `retry_task`, to be awaited."""
    async with _caller(url) as caller:
        found = await caller.retry(str(task), clean=clean, values=values, actor=getpass.getuser())
    return str(found["retried"])


def drop_task(task: str | int, why: str, *, url: str | None = None) -> None:
    """Have nothing more done about a task that ended without an output: it is no dead letter any more. Raises NotFound,
    Conflict, InvalidInput without a `why`, Unavailable."""
    wait_for(adrop_task(task, why, url=url))


async def adrop_task(task: str | int, why: str, *, url: str | None = None) -> None:
    """Like `drop_task`, to be awaited."""
    async with _caller(url) as caller:
        await caller.drop(str(task), why, actor=getpass.getuser())


@asynccontextmanager
async def _caller(url: str | None) -> AsyncIterator[Caller]:
    async with opened(None, url) as source:
        assert isinstance(source, BusSource), "no file was given"
        yield source.caller
