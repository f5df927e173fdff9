"""The doors through which agents read a log that they cannot reach: `dspex.log.rows` of a log process, and under access
rules `dspex.rows.<program>`, which shows what is of that program and nothing else."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec

from dspex.bus.service import Endpoint, Request, Service
from dspex.core.codec import NOT_JSON
from dspex.core.errors import LogError
from dspex.core.ports import Entry, Log
from dspex.core.subjects import Subjects
from dspex.store.api import Problem
from dspex.store.served import ENVELOPE, Page, Wanted

__all__ = ["Rows"]

MAX_PAGE = 4 << 20
"""Bytes of bodies in one answer, unless one row alone is more."""
ROW = 160
"""Bytes that a row takes beside its body and headers, about."""
MAX_QUESTION = 4096
_encode = msgspec.msgpack.Encoder().encode
_decode_wanted = msgspec.json.Decoder(Wanted).decode


class Rows:
    """Answers with rows as they are; `room` is the most bytes that an answer may have, `erase` takes a message out of
    the log, where that can be."""

    def __init__(
        self, log: Log, subjects: Subjects, service: Service, room: int,
        erase: Callable[[int], Awaitable[None]] | None = None,
    ) -> None:  # fmt: skip
        self._log, self._subjects, self._room = log, subjects, min(MAX_PAGE, room - ENVELOPE)
        self._erase = erase
        if subjects.tenants:
            service.serve(Endpoint("rows", subjects.rows("*"), self.rows))
        else:
            service.serve(Endpoint("log-rows", subjects.log("rows"), self.rows))

    async def rows(self, request: Request) -> None:
        # Who may send to the door of which program is the server's to say; whose door it was is all there is to know.
        program = request.message.subject.rpartition(".")[2] if self._subjects.tenants else None
        try:
            if len(request.data) > MAX_QUESTION:
                raise ValueError(f"a question has {len(request.data):,} bytes, and {MAX_QUESTION:,} at most")
            page = await self._page(_decode_wanted(request.data), program)
        except LogError as error:  # it may be better in a moment
            page = Page(epoch=self._log.epoch, error=Problem(code=503, description=str(error)))
        except (*NOT_JSON, msgspec.ValidationError, ValueError) as error:
            page = Page(epoch=self._log.epoch, error=Problem(code=400, description=str(error)))
        request.respond(_encode(page))

    async def _page(self, wanted: Wanted, program: str | None) -> Page:
        log = self._log
        if wanted.erase is not None:
            return await self._erased(wanted.erase, program)
        if wanted.position is not None:
            found = await log.entry(wanted.position)
            if found and program is not None and self._subjects.program_of(found.subject) != program:
                found = Entry(position=found.position, time=0.0, subject="", body=b"", headers={})  # it is not for them
            return Page(epoch=log.epoch, rows=[found] if found else [])
        if wanted.last is not None:
            self._check(self._subjects.event(wanted.last), program)
            found = await log.last(wanted.last)
            return Page(epoch=log.epoch, rows=[found] if found else [])
        if wanted.aggregate is not None:
            self._check(self._subjects.event(wanted.aggregate), program)
            rows = [row for row in await log.read(wanted.aggregate) if row.position > wanted.after]
            fits = _fitting(rows, self._room)
            return Page(epoch=log.epoch, rows=rows[:fits], more=fits < len(rows))
        if wanted.limit <= 0:
            return Page(epoch=log.epoch, head=await log.head())
        self._check(wanted.subject or ">", program)
        rows = await log.scan(wanted.after, min(wanted.limit, 1000), wanted.subject)
        fits = _fitting(rows, self._room)
        return Page(epoch=log.epoch, rows=rows[:fits], more=fits < len(rows) or len(rows) == 1000)

    async def _erased(self, position: int, program: str | None) -> Page:
        """Take a submission or a signal to a private program out, which came in the open: its events have it sealed."""
        found = await self._log.entry(position)
        if found is not None:
            door = self._subjects.door_of(found.subject)
            if self._erase is None or door not in (("task", program), ("signal", program)):
                raise ValueError(f"position {position} is not for an agent of {program} to erase")
            await self._erase(position)
        return Page(epoch=self._log.epoch)

    def _check(self, subject: str, program: str | None) -> None:
        if program is not None and self._subjects.program_of(subject) != program:
            raise ValueError(f"an agent of {program} reads what is of {program}, and {subject[:200]} is not")


def _fitting(rows: list[Entry], room: int) -> int:
    """How many of the first rows fit; one at least."""
    size = 0
    for number, row in enumerate(rows):
        size += len(row.body) + ROW + sum(len(name) + len(value.encode()) for name, value in row.headers.items())
        if size > room and number:
            return number
    return len(rows)
