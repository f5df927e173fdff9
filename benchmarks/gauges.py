"""What a process holds, sampled over time: memory, files, threads; whether it grows, and a picture of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

BARS = "▁▂▃▄▅▆▇█"
KIB = 1024


@dataclass(frozen=True)
class Sample:
    """One look at a process: seconds since the start, bytes (`pss` shares out what several have, `own` is what only it
    has), open files, threads."""

    time: float
    pid: int
    pss: int
    own: int
    files: int
    threads: int


@dataclass(frozen=True)
class Slope:
    """Bytes a second, and half the width of the interval that holds the true one in 95 of 100 cases."""

    bytes_a_second: float
    give_or_take: float
    samples: int

    @property
    def flat(self) -> bool:
        return abs(self.bytes_a_second) <= self.give_or_take


def look(pid: int, time: float) -> Sample | None:
    """What a process holds now; None when it is gone."""
    with suppress(OSError, ValueError):
        fields = {}
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, _, rest = line.partition(":")
            fields[name] = int(rest.split()[0]) * KIB
        files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
        threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
        own = fields["Private_Clean"] + fields["Private_Dirty"]
        return Sample(time, pid, fields["Pss"], own, files, threads)
    return None


@dataclass
class Gauge:
    """All samples of one role, whoever plays it: a process that is started again is another life."""

    role: str
    samples: list[Sample] = field(default_factory=list)

    def lives(self, warm: float) -> list[list[Sample]]:
        """The samples of each life, without its first `warm` seconds."""
        found: dict[int, list[Sample]] = {}
        for sample in self.samples:
            found.setdefault(sample.pid, []).append(sample)
        settled = [[it for it in life if it.time >= life[0].time + warm] for life in found.values()]
        return [life for life in settled if len(life) > 2]

    def slope(self, warm: float, what: str = "pss") -> Slope | None:
        """A line through each life, all with the same slope (least squares within lives).

        Samples that follow each other are alike, so that there are fewer than there seem to be: the interval is made
        wider by their autocorrelation at lag 1, n' = n (1 - r) / (1 + r).
        """
        above = below = count = 0.0
        centred = []
        for life in self.lives(warm):
            times = [it.time for it in life]
            values = [float(getattr(it, what)) for it in life]
            mean_time, mean_value = statistics.fmean(times), statistics.fmean(values)
            pairs = [(t - mean_time, v - mean_value) for t, v in zip(times, values, strict=True)]
            above += sum(t * v for t, v in pairs)
            below += sum(t * t for t, _ in pairs)
            count += len(life) - 1
            centred.append(pairs)
        if count < 8 or not below:
            return None
        slope = above / below
        rests = [[v - slope * t for t, v in pairs] for pairs in centred]
        squares = sum(rest * rest for life in rests for rest in life)
        alike = sum(a * b for life in rests for a, b in pairwise(life))
        r = min(0.98, max(0.0, alike / squares)) if squares else 0.0
        effective = max(2.0, count * (1 - r) / (1 + r))
        error = math.sqrt(squares / effective / below)
        return Slope(slope, 1.96 * error, int(count))

    def most(self, what: str) -> int:
        return max(getattr(it, what) for it in self.samples)

    def quarters(self, what: str) -> tuple[float, float]:
        """The medians of the second and of the last quarter of the samples."""
        values = [getattr(it, what) for it in self.samples]
        quarter = max(1, len(values) // 4)
        return statistics.median(values[quarter : 2 * quarter] or values), statistics.median(values[-quarter:])

    def summary(self, warm: float) -> dict[str, Any]:
        """What there is to say of it, in numbers; sizes in bytes."""
        slope, own = self.slope(warm), self.slope(warm, "own")
        return {
            "lives": len({it.pid for it in self.samples}),
            "samples": len(self.samples),
            "pss": self._of("pss"),
            "pss_slope": _shown(slope),
            "own_slope": _shown(own),
            "files": self._of("files"),
            "threads": self._of("threads"),
        }

    def _of(self, what: str) -> dict[str, float]:
        early, late = self.quarters(what)
        return {"second_quarter": early, "last_quarter": late, "most": self.most(what)}


def _shown(slope: Slope | None) -> dict[str, float] | None:
    if slope is None:
        return None
    return {
        "kib_a_minute": round(slope.bytes_a_second * 60 / KIB, 2),
        "give_or_take": round(slope.give_or_take * 60 / KIB, 2),
        "samples": slope.samples,
    }


def line(values: Sequence[float], width: int = 60) -> str:
    """A row of bars, from the least value to the greatest; each bar is the median of its part."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * n // width for n in range(width + 1)]
    heights = [statistics.median(values[low:high]) for low, high in pairwise(edges)]
    low, high = min(heights), max(heights)
    step = (high - low) / (len(BARS) - 1) or 1.0
    return "".join(BARS[round((value - low) / step)] for value in heights)


def mib(size: float) -> str:
    return f"{size / (1 << 20):.1f} MiB"
