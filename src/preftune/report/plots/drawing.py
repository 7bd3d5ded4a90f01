"""What all figures share: colours, type, SVG text. The same bytes for the same numbers, readable in the dark.

Text stays text (selectable, small). Ink and paper are swapped by a media query inside the SVG when the reader
prefers dark; data colours are Okabe and Ito's, which work on both, and shape or position always says the same
as colour. No pyplot: nothing global is touched.
"""

import io
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from preftune.records.base import Estimate
from preftune.report.view import RunView

INK, PAPER, FAINT = "#24292f", "#ffffff", "#c8ccd0"
BLUE = "#0072b2"  # the one data colour that needs more light on a dark page
GREEN = "#009e73"
COLOURS = (BLUE, "#d55e00", GREEN, "#cc79a7", "#e69f00", "#56b4e9")
WRONG, RIGHT = "#d55e00", BLUE
MARKERS = ("o", "s", "^", "v", "P", "X")
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
SETTINGS: dict[Any, Any] = {
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


def save(figure: Figure) -> str:
    """The figure as SVG text without a date, with the dark colours added."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    head, mark, tail = text.partition("<defs>")
    return f"{head}{_DARK}{mark}{tail}"


def new(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one panel, in inches, whose margins follow its labels."""
    figure = Figure(figsize=(width, height), dpi=72, layout="constrained")  # dpi of SVG: points
    return figure, figure.subplots()


def styles(run: RunView) -> dict[str, tuple[str, str, int]]:
    """Colour, marker and size for each policy, the same in all figures; reference and best-of-n in ink."""
    shapes = cycle(zip(COLOURS, MARKERS, strict=True))
    by_policy = {}
    for policy in run.policies:
        fixed = (
            (INK, "*", 11) if policy.best_of else (INK, "D", 7) if policy.policy == run.reference else None
        )
        by_policy[policy.policy] = fixed or (*next(shapes), 7)
    return by_policy


def bars(estimate: Estimate) -> list[list[float]] | None:
    """An interval as distances below and above the value, (2, 1), never negative, as errorbar wants them."""
    if estimate.low is None or estimate.high is None:
        return None
    return [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]
