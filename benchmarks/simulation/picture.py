"""The pictures of a comparison: what tokens and first tokens took, and how queue and KV went."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..drawing import Chart, Points
from .measures import Measures

STEPS = 200


def compared(runs: Mapping[str, Measures]) -> list[Chart]:
    """One line for each run in each picture."""
    ttfts = {name: [r.ttft_s for r in run.records if r.ttft_s is not None] for name, run in runs.items()}
    first = {name: [s for s in run.samples][:: max(len(run.samples) // 500, 1)] for name, run in runs.items()}
    return [
        Chart({name: quantiles(run.gaps, 1000) for name, run in runs.items()}, "% of tokens", "inter-token time (ms)"),
        Chart(
            {name: quantiles(times, 1) for name, times in ttfts.items()},
            "% of requests served",
            "time to first token (s)",
        ),
        Chart(
            {name: [(s.at, s.waiting) for s in samples] for name, samples in first.items()},
            "seconds",
            "waiting requests",
        ),
        Chart(
            {name: [(s.at, 100 * s.use) for s in samples] for name, samples in first.items()}, "seconds", "KV use (%)"
        ),
    ]


def beside_a_flood(found: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """A chart for each policy: what first tokens of the others took without the flood, and with it."""
    times = ("alone", "with the flood")
    return [
        Chart(
            {when: one[when]["TTFT curve"] for when in times},
            "% of the others' requests",
            f"{policy}: time to first token (s)",
        )
        for policy, one in found.items()
    ]


def quantiles(values: Sequence[float] | np.ndarray, unit: float) -> Points:
    """(percent, value): the inverse of the distribution."""
    if not len(values):
        return []
    percents = np.linspace(0, 100, STEPS + 1)
    found = np.percentile(np.asarray(values, dtype=np.float64), percents) * unit
    return list(zip(map(float, percents), map(float, found), strict=True))
