"""What effects have cost: from the views beside the archive of a running system, or from views made for the purpose."""

from __future__ import annotations

import msgspec

from dspex.compose.story import BusSource, Source
from dspex.core.costs import CostQuery, Costs
from dspex.core.errors import TaskError

__all__ = ["costs"]


async def costs(source: Source, query: CostQuery) -> Costs:
    """The sums. Raises InvalidInput, Unavailable, LogError."""
    query.check()
    query = msgspec.structs.replace(query, position=await source.head())
    if isinstance(source, BusSource):
        try:
            return msgspec.json.decode(await source.caller.archive("costs", query), type=Costs)
        except TaskError as error:
            if error.code != 503 or "nobody serves" not in error.message:
                raise
    from dspex.store.costs import COSTS, costs_of
    from dspex.store.projections import Views

    narrowed = {"task": query.task} if query.task else {}
    with Views(None, [COSTS], epoch="here") as views:
        position = 0
        async for page in source.pages(**narrowed):
            if page:
                position = max(position, page[-1].position)
                views.advance(page, position, "")
        views.advance([], max(position, query.position), "")
        return costs_of(views, query)
