"""The programs whose tasks stand in the golden logs. They may grow by new programs; what is here stays as it is."""

from __future__ import annotations

import asyncio
from typing import Any

from dspex import Program, Schema, effect, variable
from dspex.core.retry import Retry


@effect
async def price(item: str, count: int = 1) -> dict[str, Any]:
    """An effect whose result is an object."""
    return {"item": item, "cents": len(item) * 100 * count}


@effect
def look_up(item: str) -> list[str]:
    """A plain effect: it runs in a thread."""
    return sorted(item)


@effect
async def refuse(item: str) -> str:
    """An effect that raises."""
    raise KeyError(item)


class Order(Schema):
    items: list[str] = ["tea"]
    wait: float = 0.0


class Result(Schema):
    value: Any = None


class Shop(Program):
    """Effects one by one and together, the clock, ids and random numbers, an error that is caught."""

    Input, Output = Order, Result
    discount = variable(5, low=0, high=50)

    async def predict(self, input: Order) -> Result:
        began, ticket, luck = self.now(), self.new_id(), self.random().random()
        first = await price(input.items[0])
        rest = await asyncio.gather(*(self.both(item) for item in input.items[1:]))
        together = await asyncio.gather(price("a"), price("bb", count=2))
        try:
            await refuse(input.items[0])
        except KeyError as error:
            refused = repr(error)
        total = first["cents"] + sum(rest) + sum(one["cents"] for one in together)
        paid = total * (100 - self.discount) // 100
        return Result(value={"paid": paid, "began": began, "ticket": ticket, "luck": luck, "refused": refused})

    async def both(self, item: str) -> int:
        """A branch of its own with two effects in it."""
        letters = await look_up(item)
        return int((await price(item, len(letters)))["cents"])


class Patient(Program):
    """Sleeps in the log, and waits for a person."""

    Input, Output = Order, Result

    async def predict(self, input: Order) -> Result:
        before = await price(input.items[0])
        await self.sleep(input.wait)
        said = await self.signal("approval")
        after = await price(input.items[0], 2)
        return Result(value=[before["cents"], said, after["cents"]])


class Hopeful(Program):
    """A signal that does not come in time."""

    Input, Output = Order, Result

    async def predict(self, input: Order) -> Result:
        try:
            return Result(value=await self.signal("approval", timeout=input.wait))
        except TimeoutError:
            return Result(value="nobody came")


calls: list[str] = []


@effect
async def flaky(item: str) -> str:
    """Fails when it is first called in a process."""
    calls.append(item)
    if len(calls) == 1:
        raise ConnectionError("not yet")
    return f"{item} at last"


class Stubborn(Program):
    """Fails once, forgets what it did, and works."""

    Input, Output = Order, Result
    retry = Retry(attempts=2, backoff=0.2, jitter=0, clean=True)

    async def predict(self, input: Order) -> Result:
        cost = await price(input.items[0])
        return Result(value=[cost["cents"], await flaky(input.items[0]), self.random().random()])


class Hopeless(Program):
    """Fails every time, on the effects of its first attempt."""

    Input, Output = Order, Result
    retry = Retry(attempts=2, backoff=0.2, jitter=0)

    async def predict(self, input: Order) -> Result:
        cost = await price(input.items[0])
        raise ConnectionError(cost["item"])


class Plain(Program):
    """A plain predict: it runs in a thread, and its waits block it."""

    Input, Output = Order, Result

    def predict(self, input: Order) -> Result:
        cents = price(input.items[0])["cents"]
        self.sleep(input.wait)
        return Result(value=[cents, look_up(input.items[0]), self.now(), self.random().randint(1, 9)])


class Bare(Program):
    """No effects at all."""

    Input, Output = Order, Result

    async def predict(self, input: Order) -> Result:
        if input.items == ["bad"]:
            raise ValueError("bad")
        return Result(value=input.items)
