"""The books of all budgets: what is lent, settled and told of each limit in each window, as the log has it.

Every loan is in the log before anybody hears of it. One process writes; should there be two, the log refuses one of
them, and it reads again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from dspex.agents import logtime
from dspex.agents.journal import events_for
from dspex.core.codec import decode_commit
from dspex.core.errors import LogError
from dspex.core.events import BudgetLeased, BudgetSettled, Event, Head, LimitReached, Payload
from dspex.core.leases import BudgetState, Ledger, alerts
from dspex.core.leases import budget as budget_fold
from dspex.core.limits import Scope, budget_aggregate, window_of
from dspex.core.ports import Appended, Log

__all__ = ["Book", "Books", "leased", "reached", "settled"]


@dataclass
class Book:
    """A budget in one window, with its place in the log. One writer at a time."""

    scope: Scope
    resource: str
    window: str
    end: float
    name: str
    head: Head
    ledger: Ledger
    waits: bool = False
    """Somebody wants what others have lent and do not use."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Books:
    """All books that are open. `on_reached` hears of alerts, in words."""

    def __init__(self, log: Log, source: str, on_reached: Callable[[str], None]) -> None:
        self._log, self._source, self._on_reached = log, source, on_reached
        self.books: dict[str, Book] = {}
        self._loading: dict[str, asyncio.Lock] = {}

    def at(self, scope: Scope, resource: str, window: str) -> Book | None:
        """A book, if it is open."""
        return self.books.get(budget_aggregate(scope, resource, window))

    async def open(self, scope: Scope, resource: str, window: str) -> Book:
        """A budget in a window, as the log has it."""
        name = budget_aggregate(scope, resource, window)
        if (found := self.books.get(name)) is not None:
            return found
        async with self._loading.setdefault(name, asyncio.Lock()):
            try:
                if name not in self.books:
                    state, head = BudgetState(), Head()
                    for entry in await self._log.read(name):
                        events = decode_commit(entry.body, entry.position)
                        state, head = budget_fold(events, state), Head(events[-1].version, entry.position)
                    end = _end_of(window)
                    self.books[name] = Book(scope, resource, window, end, name, head, Ledger(state))
            finally:
                self._loading.pop(name, None)
        return self.books[name]

    async def write(self, book: Book, payloads: list[Payload], *, of: float = 0.0, refused: bool = False) -> None:
        """Append to a budget of `of`, with the alerts that are due; `refused`: there was not enough left of it. Raises
        LogError."""
        if of:
            used = Ledger(budget_fold(_as_events(payloads), book.ledger.state), book.ledger.spent).used
            payloads = [*payloads, *reached(book, used, of, all_of_it=refused)]
        if not payloads:
            return
        events = events_for(book.name, book.head, payloads, source=self._source)
        try:
            result = await self._log.append(book.name, events, book.head)
        except LogError:
            self.books.pop(book.name, None)  # what the log has now is not known
            raise
        if not isinstance(result, Appended):
            self.books.pop(book.name, None)
            raise LogError(f"{book.name} was written by somebody else; it is read again")
        book.head = result.head
        book.ledger.state = budget_fold(events, book.ledger.state)
        for payload in payloads:
            if isinstance(payload, LimitReached):
                self._on_reached(_in_words(payload))
        for lease in [lease for lease in book.ledger.spent if lease not in book.ledger.state.open]:
            book.ledger.spent.pop(lease, None)
            book.ledger.reserved.pop(lease, None)

    async def bury(self, gone: Callable[[str], bool]) -> None:
        """Settle what holders had that are gone, and close the books of windows that are over. Raises LogError."""
        for name, book in list(self.books.items()):
            async with book.lock:
                state = book.ledger.state
                leases = [lease for lease, holder in state.holders.items() if gone(holder)]
                await self.write(book, [settled(book, lease, state.open[lease], True) for lease in leases])
            if book.end < logtime.now() and not book.ledger.state.open and not book.lock.locked():
                self.books.pop(name, None)


def leased(
    book: Book, lease: str, holder: str, amount: float, of: float, *, overrun: bool = False
) -> BudgetLeased:
    return BudgetLeased(
        scope=str(book.scope), resource=book.resource, window=book.window, lease=lease, holder=holder, amount=amount,
        of=of, overrun=overrun,
    )  # fmt: skip


def settled(book: Book, lease: str, used: float, assumed: bool) -> BudgetSettled:
    return BudgetSettled(
        scope=str(book.scope), resource=book.resource, window=book.window, lease=lease, used=used, assumed=assumed
    )


def reached(book: Book, used: float, of: float, *, all_of_it: bool = False) -> list[Payload]:
    """The alerts that are due."""
    return [
        LimitReached(
            scope=str(book.scope), limit=book.resource, percent=percent, used=used, of=of, window=book.window
        )
        for percent in alerts(of if all_of_it else used, of, book.ledger.state.reached)
    ]


def _in_words(reached: LimitReached) -> str:
    amount = f"{reached.used:.6g} of {reached.of:.6g}"
    kind = {"rate": "starts in its unit of time", "concurrency": "at work"}.get(reached.limit, reached.limit)
    return f"{reached.scope} has reached {reached.percent} % of its {reached.limit} limit: {amount} {kind}"


def _as_events(payloads: list[Payload]) -> list[Event]:
    return [Event("", 0, "", "", "", "", payload) for payload in payloads]


def _end_of(window: str) -> float:
    """When a window ends, by its name."""
    for unit, form in (("min", "%Y%m%dT%H%M"), ("hour", "%Y%m%dT%H"), ("day", "%Y%m%d"), ("month", "%Y%m")):
        try:
            start = datetime.strptime(window, form).replace(tzinfo=UTC)
        except ValueError:
            continue
        if f"{start:{form}}" == window:
            return window_of(unit, start.timestamp()).end
    return math.inf
