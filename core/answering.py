"""What every `Runtime` that answers from records and performs nothing does alike."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Coroutine
from typing import Any, cast

__all__ = ["Answering"]


class Answering:
    """The half of a `Runtime` in which nothing is looked up. `seed` and `life` are what random numbers come from."""

    def __init__(self, seed: str, life: int) -> None:
        self._seed, self._life = seed, life

    def wait_in_thread(self, work: Awaitable[Any]) -> Any:
        # Nothing in it waits for anything: it answers, raises, or finds that there is no record.
        steps = cast("Coroutine[Any, Any, Any]", work)
        try:
            steps.send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("who performs nothing waits for nothing")

    async def call(self, program: str, body: bytes, key: str) -> bytes:
        """A call is an effect, and none is performed."""
        raise AssertionError(f"nobody is called here, also not {program}")

    def seed(self, key: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self._seed}/{self._life}/{key}".encode()).digest()[:8], "big")
