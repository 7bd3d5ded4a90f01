"""The figures of the reward model: margins, reliability, accuracy by group, score by length."""

from collections.abc import Mapping, Sequence

from preftune.records.base import Estimate
from preftune.records.reward_model import RewardModelRecord
from preftune.report.plots.drawing import FAINT, GREEN, INK, PAPER, RIGHT, WRONG, bars, new, save
from preftune.report.text import clean

LENGTH_GROUPS = {"chosen_longer": "chosen response longer", "rejected_longer": "rejected response longer"}
BOTH = "#8c959f"
MAX_GROUPS = 12  # of one kind, the largest first


def margins(edges: Sequence[float], counts: Sequence[float]) -> str:
    """Margins on held-out pairs; the wrong side is another colour and hatched, a bin around zero is grey."""
    figure, axes = new(5.4, 3.0)
    for left, right, count in zip(edges[:-1], edges[1:], counts, strict=True):
        wrong, around_zero = right <= 0, left < 0 < right
        axes.bar(
            left, count, width=right - left, align="edge", edgecolor=PAPER, linewidth=0.5,
            color=BOTH if around_zero else WRONG if wrong else RIGHT, hatch="//" if wrong else None,
        )  # fmt: skip
    axes.axvline(0, color=INK, linewidth=1.2)
    axes.set_xlabel("Score of chosen − rejected, raw (hatched: wrong; grey: some are)")
    axes.set_ylabel("Held-out pairs")
    return save(figure)


def reliability(model: RewardModelRecord) -> str:
    """How often it is right against how sure it is; below the diagonal it is too sure of itself."""
    figure, axes = new(5.4, 3.6)
    axes.plot([0.5, 1], [0.5, 1], color=FAINT, linewidth=1.5, linestyle=(0, (5, 3)))
    for bin in model.reliability:
        if bin.accuracy is None or bin.confidence is None:
            continue
        axes.errorbar(
            [bin.confidence], [bin.accuracy.value], yerr=bars(bin.accuracy), fmt="o", color=RIGHT,
            capsize=3, markersize=6, elinewidth=1.2,
        )  # fmt: skip
        axes.annotate(
            f"{bin.n}", (bin.confidence, bin.accuracy.value), xytext=(6, -10),
            textcoords="offset points", fontsize=7.5, color=INK,
        )  # fmt: skip
    axes.set_xlim(0.49, 1.01)
    axes.set_xlabel("Confidence, sigmoid of |margin| (dashed: as sure as right; numbers: pairs)", fontsize=9)
    axes.set_ylabel("Share right (95 % interval)")
    return save(figure)


def by_length(model: RewardModelRecord) -> str:
    """Mean score of chosen and rejected responses against their length; a slope that both share is a taste
    for length, the gap between them is what it knows beside it.
    """
    figure, axes = new(5.4, 3.6)
    chosen = [(bin.length, bin.chosen) for bin in model.score_by_length if bin.chosen]
    rejected = [(bin.length, bin.rejected) for bin in model.score_by_length if bin.rejected]
    sides = (("chosen", chosen, RIGHT, "o-"), ("rejected", rejected, WRONG, "s--"))
    for label, points, colour, shape in sides:
        lengths, scores = [length for length, _ in points], [score.value for _, score in points]
        axes.plot(lengths, scores, shape, label=label, color=colour, linewidth=1.2, markersize=5)
        for length, score in points:
            axes.errorbar([length], [score.value], bars(score), color=colour, capsize=2.5, elinewidth=1.2)
    axes.legend(frameon=False, fontsize=9)
    axes.set_xlabel("Length of the response, tokens")
    axes.set_ylabel("Mean raw score (95 % interval)")
    return save(figure)


def groups(model: RewardModelRecord) -> dict[str, Mapping[str, Estimate]]:
    """Accuracies by kind of group, the largest sources first; groups without a pair are left out."""
    sources = sorted(model.by_source.items(), key=lambda item: -(item[1].n or 0))[:MAX_GROUPS]
    sides = {LENGTH_GROUPS.get(side, side): share for side, share in model.by_length.items()}
    finer = {f"chosen − rejected {span}": share for span, share in model.by_length_difference.items()}
    turns = {f"human turns: {count}": share for count, share in model.by_turns.items()}
    accuracies = {"source": dict(sources), "length": finer or sides, "turns": turns}
    return {kind: rows for kind, rows in accuracies.items() if rows}


def by_group(model: RewardModelRecord) -> str:
    """Accuracy with its interval for every group, against chance and the best baseline."""
    rows = [("all pairs", model.accuracy)] if model.accuracy else []
    for group in groups(model).values():
        rows += [(clean(label, 40), share) for label, share in group.items()]
    figure, axes = new(5.6, 0.9 + 0.27 * len(rows))
    if model.band is not None and model.band.low is not None and model.band.high is not None:
        axes.axvspan(100 * model.band.low, 100 * model.band.high, color=GREEN, alpha=0.13, linewidth=0)
    axes.axvline(50, color=INK, linewidth=1.2)
    best = max((share.value for share in model.baselines.values()), default=None)
    if best is not None:
        axes.axvline(100 * best, color=WRONG, linewidth=1.2, linestyle=(0, (4, 3)))
    for row, (_, share) in enumerate(rows):
        percent = Estimate(
            value=100 * share.value,
            low=None if share.low is None else 100 * share.low,
            high=None if share.high is None else 100 * share.high,
        )
        axes.errorbar(
            [percent.value], [row], xerr=bars(percent), fmt="D" if row == 0 else "o", color=RIGHT,
            capsize=2.5, markersize=5, elinewidth=1.2,
        )  # fmt: skip
    names = [f"{label} ({share.n:,})" if share.n else label for label, share in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8.5)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("Accuracy, %")
    return save(figure)
