"""The one portable reader of the log: `dspex.log.read`, `tail` and `head`, the same on every backend.

A request's body is JSON, all of it optional: `after` (a position, default 0), `limit` (1 to 1,000, default 100), and
one of `task` (an id), `aggregate` or `program`. The answer is `{"epoch", "events", "next", "head"}`: CloudEvents, each
with its `position`; ask again with `after` = `next` until `next` is `head`. `tail` waits for something new, up to
`Dspex-Wait`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from dspex.agents.vault import submission_of
from dspex.bus.client import Client
from dspex.bus.service import Endpoint, Request, Service
from dspex.core import headers as h
from dspex.core.codec import NOT_JSON, decode_commit, encode_event, events_of, rfc3339
from dspex.core.errors import ConnectionFailed, InvalidInput, LogCorrupt, NotFound
from dspex.core.events import Event, OutcomeReported, SignalSent, TaskSubmitted, UnknownEvent
from dspex.core.ports import Entry, Log
from dspex.core.subjects import Subjects, aggregate, parse_aggregate, valid_token

__all__ = ["Reader"]

MAX_REPLY = 768 << 10
ENVELOPE = 64 << 10
"""Bytes kept free beside the events of a reply."""
MAX_OUTCOMES = 10_000
MENTIONS_WAIT = 0.5
"""Seconds that the archivist has to say where a task is named; then the log is looked through."""
SOON, POLL = 0.005, 2.0
"""Seconds until a tail looks again: after a hint, which comes before the log has what it announces, and without one."""


class _Query(msgspec.Struct, forbid_unknown_fields=True):
    after: int = 0
    limit: int = 100
    task: int | str | None = None
    aggregate: str | None = None
    program: str | None = None


class _Mentions(msgspec.Struct):
    positions: list[int]
    position: int


class Reader:
    """Answers the log's doors."""

    def __init__(
        self, client: Client, log: Log, subjects: Subjects, service: Service, kind: str = "jetstream"
    ) -> None:
        self._client, self._log, self._subjects, self._kind = client, log, subjects, kind
        for verb, handler in (("read", self.read), ("tail", self.tail), ("head", self.head)):
            service.serve(Endpoint(f"log-{verb}", subjects.log(verb), handler))

    async def head(self, request: Request) -> None:
        said = {"epoch": self._log.epoch, "head": await self._log.head(), "log": self._kind}
        request.respond(msgspec.json.encode(said))

    async def read(self, request: Request) -> None:
        request.respond(await self._page(_query(request.data)))

    async def tail(self, request: Request) -> None:
        query = _query(request.data)
        loop = asyncio.get_running_loop()
        until = loop.time() + h.wait_of(request.headers)
        changed = asyncio.Event()
        hint = self._client.subscribe(f"{self._subjects.prefix}.*.>", lambda _: changed.set())
        pause = POLL
        try:
            while True:
                changed.clear()
                page = await self._page(query, empty=loop.time() >= until)
                if page:
                    request.respond(page)
                    return
                try:
                    await asyncio.wait_for(changed.wait(), min(pause, max(until - loop.time(), 0.01)))
                    pause = SOON
                except TimeoutError:
                    pause = min(2 * pause, POLL)
        finally:
            hint.close()

    async def _page(self, query: _Query, *, empty: bool = True) -> bytes:
        """One answer; b"" when there is nothing and `empty` is false."""
        head = await self._log.head()
        entries, complete = await self._entries(query)
        events: list[Any] = []
        size, last = 0, query.after
        for entry in entries:
            page = self._shown(entry)
            size += sum(len(event) for event in page)
            if events and size > MAX_REPLY:
                complete = False
                break
            events += page
            last = entry.position
        if not events and not empty:
            return b""
        body = {
            "epoch": self._log.epoch, "events": events, "next": max(last, head) if complete else last, "head": head,
        }  # fmt: skip
        return msgspec.json.encode(body)

    def _shown(self, entry: Entry) -> list[msgspec.Raw]:
        """An entry's events as JSON, each with its position. One that cannot be shown is said to be there."""
        try:
            events = events_of(entry, self._subjects)
        except LogCorrupt as error:
            events = [_unreadable(entry, error)]
        shown = [_with_position(entry, event) for event in events]
        if sum(map(len, shown)) > self._client.max_payload - ENVELOPE:
            shown = [_with_position(entry, _without_body(event)) for event in events]
        return shown

    async def _entries(self, query: _Query) -> tuple[list[Entry], bool]:
        """The entries of one page, and whether there are no more now."""
        if query.task is not None:
            entries = [entry for entry in await self._of_task(str(query.task)) if entry.position > query.after]
        elif query.aggregate is not None:
            try:
                parse_aggregate(query.aggregate)
            except ValueError as error:
                raise InvalidInput(f"{error}") from None
            entries = [entry for entry in await self._log.read(query.aggregate) if entry.position > query.after]
        elif query.program is not None:
            return await self._of_program(query)
        else:
            entries = await self._log.scan(query.after, query.limit)
            return entries, len(entries) < query.limit
        return entries[: query.limit], len(entries) <= query.limit

    async def _of_task(self, task: str) -> list[Entry]:
        """A task's whole story: its submission, its commits, its outcomes."""
        submission = await self._log.entry(int(task)) if task.isdecimal() and len(task) < 19 else None
        if submission is None and task.isdecimal() and len(task) < 19:
            submission = await kept_submission(self._log, self._subjects, task)
        door = self._subjects.door_of(submission.subject) if submission else None
        if submission is None or door is None or door[0] != "task":
            if submission is None and task.isdecimal() and len(task) < 19 and 0 < int(task) <= await self._log.head():
                where = "if it was a task it is in the archive (archive.db)"
                raise NotFound(f"the log has no entry {task} any more; {where}")
            raise NotFound(f"the log has no task {task[:40]}")
        program = door[1]
        commits = await self._log.read(aggregate("task", program, task))
        beside = [each for kind in ("privacy", "dlq") for each in await self._log.read(aggregate(kind, program, task))]
        story = [submission, *commits, *beside]
        named, known = await self._mentions(program, int(task))
        story += [entry for position in named if (entry := await self._log.entry(position)) is not None]
        for kind in ("outcome", "signal"):
            for subject in self._subjects.filters(kind, program):
                after = known
                while len(found := await self._log.scan(after, 1000, subject)) > 0:
                    story += [entry for entry in found if _names(entry.body, task)]
                    after = found[-1].position
                    if len(found) < 1000 or len(story) > MAX_OUTCOMES:
                        break
        return sorted(story, key=lambda entry: entry.position)

    async def _mentions(self, program: str, task: int) -> tuple[list[int], int]:
        """Where the outcomes and signals stand that name a task, and up to where the archivist knows that; nowhere and
        0 when it does not say, and then the log is looked through."""
        wanted = msgspec.json.encode({"program": program, "task": task})
        try:
            reply = await self._client.request(self._subjects.archive("mentions"), wanted, timeout=MENTIONS_WAIT)
            if reply.status or reply.headers.get(h.ERROR_CODE):
                return [], 0
            found = msgspec.json.decode(reply.data, type=_Mentions)
        except (TimeoutError, ConnectionFailed, *NOT_JSON):
            return [], 0
        return found.positions, found.position

    async def _of_program(self, query: _Query) -> tuple[list[Entry], bool]:
        assert query.program is not None
        if not valid_token(query.program):
            raise InvalidInput(f"{query.program[:40]!r} is no program's name")
        pages: list[Entry] = []
        more = False
        filters = [f"{self._subjects.prefix}.event.*.{query.program}.*", *self._subjects.doors(query.program)]
        for subject in filters:
            found = await self._log.scan(query.after, query.limit, subject)
            more = more or len(found) == query.limit
            pages += found
        pages.sort(key=lambda entry: entry.position)
        return pages[: query.limit], not more and len(pages) <= query.limit


async def kept_submission(log: Log, subjects: Subjects, task: str, program: str = "*") -> Entry | None:
    """The submission of a task whose message was erased, because its input is private and had come in the open."""
    after, subject = 0, subjects.event(f"task.{program}.{task}")
    while found := await log.scan(after, 100, subject):
        for entry in found:
            kept = submission_of(task, decode_commit(entry.body, entry.position), subjects)
            if kept is not None:
                return kept
        after = found[-1].position
    return None


def _query(body: bytes) -> _Query:
    try:
        query = msgspec.json.decode(body or b"{}", type=_Query)
    except NOT_JSON as error:
        raise InvalidInput(f"the query is not understood: {error}") from None
    if query.after < 0 or not 1 <= query.limit <= 1000:
        raise InvalidInput(f"after {query.after} and limit {query.limit}: after is 0 or more, limit 1 to 1,000")
    return query


def _names(body: bytes, task: str) -> bool:
    try:
        named = msgspec.json.decode(body).get("task")
    except (*NOT_JSON, AttributeError):
        return False
    return str(named) == task


def _unreadable(entry: Entry, error: LogCorrupt) -> Event:
    """What stands for an entry that nobody of ours has written."""
    said = msgspec.json.encode({"subject": entry.subject, "message": str(error)[:500], "bytes": len(entry.body)})
    return Event(
        aggregate="", version=0, time=rfc3339(entry.time), source="unknown", correlation=str(entry.position),
        causation=str(entry.position), data=UnknownEvent(type="Unreadable", data=msgspec.Raw(said)),
        position=entry.position,
    )  # fmt: skip


def _without_body(event: Event) -> Event:
    """A door's message that is nearly as large as a message may be: its body does not fit into a reply."""
    null = msgspec.Raw(b"null")
    match event.data:
        case TaskSubmitted() as data:
            return msgspec.structs.replace(event, data=msgspec.structs.replace(data, input=null))
        case OutcomeReported() as data:
            return msgspec.structs.replace(event, data=msgspec.structs.replace(data, outcome=null))
        case SignalSent() as data:
            return msgspec.structs.replace(event, data=msgspec.structs.replace(data, signal=null))
        case _:
            return event


def _with_position(entry: Entry, event: Event) -> msgspec.Raw:
    """A CloudEvent with its position, as JSON."""
    body = encode_event(event)
    return msgspec.Raw(b'{"position":%d,%b' % (entry.position, body[1:]))
