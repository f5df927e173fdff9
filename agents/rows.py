"""The door through which agents read a log that a log process owns: `dspex.log.rows`."""

from __future__ import annotations

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
_encode = msgspec.msgpack.Encoder().encode
_decode_wanted = msgspec.json.Decoder(Wanted).decode


class Rows:
    """Answers with rows as they are; `room` is the most bytes that an answer may have."""

    def __init__(self, log: Log, subjects: Subjects, service: Service, room: int) -> None:
        self._log, self._room = log, min(MAX_PAGE, room - ENVELOPE)
        service.serve(Endpoint("log-rows", subjects.log("rows"), self.rows))

    async def rows(self, request: Request) -> None:
        try:
            page = await self._page(_decode_wanted(request.data))
        except LogError as error:  # it may be better in a moment
            page = Page(epoch=self._log.epoch, error=Problem(code=503, description=str(error)))
        except (*NOT_JSON, msgspec.ValidationError, ValueError) as error:
            page = Page(epoch=self._log.epoch, error=Problem(code=400, description=str(error)))
        request.respond(_encode(page))

    async def _page(self, wanted: Wanted) -> Page:
        log = self._log
        if wanted.position is not None:
            found = await log.entry(wanted.position)
            return Page(epoch=log.epoch, rows=[found] if found else [])
        if wanted.last is not None:
            found = await log.last(wanted.last)
            return Page(epoch=log.epoch, rows=[found] if found else [])
        if wanted.limit <= 0:
            return Page(epoch=log.epoch, head=await log.head())
        rows = await log.scan(wanted.after, min(wanted.limit, 1000), wanted.subject)
        fits = _fitting(rows, self._room)
        return Page(epoch=log.epoch, rows=rows[:fits], more=fits < len(rows) or len(rows) == 1000)


def _fitting(rows: list[Entry], room: int) -> int:
    """How many of the first rows fit; one at least."""
    size = 0
    for number, row in enumerate(rows):
        size += len(row.body) + ROW + sum(len(name) + len(value.encode()) for name, value in row.headers.items())
        if size > room and number:
            return number
    return len(rows)
