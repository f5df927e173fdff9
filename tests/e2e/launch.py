"""Run a system as `dspex up` does: `python launch.py '{"plans": [["programs.py:Work", 2]], "data": "…"}'`.

Every event is one line of JSON on stdout; a refusal is one line on stderr and exit code 1.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from dspex.agents.bounds import Bounds
from dspex.compose.root import Plan, SystemSpec, run_root
from dspex.core.doors import Marks
from dspex.core.errors import DspexError


def main(spec: dict[str, object]) -> int:
    plans = [Plan(app, agents) for app, agents in spec.pop("plans")]  # type: ignore[attr-defined]
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
