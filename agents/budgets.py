"""The budgets of one process: what it has been lent, what its effects have reserved and spent of it.

An effect is performed only when what it may cost is reserved of every budget that it counts to. Where a lease has
enough left that asks nobody; else the limiter is asked for more.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from msgspec.structs import replace

from dspex.agents.recorder import Renewing
from dspex.core.errors import BudgetExhausted
from dspex.core.events import Usage
from dspex.core.lending import Claim, Lent
from dspex.core.limits import BUDGETS, Limit, Scope, total
from dspex.core.spending import Cost

__all__ = ["Budgets", "Reservation"]

IDLE = 5.0
"""Seconds without an effect after which a lease is given back."""
NUDGE = 0.25
"""Seconds between words for what others may give back."""
EPSILON = 1e-9

Key = tuple[Scope, str]


@dataclass
class Account:
    """One lease. `until` is when its window ends, by the monotonic clock."""

    lease: str
    scope: Scope
    resource: str
    window: str = ""
    granted: float = 0.0
    used: float = 0.0
    reserved: float = 0.0
    until: float | None = None
    active: float = field(default_factory=time.monotonic)
    closing: bool = False
    exhausted: bool = True
    """As far as is known nothing is left, so also an effect that needs nothing of it has to ask."""
    waiting: dict[asyncio.Future[None], float] = field(default_factory=dict)

    @property
    def free(self) -> float:
        return total([self.granted, -self.used, -self.reserved])


class Reservation:
    """What one effect has reserved. Settle it once."""

    def __init__(self, budgets: Budgets, parts: list[tuple[Account, float]], scopes: list[Scope]) -> None:
        self._budgets, self._parts, self._scopes = budgets, parts, scopes

    def settle(self, usage: Usage) -> None:
        """The effect is over and has cost this; the rest is free again."""
        for account, amount in self._parts:
            account.reserved = max(0.0, total([account.reserved, -amount]))
            account.used = total([account.used, _amount(usage, account.resource)])
            account.active = time.monotonic()
            if account.closing or account.used > account.granted:
                self._budgets.bell()
        paid = {(account.scope, account.resource) for account, _ in self._parts}
        self._budgets.charge(self._budgets.with_model(self._scopes, usage), usage, but=paid)

    def give_back(self) -> None:
        """Nothing was performed."""
        for account, amount in self._parts:
            account.reserved = max(0.0, total([account.reserved, -amount]))


class Budgets:
    """`bell` is rung when the limiter should be asked; `holder` is who we are to it."""

    def __init__(self, holder: str, bell: Callable[[], None]) -> None:
        self._holder, self.bell = holder, bell
        self.limits: dict[Scope, Limit] = {}
        self._current: dict[Key, Account] = {}
        self._all: dict[str, Account] = {}
        self._numbers = itertools.count(1)

    @property
    def none(self) -> bool:
        """Whether nothing is had of any budget."""
        return not self._all

    async def reserve(self, scopes: Iterable[Scope], cost: Cost, read_only: bool) -> Reservation:
        """Reserve what an effect may cost of every budget of these scopes. Raises BudgetExhausted, Renewing."""
        scopes, parts = list(scopes), list[tuple[Account, float]]()
        try:
            for scope, resource in self._keys(scopes):
                amount = cost.of(resource, read_only)
                account = await self._take(scope, resource, amount)
                if account:
                    parts.append((account, amount))
        except BaseException:
            Reservation(self, parts, scopes).give_back()
            raise
        return Reservation(self, parts, scopes)

    def charge(self, scopes: Iterable[Scope], usage: Usage, *, but: set[Key] | None = None) -> None:
        """Something was spent that was not reserved."""
        for scope, resource in self._keys(scopes):
            amount = _amount(usage, resource)
            if amount and (scope, resource) not in (but or ()):
                account = self._account(scope, resource)
                account.used = total([account.used, amount])
                account.active = time.monotonic()
                self.bell()

    def with_model(self, scopes: list[Scope], usage: Usage) -> list[Scope]:
        """The scopes, and the model that was really asked."""
        return [*scopes, Scope("model", usage.model)] if isinstance(usage.model, str) and usage.model else scopes

    # -- reserving

    def _keys(self, scopes: Iterable[Scope]) -> list[Key]:
        found = []
        for scope in dict.fromkeys(scopes):
            limit = self.limits.get(scope)
            found += [(scope, name) for name in BUDGETS if limit and limit.budget(name) is not None]
        return found

    def _account(self, scope: Scope, resource: str) -> Account:
        """The lease that is used now; another one when the window of the last is over."""
        account = self._current.get((scope, resource))
        over = account and account.until is not None and time.monotonic() >= account.until
        if account is None or account.closing or over:
            if account:
                account.closing = True
            account = Account(f"{self._holder}-{next(self._numbers)}", scope, resource)
            self._current[scope, resource] = self._all[account.lease] = account
        return account

    async def _take(self, scope: Scope, resource: str, amount: float) -> Account | None:
        """Reserve so much of one budget; None when there is no such budget any more."""
        while (scope, resource) in self._keys([scope]):
            account = self._account(scope, resource)
            enough = account.free >= amount - EPSILON and not (amount == 0.0 and account.exhausted)
            if enough and not account.waiting:
                account.reserved = total([account.reserved, amount])
                account.active = time.monotonic()
                return account
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            account.waiting[turn] = amount
            self.bell()
            try:
                await turn
                return account
            except _Moved:
                continue
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled() and not turn.exception():
                    account.reserved = max(0.0, total([account.reserved, -amount]))
                raise
            finally:
                account.waiting.pop(turn, None)
        return None

    # -- what is said and heard

    def words(self) -> dict[str, Claim]:
        """What we have and want of every budget."""
        now = time.monotonic()
        for key, account in list(self._current.items()):
            limit = self.limits.get(account.scope)
            known = limit is not None and limit.budget(account.resource) is not None
            over = account.until is not None and now >= account.until
            idle = not account.reserved and not account.waiting and now - account.active > IDLE
            if idle or over or not known:
                account.closing = True
                del self._current[key]
        for lease, account in list(self._all.items()):
            if account.closing and not (account.granted or account.used or account.reserved or account.waiting):
                del self._all[lease]  # nothing was lent under it
        return {lease: self._claim(account) for lease, account in self._all.items()}

    def _claim(self, account: Account) -> Claim:
        wants = sorted(account.waiting.values())
        return Claim(
            scope=str(account.scope), resource=account.resource, window=account.window if account.granted else "",
            want=wants[0] if wants else 0.0, used=account.used, reserved=account.reserved,
            close=account.closing and not account.reserved and not account.waiting,
        )  # fmt: skip

    def still(self) -> dict[str, Claim]:
        """What we have, with nothing wanted and nothing given back. Changes nothing, so any thread may ask."""
        accounts = list(self._all.items())
        return {lease: replace(self._claim(it), want=0.0, close=False) for lease, it in accounts if it.granted}

    def last_words(self) -> dict[str, Claim]:
        """All leases given back. What is under way may have been paid."""
        for account in self._all.values():
            account.used, account.reserved = total([account.used, account.reserved]), 0.0
            account.closing = True
        return self.words()

    def hear(self, said: dict[str, Claim], lent: dict[str, Lent]) -> bool:
        """What the limiter answered to our words; whether somebody still waits for more."""
        again = False
        for lease, answer in lent.items():
            account = self._all.get(lease)
            if account is None:
                continue
            if answer.over:
                self._over(account, gone=said[lease].close or not answer.granted)
                again = again or bool(account.waiting)
                continue
            account.window, account.granted = answer.window, answer.granted
            account.until = None if answer.left is None else time.monotonic() + answer.left
            account.exhausted = answer.refused == "exhausted" or answer.used >= answer.of - EPSILON
            served = self._serve(account)
            if account.waiting and answer.refused == "exhausted" and not served:
                self._refuse(account, answer)
            unused = account.granted > account.used + EPSILON and not account.reserved
            if unused and (answer.close or (account.waiting and answer.refused == "wait")):
                # Too little for us and lent to us all the same: if two did so, both would wait for ever.
                self._over(account, gone=False)
                again = True
            again = again or (bool(account.waiting) and served > 0)
        return again

    @property
    def waits(self) -> bool:
        """Whether an effect waits for what others may give back."""
        return any(account.waiting for account in self._all.values())

    def forget(self, scope: Scope) -> None:
        """A limit is gone: nobody waits for it."""
        for account in self._all.values():
            if account.scope == scope:
                self._move(account)

    def _serve(self, account: Account) -> int:
        """Give out what there is to those who wait, in the order in which they came."""
        served = 0
        for turn, amount in list(account.waiting.items()):
            if turn.done() or account.free < amount - EPSILON or (amount == 0.0 and account.exhausted):
                continue
            account.reserved = total([account.reserved, amount])
            account.active = time.monotonic()
            account.waiting.pop(turn)
            turn.set_result(None)
            served += 1
        return served

    def _over(self, account: Account, *, gone: bool) -> None:
        account.closing = True
        if self._current.get((account.scope, account.resource)) is account:
            del self._current[account.scope, account.resource]
        self._move(account)
        if gone:
            self._all.pop(account.lease, None)

    def _move(self, account: Account) -> None:
        """Whoever waits has to look again."""
        for turn in list(account.waiting):
            account.waiting.pop(turn)
            if not turn.done():
                turn.set_exception(_Moved())

    def _refuse(self, account: Account, answer: Lent) -> None:
        limit = self.limits.get(account.scope)
        for turn, amount in list(account.waiting.items()):
            account.waiting.pop(turn)
            if turn.done():
                continue
            if limit and limit.when_exhausted == "wait" and answer.renews:
                turn.set_exception(Renewing(answer.renews))
            else:
                turn.set_exception(_exhausted(account, amount, answer))


class _Moved(Exception):
    """The lease is over; take another one."""


def _exhausted(account: Account, amount: float, answer: Lent) -> BudgetExhausted:
    when = f"{datetime.fromtimestamp(answer.renews, UTC):%Y-%m-%dT%H:%M:%SZ}" if answer.renews else ""
    return BudgetExhausted(
        f"{answer.used:.10g} of {answer.of:.10g} {account.resource} of {account.scope} are used, and this needs "
        f"{amount:.10g} more; {f'the budget renews at {when}' if when else 'it does not renew'}",
        answer.renews,
    )


def _amount(usage: Usage, resource: str) -> float:
    return {"usd": usage.usd, "tokens": usage.tokens, "calls": usage.calls}[resource]
