"""Replay and comparison from Python, in a script, a test or a notebook: what `dspex replay` and `dspex diff` do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

from dspex.compose.caller import Caller
from dspex.compose.settings import find_credentials, find_server, load_settings
from dspex.compose.story import BusSource, FileSource, Source, Story, instance_of, stories, story_of
from dspex.core.compare import Row, compare
from dspex.core.errors import InvalidInput
from dspex.core.events import Event
from dspex.core.program import Program
from dspex.core.replay import Report, replay
from dspex.core.task import TaskState, fold

__all__ = ["Replay", "adiff", "diff", "opened", "wait_for"]

T = TypeVar("T")


class Replay:
    """A recorded task and the program to run on its record. Nothing is performed and nothing is written.

    `Replay.of("42", QABot, log="tasks.db").report.same`; from a running system with `url=`, or with neither from the
    one whose data folder is here. In `async` code: `await Replay.aof(…)`, `await replay.areport()`.
    """

    def __init__(self, story: Story, program: type[Program], values: dict[str, Any] | None = None) -> None:
        self._story, self._program, self._values = story, program, values
        self._report: Report | None = None

    @classmethod
    def of(
        cls, task: str | int, program: type[Program], *, log: str | Path | None = None, url: str | None = None,
        values: dict[str, Any] | None = None,
    ) -> Self:  # fmt: skip
        """A task, read from a file or from a running system; `values` set variables on top of those it ran on.

        Raises NotFound, LogError, ConnectionFailed, and InvalidInput when it is a task of another program."""
        return wait_for(cls.aof(task, program, log=log, url=url, values=values))

    @classmethod
    async def aof(
        cls, task: str | int, program: type[Program], *, log: str | Path | None = None, url: str | None = None,
        values: dict[str, Any] | None = None,
    ) -> Self:  # fmt: skip
        """Like `of`, to be awaited."""
        async with opened(log, url) as source:
            story = await story_of(source, str(task))
        if story.program != program.name:
            raise InvalidInput(f"task {task} is one of {story.program}, and {program.__name__} is {program.name}")
        return cls(story, program, values)

    @classmethod
    def every(cls, program: type[Program], *, log: str | Path | None = None, url: str | None = None) -> list[Self]:
        """Every recorded task of a program, oldest first."""
        return wait_for(cls.aevery(program, log=log, url=url))

    @classmethod
    async def aevery(
        cls, program: type[Program], *, log: str | Path | None = None, url: str | None = None
    ) -> list[Self]:
        """Like `every`, to be awaited."""
        async with opened(log, url) as source:
            return [cls(story, program) for story in await stories(source, program.name)]

    @property
    def task(self) -> str:
        """The task's id."""
        return self._story.task

    @property
    def events(self) -> list[Event]:
        """The task's events, in order; the submission has version 0."""
        return list(self._story.events)

    @property
    def report(self) -> Report:
        """What running it again found; it is run once, when this is first asked for."""
        return wait_for(self.areport())

    async def areport(self) -> Report:
        """Like `report`, to be awaited."""
        if self._report is None:
            instance = instance_of(self._program, self._story, self._values)
            if self._story.missing:
                self._report = Report(self.task, None, 0, 0, why=self._story.missing)
            elif instance is None:
                why = f"it ran on values {self._story.state.assignment[:8]}, which are not known here; give `values`"
                self._report = Report(self.task, None, 0, 0, why=why)
            else:
                self._report = await replay(instance, self._story.events, self.task)
        return self._report

    @property
    def state(self) -> TaskState:
        """Where the task stands after its last event."""
        return self._story.state

    def state_at(self, version: int) -> TaskState:
        """Where it stood at a version. Raises InvalidInput for one that it does not have."""
        return fold(self._story.at(version))

    def __repr__(self) -> str:
        found = "" if self._report is None else f", same={self._report.same}"
        return f"Replay({self.task} of {self._story.program}, {self.state.status}{found})"


def diff(
    a: str | int, b: str | int, *, log: str | Path | None = None, url: str | None = None, everything: bool = False
) -> list[Row]:
    """Two tasks event by event, `"42"` and `"43"`, or two versions of one, `"42@3"` and `"42@7"`; `row.same` and
    `row.changes` say where they differ. Ids, times and attempts are left out, unless `everything`."""
    return wait_for(adiff(a, b, log=log, url=url, everything=everything))


async def adiff(
    a: str | int, b: str | int, *, log: str | Path | None = None, url: str | None = None, everything: bool = False
) -> list[Row]:
    """Like `diff`, to be awaited."""
    async with opened(log, url) as source:
        return compare(await _side(source, str(a)), await _side(source, str(b)), everything=everything)


async def _side(source: Source, text: str) -> list[Event]:
    task, _, version = text.partition("@")
    story = await story_of(source, task)
    if not version:
        return story.events
    if not version.isdecimal():
        raise InvalidInput(f"{text!r} is no version of a task; write id@version, e.g. 42@3")
    return story.at(int(version))


@asynccontextmanager
async def opened(log: str | Path | None, url: str | None) -> AsyncIterator[Source]:
    """The log that is meant: a file, the system at `url`, or with neither the one whose data folder is here."""
    if log is not None:
        source: Source = await FileSource.open(log, master=load_settings({}).privacy.key)
    else:
        settings = load_settings({"nats": url})
        server, prefix = find_server(settings)
        caller = await Caller.connect(server, prefix=prefix, credentials=find_credentials(settings))
        source = BusSource(caller, settings.privacy.key)
    try:
        yield source
    finally:
        await source.close()


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run it to its end; in a thread where a loop runs already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    found: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            found.append(asyncio.run(work))
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="dspex-replay")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return found[0]
