"""Figures as SVG: the same bytes for the same numbers, readable by the colour-blind, on paper, in the dark.

Text stays text (selectable, small). Ink and paper are swapped by a media query inside the SVG when the reader
prefers dark; data colours are Okabe and Ito's, which work on both, and shape or position always says the same
as colour. No pyplot: nothing global is touched.
"""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from typing import Any, TypeGuard

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from preftune.report.tables import kl_text
from preftune.report.text import clean
from preftune.report.view import Estimate, PolicyView, RunView, StageView

INK, PAPER, FAINT = "#24292f", "#ffffff", "#c8ccd0"
BLUE = "#0072b2"  # the one data colour that needs more light on a dark page
COLOURS = (BLUE, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WRONG, RIGHT = "#d55e00", BLUE
MARKERS = ("o", "s", "^", "v", "P", "X")
MAX_POINTS = 400  # points of one curve; more are averaged in bins, so that a long run stays a small file
MAX_PANELS = 6
_DARK = (
    "<style>@media (prefers-color-scheme: dark) {"
    f'[style*="fill: {INK}"] {{fill: #e6edf3 !important}} '
    f'[style*="stroke: {INK}"] {{stroke: #e6edf3 !important}} '
    f'[style*="fill: {PAPER}"] {{fill: #15191e !important}} '
    f'[style*="stroke: {FAINT}"] {{stroke: #444c56 !important}} '
    f'[style*="fill: {BLUE}"] {{fill: #3d9fe0 !important}} '
    f'[style*="stroke: {BLUE}"] {{stroke: #3d9fe0 !important}}'
    "}</style>"
)
_SETTINGS = {
    "svg.hashsalt": "preftune",
    "svg.fonttype": "none",
    "text.parse_math": False,  # a "$" in a name is a dollar
    "font.family": ["DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.facecolor": PAPER,
    "figure.facecolor": PAPER,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.titlesize": 10,
}

# What to look at first, per stage; metrics that a stage does not log are passed over.
FIRST = (
    "loss", "accuracy", "rewards/accuracies", "margin", "rewards/margins", "objective/scores", "reward",
    "objective/kl", "kl", "completions/mean_length", "completions/clipped_ratio", "policy/clipfrac_avg",
    "frac_reward_zero_std", "loss/value_avg", "val/explained_variance", "policy/entropy_avg", "entropy",
    "grad_norm",
)  # fmt: skip
SKIPPED = frozenset({"step", "time", "learning_rate", "lr_factor", "epoch", "step_seconds", "kl_coef"})


def draw(run: RunView) -> dict[str, tuple[str, str]]:
    """All figures that this run has numbers for: file name -> (SVG text, alternative text)."""
    figures: dict[str, tuple[str, str]] = {}
    with matplotlib.rc_context(_SETTINGS):
        if any(policy.reward and policy.kl for policy in run.policies):
            figures["reward_kl.svg"] = (_trade_off(run, _reward, "Reward model score"), _reward_kl_words(run))
        if any(policy.gold and policy.kl for policy in run.policies):
            words = "The same with the world's gold score, which training never saw, in place of the reward."
            figures["reward_kl_gold.svg"] = (_trade_off(run, _gold, "Gold score"), words)
        if spread := _scores(run):
            listed = ", ".join(run.label(policy) for policy in spread)
            words = f"Scores of the saved samples, a row of points for each policy: {listed}."
            figures["reward_distribution.svg"] = (_distribution(run, spread), words)
        model = run.reward_model
        if model and model.margin_counts and len(model.margin_edges) == len(model.margin_counts) + 1:
            words = "Histogram of the reward model's margins on held-out pairs; left of zero it is wrong."
            figures["reward_model_margins.svg"] = (_margins(model.margin_edges, model.margin_counts), words)
        for stage in run.stages:
            curves = _curves(stage)
            if curves:
                listed = ", ".join(clean(key, 40) for key in curves)
                words = f"Training curves of stage {clean(stage.name, 40)}: {listed}."
                figures[f"training_{file_part(stage.name)}.svg"] = (_training(stage, curves), words)
    return figures


def file_part(stage: str) -> str:
    """A stage's name as part of a file name and of a link."""
    return "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in stage)[:60]


def _save(figure: Figure) -> str:
    """The figure as SVG text without a date, with the dark colours added."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    head, mark, rest = text.partition("<defs>")
    return f"{head}{_DARK}{mark}{rest}"


def _new(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


# --- reward against KL --------------------------------------------------------------------------------------


def _reward(policy: PolicyView) -> Estimate | None:
    return policy.reward


def _gold(policy: PolicyView) -> Estimate | None:
    return policy.gold


def _styles(run: RunView) -> dict[str, tuple[str, str, int]]:
    """Colour, marker and size for each policy, the same in all figures; reference and best-of-n in ink."""
    shapes = cycle(zip(COLOURS, MARKERS, strict=True))
    styles = {}
    for policy in run.policies:
        fixed = (
            (INK, "*", 11) if policy.best_of else (INK, "D", 7) if policy.policy == run.reference else None
        )
        styles[policy.policy] = fixed or (*next(shapes), 7)
    return styles


def _trade_off(run: RunView, value: Callable[[PolicyView], Estimate | None], label: str) -> str:
    """A value against KL to the reference: points with intervals both ways, labelled in place."""
    figure, (axes,) = _new(1, 1, 5.4, 3.9)
    styles = _styles(run)
    points = [(policy, policy.kl, value(policy)) for policy in run.policies]
    shown = [(policy, x, y) for policy, x, y in points if _finite(x) and _finite(y)]
    farthest = max((x.value for _, x, _ in shown), default=0.0)
    for policy, x, y in shown:
        at = max(x.value, 0.0)
        colour, marker, size = styles[policy.policy]
        axes.errorbar(
            [at], [y.value], xerr=_bars(x), yerr=_bars(y), fmt=marker, color=colour, capsize=3,
            markersize=size, elinewidth=1.2, clip_on=False, zorder=3,
        )  # fmt: skip
        left = at > farthest / 3  # right of the middle of a square-root axis: the label goes to the left
        axes.annotate(
            clean(policy.label, 30), (at, y.value), xytext=(-7 if left else 7, 6), textcoords="offset points",
            ha="right" if left else "left", color=INK, fontsize=9,
        )  # fmt: skip
    axes.set_xscale("function", functions=(_root, _square))
    axes.set_xlim(left=0)
    axes.margins(x=0.1, y=0.15)
    axes.set_xlabel(
        f"KL(policy || {clean(run.label(run.reference), 30)}), nats per response (square-root axis)"
    )
    axes.set_ylabel(f"{label} (mean, 95 % interval)")
    return _save(figure)


def _finite(estimate: Estimate | None) -> TypeGuard[Estimate]:
    return estimate is not None and math.isfinite(estimate.value)


def _root(x: Any) -> Any:  # arrays; matplotlib asks for values left of zero too
    return abs(x) ** 0.5 * (2.0 * (x > 0) - 1.0)


def _square(x: Any) -> Any:
    return x * abs(x)


def _bars(estimate: Estimate) -> list[list[float]] | None:
    """An interval as distances below and above the value, (2, 1), never negative, as errorbar wants them."""
    if estimate.low is None or estimate.high is None:
        return None
    if not (math.isfinite(estimate.low) and math.isfinite(estimate.high)):
        return None
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]


def _reward_kl_words(run: RunView) -> str:
    points = [
        f"{clean(policy.label, 30)} reward {policy.reward.value:.2f} at KL {kl_text(policy)}"
        for policy in run.policies
        if policy.reward and policy.kl
    ]
    return f"Reward against KL to the reference in nats per response: {'; '.join(points)}."


# --- distributions ------------------------------------------------------------------------------------------


def _scores(run: RunView) -> dict[str, list[float]]:
    """Finite scores of the saved samples by policy."""
    found: dict[str, list[float]] = {}
    for policy, rows in run.samples.items():
        values = [float(row["score"]) for row in rows if isinstance(row.get("score"), int | float)]
        if values := sorted(value for value in values if math.isfinite(value)):
            found[policy] = values
    return found


def _distribution(run: RunView, spread: dict[str, list[float]]) -> str:
    """A row of points for each policy, spread up and down so that none hides another; a bar at the median."""
    figure, (axes,) = _new(1, 1, 5.4, 0.8 + 0.42 * len(spread))
    styles = _styles(run)
    for row, (policy, ordered) in enumerate(spread.items()):
        colour = styles[policy][0] if policy in styles else INK
        heights = [row + 0.22 * (index % 3 - 1) for index in range(len(ordered))]
        axes.plot(ordered, heights, "o", color=colour, alpha=0.7, markersize=4.5, markeredgewidth=0)
        middle = ordered[len(ordered) // 2]
        axes.plot([middle, middle], [row - 0.38, row + 0.38], color=INK, linewidth=2)
    axes.set_yticks(range(len(spread)), [clean(run.label(policy), 30) for policy in spread])
    axes.invert_yaxis()
    axes.set_xlabel("Score of each saved sample (normalised); bar: median")
    return _save(figure)


def _margins(edges: Sequence[float], counts: Sequence[float]) -> str:
    """Margins on held-out pairs; the wrong side is another colour and hatched."""
    figure, (axes,) = _new(1, 1, 5.4, 3.0)
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        wrong = (left + right) / 2 < 0
        axes.bar(
            left, count, width=right - left, align="edge", color=WRONG if wrong else RIGHT, edgecolor=PAPER,
            linewidth=0.5, hatch="//" if wrong else None,
        )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.set_xlabel("Score of chosen − rejected, raw (hatched: wrong)")
    axes.set_ylabel("Held-out pairs")
    return _save(figure)


# --- training curves ----------------------------------------------------------------------------------------


def _curves(stage: StageView) -> dict[str, list[tuple[float, float]]]:
    """Up to MAX_PANELS metrics of a stage as (step, value) points: the known ones first, then by name."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in stage.metrics:
        step = row.get("step")
        for key, value in row.items():
            plain = isinstance(value, int | float) and not isinstance(value, bool)
            if plain and key not in SKIPPED and isinstance(step, int) and math.isfinite(value):
                found.setdefault(key, []).append((float(step), float(value)))
    known = [key for key in FIRST if key in found]
    keys = known + sorted(set(found) - set(known))
    return {key: found[key] for key in keys[:MAX_PANELS]}


def _training(stage: StageView, curves: dict[str, list[tuple[float, float]]]) -> str:
    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure, axes = _new(rows, columns, 3.2 * columns + 0.4, 2.2 * rows + 0.5)
    figure.suptitle(clean(stage.name, 40), x=0.01, ha="left", fontsize=11, fontweight="bold")
    for panel, (key, points) in zip(axes, curves.items(), strict=False):
        shown = list(_thinned(points))
        steps, values = [step for step, _ in shown], [value for _, value in shown]
        many = len(shown) > 10
        panel.plot(
            steps, values, color=RIGHT, alpha=0.35 if many else 1.0, marker="" if many else "o", markersize=3
        )
        if many:
            panel.plot(steps, list(_running_mean(values)), color=RIGHT, linewidth=1.8)
        panel.set_title(clean(key, 40))
        panel.set_xlabel("step")
        panel.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    for panel in axes[len(curves) :]:
        panel.set_axis_off()
    return _save(figure)


def _thinned(points: list[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    """At most MAX_POINTS points: means over runs of neighbours."""
    size = math.ceil(len(points) / MAX_POINTS)
    for start in range(0, len(points), size):
        part = points[start : start + size]
        yield sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part)


def _running_mean(values: list[float]) -> Iterator[float]:
    """Mean over a window of a tenth of the curve, centred, shorter at both ends."""
    half = max(1, len(values) // 20)
    for index in range(len(values)):
        part = values[max(0, index - half) : index + half + 1]
        yield sum(part) / len(part)
