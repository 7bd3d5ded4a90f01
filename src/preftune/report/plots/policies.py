"""The figures of the comparison: score against KL, and the spread of scores."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, TypeGuard

from matplotlib.axes import Axes

from preftune.records.base import Estimate
from preftune.records.policy import BestOf, PolicyRecord
from preftune.records.run import SampleRow
from preftune.report.plots.drawing import FAINT, INK, bars, new, save, styles
from preftune.report.text import clean
from preftune.report.view import RunView

Value = Callable[[PolicyRecord | BestOf], Estimate | None]
Box = tuple[float, float, float, float]
MAX_DOTS = 150  # dots for each policy; of more scores, as many quantiles are drawn
MARKED = (2, 4, 8, 16)  # points of the best-of-n curve that carry their n
PLACES = ((8, 5), (-8, 5), (8, -13), (-8, -13), (8, 17), (-8, 17), (8, -25), (-8, -25), (8, 29), (-8, 29))


score: Value = attrgetter("score")
gold: Value = attrgetter("gold")
held_out: Value = attrgetter("held_out")


def trade_off(run: RunView, value: Value, label: str) -> str:
    """A value against KL to the reference: points with intervals both ways, and the curve of best-of-n."""
    figure, axes = new(4.9, 4.1)
    looks = styles(run)
    points = [(policy, policy.kl, value(policy)) for policy in run.policies]
    finite = [(policy, x, y) for policy, x, y in points if _finite(x) and _finite(y)]
    occupied: list[Box] = []
    axes.set_xscale("function", functions=(_root, _square))
    labelled = _curve(axes, run.best_of, value)
    for policy, x, y in finite:
        at = max(x.value, 0.0)
        colour, marker, size = looks[policy.policy]
        axes.errorbar(
            [at], [y.value], xerr=bars(x), yerr=bars(y), fmt=marker, color=colour, capsize=3,
            markersize=size, elinewidth=1.2, clip_on=False, zorder=3,
        )  # fmt: skip
        labelled.append((clean(policy.label, 30), at, y.value, 9))
    axes.margins(x=0.1, y=0.15)
    axes.set_xlim(left=0)
    axes.set_xticks(_ticks(axes.get_xlim()[1]))
    figure.draw_without_rendering()  # places of labels need the axes as they will be
    occupied += [_box(axes, at, at, height, height, 6) for _, at, height, _ in labelled]
    for _, x, y in finite:  # labels keep off the error bars and the curve
        at = max(x.value, 0.0)
        occupied.append(_box(axes, at, at, _or(y.low, y.value), _or(y.high, y.value), 2))
        occupied.append(_box(axes, _or(x.low, at), _or(x.high, at), y.value, y.value, 2))
    occupied += [_box(axes, *line, 2) for line in _lines(run.best_of, value)]
    for words, at, height, size in sorted(labelled, key=lambda item: -item[3]):
        _annotate(axes, words, (at, height), size, occupied)
    axes.set_xlabel(
        f"KL(policy || {clean(run.label(run.reference), 30)}), nats per response (square-root axis)"
    )
    axes.set_ylabel(f"{label} (mean, 95 % interval)")
    return save(figure)


def _ticks(end: float) -> list[float]:
    """Round KLs up to `end` that stand apart on a square-root axis."""
    ticks = [0.0]
    for power in range(-3, 7):
        for digit in (1, 2, 5):
            tick = digit * 10.0**power
            if tick <= end and _root(tick) - _root(ticks[-1]) >= 0.13 * _root(end):
                ticks.append(tick)
    return ticks


def _curve(axes: Axes, curve: Sequence[BestOf], value: Value) -> list[tuple[str, float, float, float]]:
    """The best-of-n curve with its intervals; returns the labels that it needs: words, x, y, size."""
    points = [(point, mean) for point in curve if _finite(mean := value(point))]
    if len(points) < 2:
        return []
    kl, means = [point.kl for point, _ in points], [mean.value for _, mean in points]
    axes.plot(kl, means, color=INK, linewidth=1.2, linestyle=(0, (5, 2)), zorder=2)
    lows = [mean.value if mean.low is None else mean.low for _, mean in points]
    highs = [mean.value if mean.high is None else mean.high for _, mean in points]
    axes.fill_between(kl, lows, highs, color=INK, alpha=0.1, linewidth=0, zorder=1)
    marked = [(point, mean) for point, mean in points if point.n in MARKED]
    axes.plot([point.kl for point, _ in marked], [mean.value for _, mean in marked], ".", color=INK, zorder=2)
    last = points[-1][0].n
    return [
        (f"best of {point.n}" if point.n == last else str(point.n), point.kl, mean.value, 7.5)
        for point, mean in marked
    ]


def _annotate(axes: Axes, words: str, at: tuple[float, float], size: float, occupied: list[Box]) -> None:
    """Write a label at the first place around its point where it hides nothing, else at the least bad."""
    boxes = [_text_box(axes, words, at, size, offset) for offset in PLACES]
    clashes = [sum(_overlap(box, taken) for taken in occupied) + _outside(axes, box) for box in boxes]
    best = min(range(len(PLACES)), key=lambda index: clashes[index])
    x, y = PLACES[best]
    axes.annotate(
        words, at, xytext=(x, y), textcoords="offset points", ha="left" if x > 0 else "right", color=INK,
        fontsize=size,
    )  # fmt: skip
    occupied.append(boxes[best])


def _box(axes: Axes, left: float, right: float, bottom: float, top: float, wider: float) -> Box:
    """Data coordinates as a box on the canvas, `wider` points larger on every side."""
    x0, y0 = axes.transData.transform((max(left, 0.0), bottom))
    x1, y1 = axes.transData.transform((max(right, 0.0), top))
    return x0 - wider, y0 - wider, x1 + wider, y1 + wider


def _lines(curve: Sequence[BestOf], value: Value) -> Iterator[tuple[float, float, float, float]]:
    """The pieces between neighbours of the curve: left, right, bottom, top."""
    points = [(point.kl, mean.value) for point in curve if _finite(mean := value(point))]
    for (left, start), (right, end) in pairwise(points):
        yield left, right, min(start, end), max(start, end)


def _text_box(
    axes: Axes, words: str, at: tuple[float, float], size: float, offset: tuple[float, float]
) -> Box:
    """About where a text will lie, in points of the figure (72 an inch, as the canvas has them)."""
    x, y = axes.transData.transform(at)
    width = 0.6 * size * len(words)
    left = x + offset[0] if offset[0] > 0 else x + offset[0] - width
    return left, y + offset[1], left + width, y + offset[1] + size


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(axes: Axes, box: Box) -> float:
    """How far a box sticks out of the panel, heavily weighed."""
    panel = axes.get_window_extent()
    over = max(0.0, panel.x0 - box[0]) + max(0.0, box[2] - panel.x1)
    return 100 * (over + max(0.0, panel.y0 - box[1]) + max(0.0, box[3] - panel.y1 - 12))


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _finite(estimate: Estimate | None) -> TypeGuard[Estimate]:
    return estimate is not None and math.isfinite(estimate.value)


def _root(x: Any) -> Any:  # arrays; matplotlib asks for values left of zero too
    return abs(x) ** 0.5 * (2.0 * (x > 0) - 1.0)


def _square(x: Any) -> Any:
    return x * abs(x)


def scores(run: RunView) -> dict[str, list[float]]:
    """Finite scores by policy, ordered: of all prompts where on record, else of the saved samples."""
    evaluated = {policy.policy: list(policy.scores) for policy in run.policies if policy.scores}
    by_policy = evaluated or {policy: _saved_scores(rows) for policy, rows in run.samples.items()}
    return {policy: sorted(values) for policy, values in by_policy.items() if values}


def _saved_scores(rows: Sequence[SampleRow]) -> list[float]:
    return [row.score for row in rows if row.score is not None and math.isfinite(row.score)]


def distribution(run: RunView, spread: dict[str, list[float]]) -> str:
    """A row of points for each policy, spread up and down so that none hides another; a bar at the median."""
    figure, axes = new(5.4, 0.8 + 0.42 * len(spread))
    looks = styles(run)
    for row, (policy, ordered) in enumerate(spread.items()):
        colour = looks[policy][0] if policy in looks else INK
        dots = _quantiles(ordered, MAX_DOTS)
        heights = [row + 0.11 * (index * 3 % 5 - 2) for index in range(len(dots))]
        axes.plot(dots, heights, "o", color=colour, alpha=0.6, markersize=3.6, markeredgewidth=0)
        middle = ordered[len(ordered) // 2]
        axes.plot([middle, middle], [row - 0.38, row + 0.38], color=INK, linewidth=2)
    axes.set_yticks(range(len(spread)), [clean(run.label(policy), 30) for policy in spread])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.axvline(0, color=FAINT, linewidth=0.8)
    axes.set_xlabel("Score of each response (normalised); bar: median")
    return save(figure)


def _quantiles(ordered: Sequence[float], limit: int) -> list[float]:
    if len(ordered) <= limit:
        return list(ordered)
    return [ordered[int((index + 0.5) * len(ordered) / limit)] for index in range(limit)]
