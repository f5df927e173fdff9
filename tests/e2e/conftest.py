"""Systems for tests: each in a folder of its own, ended afterwards whatever has become of it."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.plain import Plain
from tests.e2e.running import Running

Launch = Callable[..., Running]


@pytest.fixture
def systems(tmp_path: Path) -> Iterator[Launch]:
    """Makes systems that are not started yet: `systems(("Nap", 2), folder="a")`."""
    made: list[Running] = []

    def make(*plans: tuple[str, int], folder: str = "data", **options: Any) -> Running:
        made.append(Running(tmp_path / folder, *plans, **options))
        return made[-1]

    yield make
    for system in made:
        system.end()


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One system for a module that says which in `PLANS`."""
    data = tmp_path_factory.mktemp("shared") / "data"
    with Running(data, *request.module.PLANS) as system:
        yield system
    shutil.rmtree(data, ignore_errors=True)


@pytest.fixture
async def plain(shared: Running) -> AsyncIterator[Plain]:
    """A client of the module's system."""
    async with await Plain.connect(shared.url, shared.log_file) as client:
        yield client
