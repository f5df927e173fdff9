"""Makes golden logs: `python tests/golden/make.py NAME` runs every program and writes NAME.db beside this file.

Logs that are there are never written again; a new version of dspex adds one, and its line in `digests.txt`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.golden.programs import Bare, Hopeful, Hopeless, Patient, Plain, Shop, Stubborn  # noqa: E402

from dspex import ProgramFailed, System  # noqa: E402
from dspex.compose.caller import Caller  # noqa: E402
from dspex.compose.export import export  # noqa: E402
from dspex.compose.story import BusSource  # noqa: E402

TASKS: list[tuple[Any, list[dict[str, Any]]]] = [
    (Shop, [{"items": ["tea"]}, {"items": ["tea", "milk", "sugar", "biscuits"]}]),
    (Patient, [{"items": ["cake"], "wait": 2.0}, {"items": ["pie"], "wait": 0.1}]),
    (Hopeful, [{"wait": 2.0}]),
    (Stubborn, [{}]),
    (Hopeless, [{}]),
    (Plain, [{"items": ["jam"]}, {"items": ["honey"], "wait": 2.0}]),
    (Bare, [{}, {"items": ["bad"]}]),
]


async def write(name: str, url: str, ids: list[str]) -> None:
    async with await Caller.connect(url) as caller:
        await export(BusSource(caller), HERE / f"{name}.db", tasks=ids)


async def approve(url: str, ids: list[str]) -> None:
    async with await Caller.connect(url) as caller:
        for task in ids:
            await caller.signal("patient", task, "approval", {"by": "somebody", "task": int(task)})


def make(prefix: str) -> None:
    for program, inputs in TASKS:
        name = f"{prefix}-{program.name}"
        with tempfile.TemporaryDirectory() as data, System(program, data=data, durability="process") as system:
            ids = [system.submit(**fields) for fields in inputs]
            if program is Patient:
                time.sleep(1.0)
                asyncio.run(approve(system.url, ids))
            for task in ids:
                with contextlib.suppress(ProgramFailed):  # two of them are meant to fail
                    system.result(task)
            asyncio.run(write(name, system.url, ids))
        digest = hashlib.sha256((HERE / f"{name}.db").read_bytes()).hexdigest()
        with (HERE / "digests.txt").open("a") as digests:
            digests.write(f"{digest}  {name}.db\n")


if __name__ == "__main__":
    make(sys.argv[1])
