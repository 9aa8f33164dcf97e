"""Pictures of results, with matplotlib, which is an extra: `pip install 'quire[bench]'`. Imported only when something is drawn."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quire.benchmarks.figures import Spread, percentile

COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#a463f2")
PANEL = 4.5  # inches wide

Panel = Any  # matplotlib's Axes: there is nothing of it here until it is needed
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Chart:
    """Lines over a common axis, from zero on."""

    series: Mapping[str, Points]
    x_name: str
    y_name: str


def charts(path: Path, drawn: Sequence[Chart]) -> None:
    """One below the other."""
    with figure(path, rows=len(drawn), width=2 * PANEL) as panels:
        for panel, chart in zip(panels, drawn, strict=True):
            lines(panel, chart.series, chart.x_name, chart.y_name)


@contextmanager
def figure(
    path: Path, *, columns: int = 1, rows: int = 1, height: float = 3.0, width: float = PANEL
) -> Iterator[list[Panel]]:
    """The panels of a picture, row by row, written to `path` at the end. Raises SystemExit without matplotlib."""
    try:
        from cycler import cycler  # noqa: PLC0415 (an extra)
        from matplotlib import rcParams  # noqa: PLC0415
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError:
        raise SystemExit("error: no matplotlib, so no picture: pip install 'quire[bench]'") from None
    rcParams["axes.prop_cycle"] = cycler(color=COLOURS)
    drawn = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(drawn)
    panels = list(drawn.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#ddd")
        panel.set_axisbelow(True)
    yield panels
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)


def bars(panel: Panel, values: Mapping[str, Spread], *, digits: int = 0) -> None:
    """A bar up to each median, with the spread on it."""
    middle = [value.median for value in values.values()]
    below = [value.median - value.low for value in values.values()]
    above = [value.high - value.median for value in values.values()]
    drawn = panel.bar(range(len(values)), middle, color=COLOURS[: len(values)], yerr=[below, above], capsize=3)
    panel.bar_label(drawn, [f"{value:,.{digits}f}" for value in middle], padding=2)
    panel.margins(y=0.15)
    panel.set_xticks(range(len(values)), [name.replace("-", "-\n") for name in values])


def lines(panel: Panel, series: Mapping[str, Points], x_name: str, y_name: str, *, marks: str = "") -> None:
    """One line for each name, from zero on."""
    for name, points in series.items():
        panel.plot(
            [x for x, _ in points], [y for _, y in points], marker=marks, label=name, linewidth=1.5, markersize=4
        )
    panel.set_xlabel(x_name)
    panel.set_ylabel(y_name)
    panel.set_ylim(bottom=0)
    panel.ticklabel_format(style="plain")
    if len(series) > 1:
        panel.legend(frameon=False)


def shares(panel: Panel, series: Mapping[str, Sequence[float]], name: str) -> None:
    """For each value, the percentage of the others that are no greater: a distribution without bins."""
    for label, values in series.items():
        ordered = sorted(values)
        percents = [100 * (i + 1) / len(ordered) for i in range(len(ordered))]
        panel.plot(ordered, percents, label=label, linewidth=1.5, drawstyle="steps-post")
    panel.set_xlabel(name)
    panel.set_ylabel("%")
    panel.set_ylim(0, 101)
    everything = [value for values in series.values() for value in values if value > 0]
    if everything:
        panel.set_xscale("log")
        low, high = percentile(everything, 1) / 2, 1.5 * max(everything)
        panel.set_xlim(low, high)
        panel.xaxis.get_major_locator().set_params(subs=(1, 2, 5) if high < 200 * low else (1,))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter("")
    if len(series) > 1:
        panel.legend(frameon=False)
