"""Training curves, a figure for each stage, a panel for each metric, with the healthy range shaded."""

import math
from collections.abc import Iterator, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from preftune.config import Healthy, StageSettings, config_of
from preftune.report.healthy import healthy
from preftune.report.plots.drawing import GREEN, RIGHT, save
from preftune.report.text import clean
from preftune.report.view import RunView, StageView

Points = list[tuple[float, float]]
MAX_POINTS = 200  # points of one curve; more are averaged in bins, so that a long run stays a small file
MAX_PANELS = 9
SKIPPED = frozenset(
    {"step", "time", "learning_rate", "lr_factor", "epoch", "step_seconds", "sampling_seconds", "kl_coef"}
)


def curves(stage: StageView) -> dict[str, Points]:
    """Up to MAX_PANELS metrics of a stage as (step, value) points: first those that its algorithm names, with
    what functions gave beside the score, then by name.
    """
    logged = dict.fromkeys(key for row in stage.metrics for key in row.numbers)
    kind = config_of(stage.algorithm) or StageSettings
    named = kind.drawn_first
    place = named.index(kind.score_metric) + 1 if kind.score_metric in named else len(named)
    beside = [key for key in logged if key.startswith("rewards/") and key.endswith("/mean")]
    first = [*named[:place], *beside, *named[place:], *kind.headline]
    headline = [key for key in first if key in logged]
    drawn: dict[str, Points] = {}
    for key in [*headline, *sorted(set(logged) - set(headline))]:
        if (
            key not in SKIPPED | kind.not_drawn
            and len(drawn) < MAX_PANELS
            and (points := _points(stage, key))
        ):
            drawn[key] = points
    return drawn


def _points(stage: StageView, key: str) -> Points:
    """The finite numbers that were logged under `key`."""
    logged = [(float(row.step), row.numbers.get(key, math.nan)) for row in stage.metrics]
    return [point for point in logged if math.isfinite(point[1])]


def training(run: RunView, stage: StageView, courses: dict[str, Points]) -> str:
    """The figure of a stage as SVG text."""
    columns = min(3, len(courses))
    rows = math.ceil(len(courses) / columns)
    width, height = 3.2 * columns + 0.3, 2.15 * rows + 0.45
    figure = Figure(figsize=(width, height))
    # Margins by hand: constrained layout measures every tick label twice, half of the time of a report.
    figure.subplots_adjust(
        left=0.62 / width, right=1 - 0.12 / width, top=1 - 0.75 / height, bottom=0.5 / height,
        wspace=0.32, hspace=0.72,
    )  # fmt: skip
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    figure.text(0.1 / width, 1 - 0.22 / height, clean(stage.name, 40), fontsize=11, fontweight="bold")
    for panel, (key, points) in zip(panels, courses.items(), strict=False):
        _draw(panel, list(thinned(points)))
        _mark(panel, clean(key, 40), healthy(run, stage.algorithm, key))
    for panel in panels[len(courses) :]:
        panel.set_axis_off()
    for panel in panels[max(0, len(courses) - columns) : len(courses)]:
        panel.set_xlabel("step")
    return save(figure)


def _draw(panel: Axes, points: Points) -> None:
    """Every value pale, their running mean dark; few values as dots."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    many = len(points) > 10
    panel.plot(
        steps, values, color=RIGHT, alpha=0.35 if many else 1.0, marker="" if many else "o", markersize=3
    )
    if many:
        panel.plot(steps, list(running_mean(values)), color=RIGHT, linewidth=1.8)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    panel.yaxis.set_major_locator(MaxNLocator(nbins=5))
    panel.tick_params(labelsize=9)


def _mark(panel: Axes, title: str, band: Healthy | None) -> None:
    """Shade the healthy range as far as it is in view or near; its words stand under the title anyway."""
    panel.set_title(title, loc="left", fontsize=9.5, pad=6 if band is None else 16)
    if band is None:
        return
    words = f"healthy: {band.meaning}"
    panel.annotate(
        words, (0, 1), xytext=(0, 4), xycoords="axes fraction", textcoords="offset points", fontsize=8
    )
    low, high = _reaching(*panel.get_ylim(), band)
    bottom = low if band.low is None else max(low, band.low)
    top = high if band.high is None else min(high, band.high)
    if bottom < top:
        panel.axhspan(bottom, top, color=GREEN, alpha=0.13, linewidth=0, zorder=0)
    for edge in (band.low, band.high):
        if edge is not None and low < edge < high:
            panel.axhline(edge, color=GREEN, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    panel.set_ylim(low, high)


def _reaching(low: float, high: float, band: Healthy) -> tuple[float, float]:
    """The axis, longer where the healthy range lies just outside of it, by no more than twice its length."""
    span = high - low
    if band.low is not None and high < band.low <= high + 2 * span:
        return low, band.low + 0.15 * span
    if band.high is not None and low - 2 * span <= band.high < low:
        return band.high - 0.15 * span, high
    return low, high


def thinned(points: Points) -> Iterator[tuple[float, float]]:
    """At most MAX_POINTS points: means over runs of neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    for start in range(0, len(points), size):
        block = points[start : start + size]
        yield sum(step for step, _ in block) / len(block), sum(value for _, value in block) / len(block)


def running_mean(values: Sequence[float]) -> Iterator[float]:
    """Mean over a window of a tenth of the curve, centred, shorter at both ends."""
    half = max(1, len(values) // 20)
    for index in range(len(values)):
        window = values[max(0, index - half) : index + half + 1]
        yield sum(window) / len(window)
