"""Run a system as `dspex up` does: `python launch.py '{"plans": [["programs.py:Work", 2]], "data": "…"}'`.

Every event is one line of JSON on stdout; a refusal is one line on stderr and exit code 1.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from dspex.agents.bounds import Bounds
from dspex.compose.plans import Plan
from dspex.compose.root import SystemSpec, run_root
from dspex.core.doors import Marks
from dspex.core.errors import DspexError
from dspex.core.scaling import Scale


def main(spec: dict[str, object]) -> int:
    about = spec.pop("scale", {})
    plans = []
    for app, agents in spec.pop("plans"):  # type: ignore[attr-defined]
        scale = replace(Scale.read(str(agents)), **about)  # type: ignore[arg-type]
        plans.append(Plan(app, scale.least, scale=scale))
    data = Path(str(spec.pop("data")))
    if "retention" in spec:
        spec["retention"] = Bounds(**spec["retention"])  # type: ignore[arg-type]
    if "marks" in spec:
        spec["marks"] = Marks(**spec["marks"])  # type: ignore[arg-type]
    try:
        return run_root(SystemSpec(plans, data, **spec), on_event=lambda event: print(json.dumps(event), flush=True))  # type: ignore[arg-type]  # noqa: T201
    except DspexError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 1


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
