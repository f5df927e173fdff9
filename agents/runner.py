"""A program run once for one attempt: in the loop or in a thread, up to the bytes of its output."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

from dspex.agents.failures import program_failed
from dspex.agents.recorder import Suspended
from dspex.agents.run import Run
from dspex.core.effects import Diverged, begin
from dspex.core.errors import ProgramFailed, TaskError
from dspex.core.program import Program

__all__ = ["Runner"]

logger = logging.getLogger("dspex.agents")


class Runner:
    """Runs a program. A plain `predict` has a thread of its own; `limit` is the most bytes that an output may have."""

    def __init__(self, program: Program, limit: int, loop: asyncio.AbstractEventLoop) -> None:
        self.program, self.name, self._limit, self._loop = program, program.name, limit, loop
        self._pool: ThreadPoolExecutor | None = None
        if not program.is_async:
            self._pool = ThreadPoolExecutor(2 * program.slots(), thread_name_prefix=f"{self.name}-predict")

    async def execute(self, run: Run, input: Any) -> bytes:
        """The output of the program. However it ended, a run that was suspended or has lost its log did not end."""
        try:
            body = await self._predict(run, input)
        except BaseException:
            self._check_whole(run)
            raise
        self._check_whole(run)
        return body

    async def _predict(self, run: Run, input: Any) -> bytes:
        program = run.instance or self.program
        begin(run)
        try:
            if self._pool is None:
                value = await program.predict(input)
            else:
                run.thread = self._loop.run_in_executor(self._pool, copy_context().run, _in_thread, program, input)
                value = await asyncio.shield(run.thread)
            output = program.check_output(value)
            body: bytes = output.encode()
        except TaskError:
            run.raised = True
            raise
        except asyncio.CancelledError as error:
            if run.suspended or run.abandoned or asyncio.current_task().cancelling():  # type: ignore[union-attr] # we are in one
                raise
            raise program_failed(self.name, error) from error
        except (Exception, SystemExit, KeyboardInterrupt, GeneratorExit) as error:
            logger.debug("task %s failed", run.id, exc_info=True)
            run.raised = True
            raise program_failed(self.name, error) from error
        if len(body) > self._limit:
            raise ProgramFailed(f"the output of {self.name} has {len(body):,} bytes; {self._limit:,} are allowed")
        return body

    def _check_whole(self, run: Run) -> None:
        if run.abandoned:
            return
        broken = run.recorder.broken if run.recorder else None
        if isinstance(broken, Diverged):
            versions = f", from code {run.begun_by} to {run.seat.code}" if run.begun_by else ""
            message = f"{self.name} has changed while the task was under way{versions}: {broken}"
            run.raised = False
            raise ProgramFailed(message, type="Diverged") from None
        if broken:
            raise broken from None
        if run.suspended:
            while run.task and run.task.uncancel():
                pass
            raise Suspended from None


def _in_thread(program: Program, input: Any) -> Any:
    try:
        return program.predict(input)
    except StopIteration as error:  # no future can hold one
        raise RuntimeError("predict raised StopIteration") from error
