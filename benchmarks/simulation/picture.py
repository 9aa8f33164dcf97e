"""The pictures of a comparison: what tokens and first tokens took, and how queue and KV went."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..plot import HEIGHT, WIDTH, Points, lines
from .measures import Measures

STEPS = 200


def compared(runs: Mapping[str, Measures]) -> str:
    """One line for each run in each picture."""
    ttfts = {name: [r.ttft_s for r in run.records if r.ttft_s is not None] for name, run in runs.items()}
    first = {name: [s for s in run.samples][:: max(len(run.samples) // 500, 1)] for name, run in runs.items()}
    return stacked(
        lines({name: quantiles(run.gaps, 1000) for name, run in runs.items()}, "% of tokens", "inter-token time (ms)"),
        lines(
            {name: quantiles(times, 1) for name, times in ttfts.items()},
            "% of requests served",
            "time to first token (s)",
        ),
        lines(
            {name: [(s.at, s.waiting) for s in samples] for name, samples in first.items()},
            "seconds",
            "waiting requests",
        ),
        lines(
            {name: [(s.at, 100 * s.use) for s in samples] for name, samples in first.items()}, "seconds", "KV use (%)"
        ),
    )


def beside_a_flood(found: Mapping[str, Mapping[str, Any]]) -> str:
    """A picture for each policy: what first tokens of the others took without the flood, and with it."""
    times = ("alone", "with the flood")
    return stacked(
        *(
            lines(
                {when: one[when]["TTFT curve"] for when in times},
                "% of the others' requests",
                f"{policy}: time to first token (s)",
            )
            for policy, one in found.items()
        )
    )


def quantiles(values: Sequence[float] | np.ndarray, unit: float) -> Points:
    """(percent, value): the inverse of the distribution."""
    if not len(values):
        return []
    percents = np.linspace(0, 100, STEPS + 1)
    found = np.percentile(np.asarray(values, dtype=np.float64), percents) * unit
    return list(zip(map(float, percents), map(float, found), strict=True))


def stacked(*pictures: str) -> str:
    """One below the other."""
    parts = [
        picture.replace("<svg ", f'<svg y="{HEIGHT * i}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        for i, picture in enumerate(pictures)
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(pictures)}">'
    return "\n".join([head, *parts, "</svg>", ""])
