"""Compare ratios with those of an earlier run, which its `bench.json` holds."""

from collections.abc import Iterator, Mapping
from typing import Any

from bench.rounds import Comparison

TOLERANCE = 0.8  # of the lowest ratio of the earlier run: the spread of a noisy machine is not a regression


def regressions(earlier: Mapping[str, Any], now: Mapping[str, Comparison]) -> Iterator[str]:
    """Yield each ratio that is clearly lower than it was. Rows and contenders that are new have nothing to lose."""
    for name, row in now.items():
        before = earlier.get(name, {"ratios": {}})["ratios"]
        for other, found in row.ratios.items():
            if other in before and found.median < before[other]["low"] * TOLERANCE:
                yield f"{name} ÷ {other}: {found.median:.2f}, before {before[other]['median']:.2f}"
