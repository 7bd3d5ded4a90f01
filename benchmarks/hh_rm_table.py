"""docs/studies/hh-rm/STUDY.md from the cells of benchmarks/hh_rm.py: every number of it is computed here."""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from preftune.evaluation import stats
from preftune.evaluation.calibration import calibration
from preftune.evaluation.pooled import seed_widening
from preftune.records.verdict import Z80, Z95

FAR = 160_000  # pairs of the public HH-RLHF, about
RESAMPLES = 2000
SHORT = {
    "harmless-base": "harmless",
    "helpful-base": "helpful-base",
    "helpful-online": "online",
    "helpful-rejection-sampled": "rejection-sampled",
}
LABELS = {
    "length": "length (two weights)",
    "bag": "bag of words (the audit's)",
    "terms": "words and pairs of words",
    "terms-by-kind": "the same, told the kind of pair",
    "terms-by-prompt": "the same, guessing the kind from the prompt",
    "probe": "linear probe of SmolLM2's frozen states",
    "probe-by-prompt": "the same, two probes, mixed by the prompt",
    "hh-scratch": "`hh-scratch`'s reward model",
    "smollm2-top6": "SmolLM2 top:6",
    "smollm2-top6-experts": "SmolLM2 top:6, one expert for each kind",
    "smollm2-top6-experts-mean": "experts, mean over the reply, head fitted first",
    "smollm2-top6-experts-mean-few": "experts, mean, fitted head; at most 3,314 pairs of a kind",
    "smollm2-top6-experts-mean-alike": "experts, mean, fitted head; without single-turn pairs",
    "smollm2-top6-two-epochs": "SmolLM2 top:6, two epochs",
    "smollm2-top12": "SmolLM2 top:12",
    "smollm2-top12-two-epochs": "SmolLM2 top:12, two epochs",
    "smollm2-top6-of-five": "SmolLM2 top:6, ensemble of five",
    "smollm2-lora": "SmolLM2 LoRA",
    "smollm2-dpo": "SmolLM2 top:6, DPO's implicit reward",
}
ALPHAS = np.linspace(0.05, 1.0, 20)  # exponents tried for the power law

Cells = dict[str, dict[int, list[dict[str, Any]]]]  # row -> training pairs -> one cell a seed


def load(results: Path) -> tuple[dict[str, Any], Cells]:
    cells: Cells = defaultdict(lambda: defaultdict(list))
    about = json.loads((results / "pairs.json").read_text(encoding="utf-8"))
    for file in sorted(results.glob("*-*.json")):
        cell = json.loads(file.read_text(encoding="utf-8"))
        cells[cell["row"]][cell["pairs"]].append(cell)
    return about, {row: dict(sorted(cells[row].items())) for row in LABELS if row in cells}


def right(cell: Mapping[str, Any]) -> np.ndarray:
    """1 where the pair is in the right order, 0 where not, a half for a tie: (n,)."""
    margins = np.array(cell["margins"])
    return (margins > 0) + 0.5 * (margins == 0)


def residual(cell: Mapping[str, Any], about: Mapping[str, Any]) -> np.ndarray:
    """Margins without what length explains of them."""
    return np.array(cell["margins"]) - cell["slope"] * lengths(cell, about)


def lengths(cell: Mapping[str, Any], about: Mapping[str, Any]) -> np.ndarray:
    return np.array(about["log_lengths"])[cell["validation"]]


def group(cell: Mapping[str, Any], about: Mapping[str, Any], source: str | None) -> np.ndarray:
    """Which of the cell's pairs are of a source; None: all."""
    names = np.array(about["sources"])[cell["validation"]]
    return names == source if source else np.ones(len(names), dtype=bool)


def share(seeds: Sequence[np.ndarray]) -> str:
    """Accuracy with its interval: over pairs (Wilson) for one seed, over seeds and pairs for more."""
    if len(seeds) > 1:
        return interval(seeds, ".3f")
    low, high = stats.wilson(float(seeds[0].sum()), len(seeds[0]))
    return f"{seeds[0].mean():.3f} [{low:.3f}, {high:.3f}]"


def interval(seeds: Sequence[np.ndarray], form: str = "+.3f") -> str:
    """The mean over seeds and pairs, with its bootstrap interval."""
    mean = float(np.mean(seeds))
    low, high = np.quantile(redrawn([seeds])[:, 0], [0.025, 0.975])
    return f"{mean:{form}} [{min(low, mean):{form}}, {max(high, mean):{form}}]"


@cache
def resampling(n: int) -> np.ndarray:
    """The weight of each of n pairs in each resample: (R, n)."""
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n


def redrawn(whole: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Means of several sets of seeds in each resample: (R, sets). The same pairs are redrawn for all seeds
    and sets, which share them (`pooled_means` would draw anew for each seed), then seeds within each set,
    whose deviations are widened for their number.
    """
    draw, weights = np.random.default_rng(1), resampling(len(whole[0][0]))
    points = np.empty((RESAMPLES, len(whole)))
    for i, seeds in enumerate(whole):
        means = weights @ np.stack(seeds, axis=1)  # (R, seeds)
        chosen = draw.integers(len(seeds), size=means.shape)
        centre = means.mean(1)
        deviation = np.take_along_axis(means, chosen, axis=1).mean(1) - centre
        points[:, i] = centre + seed_widening(len(seeds)) * deviation
    return points


def against(cells: Sequence[dict[str, Any]], rule: dict[str, Any]) -> list[np.ndarray]:
    """Right minus the rule's right, on the pairs that both have judged."""
    theirs = dict(zip(rule["validation"], right(rule), strict=True))
    return [right(c) - np.array([theirs[i] for i in c["validation"]]) for c in cells]


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(each)} |" for each in (headers, *rows)]
    return [head, "|" + "---|" * len(headers), *body]


def largest(cells: Cells, row: str) -> tuple[int, list[dict[str, Any]]]:
    return max(cells[row].items())


def accuracies(about: Mapping[str, Any], cells: Cells) -> list[str]:
    rows = []
    for row in cells:
        n, made = largest(cells, row)
        found = [share([right(c)[group(c, about, source)] for c in made]) for source in (None, *SHORT)]
        rows.append([LABELS[row], f"{n:,}", str(len(made)), f"{len(made[0]['margins']):,}", *found])
    headers = ["row", "pairs", "seeds", "validation", "all", *SHORT.values()]
    return table(headers, rows)


def differences(about: Mapping[str, Any], cells: Cells) -> list[str]:
    """Each row against bag of words and length, which had all pairs."""
    rules = {rule: largest(cells, rule)[1][0] for rule in ("bag", "length") if rule in cells}
    rows = []
    for row in cells:
        _, made = largest(cells, row)
        found = []
        for rule, cell in rules.items():
            if rule == row:
                found += ["", "", ""]
                continue
            parts = against(made, cell)
            for source in (None, "harmless-base", "helpful"):
                found.append(interval([p[_kind(c, about, source)] for p, c in zip(parts, made, strict=True)]))
        rows.append([LABELS[row], *found])
    kinds = ("all", "harmless", "helpful")
    names = [f"− {LABELS[rule].split(' (')[0]}, {kind}" for rule in rules for kind in kinds]
    return table(["row", *names], rows)


def _kind(cell: Mapping[str, Any], about: Mapping[str, Any], kind: str | None) -> np.ndarray:
    if kind == "helpful":
        return ~group(cell, about, "harmless-base")
    return group(cell, about, kind)


def calibrations(cells: Cells) -> list[str]:
    rows = []
    for row in cells:
        cell = largest(cells, row)[1][0]
        found = calibration(np.array(cell["margins"]), 0, RESAMPLES)
        temperature = found["temperature"]["value"]
        numbers = [found["ece"], found["ece_if_calibrated"], found["brier"], temperature]
        rows.append([LABELS[row], *(f"{x:.3f}" if math.isfinite(x) else "∞" for x in numbers)])
    return table(["row", "calibration error", "by chance up to", "Brier", "temperature"], rows)


def lengthless(about: Mapping[str, Any], cells: Cells) -> list[str]:
    """Each row's audit by length, as it is and as a residual on length; its first seed."""
    rows = []
    for row in cells:
        cell = largest(cells, row)[1][0]
        gaps = lengths(cell, about)
        for what, margins in (("", np.array(cell["margins"])), (", residual", residual(cell, about))):
            hits = (margins > 0) + 0.5 * (margins == 0)
            longer, shorter = hits[gaps > 0], hits[gaps < 0]
            change = "" if not what else interval([hits - right(cell)])
            correlation = float(np.corrcoef(margins, gaps)[0, 1]) if margins.std() > 1e-9 else 0.0
            shown = [f"{correlation:+.2f}", f"{longer.mean():.3f}", f"{shorter.mean():.3f}"]
            rows.append([LABELS[row] + what, *shown, share([hits]), change])
    headers = ["row", "correlation with length", "chosen longer", "rejected longer", "all", "change"]
    return table(headers, rows)


def curve(cells: Cells) -> list[str]:
    """Accuracy by number of training pairs."""
    rows = []
    for row, by_count in cells.items():
        for n, made in by_count.items() if len(by_count) > 1 else ():
            rows.append([LABELS[row], f"{n:,}", str(len(made)), share([right(c) for c in made])])
    return table(["row", "pairs", "seeds", "accuracy"], rows)


def fits(cells: Cells) -> list[str]:
    """Both fits of each row with three points or more, and what they say of all of HH."""
    rows = []
    for row, by_count in cells.items():
        if len(by_count) < 3:
            continue
        counts = np.array(list(by_count), dtype=float)
        whole = [[right(c) for c in made] for made in by_count.values()]
        points = np.array([np.mean([each.mean() for each in seeds]) for seeds in whole])
        drawn = redrawn(whole)
        line, power = (fit(counts, points[None])[:, 0] for fit in (by_log, by_power))
        lines, powers = (fit(counts, drawn)[2] for fit in (by_log, by_power))
        rows.append(
            [
                LABELS[row],
                f"{line[1] * math.log(2):+.4f} a doubling, root mean square {line[3]:.4f}",
                _far(line[2], lines),
                f"{power[0]:.3f} + {power[1]:.2f} n^-{power[4]:.2f}, {power[3]:.4f}",
                _far(power[2], powers),
            ]
        )
    headers = ["row", "accuracy by ln n", f"at {FAR:,}", "error as a power law", f"at {FAR:,}"]
    return table(headers, rows)


def _far(value: float, drawn: np.ndarray) -> str:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{value:.3f} [{min(low, value):.3f}, {max(high, value):.3f}]"


def by_log(counts: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Least squares of accuracy = a + b ln n for each row of points (R, counts): a, b, accuracy at FAR, root
    mean square of the residuals: (4, R).
    """
    a, b = _line(np.log(counts), points)
    rest = points - a[:, None] - b[:, None] * np.log(counts)
    return np.stack([a, b, a + b * math.log(FAR), np.sqrt((rest**2).mean(1))])


def by_power(counts: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Least squares of error = e + c n^-α, e and c at least 0, α of a grid (Hestness et al.,
    arXiv:1712.00409): e, c, accuracy at FAR, root mean square of the residuals, α: (5, R).
    """
    errors, tried = 1 - points, []
    for alpha in ALPHAS:
        x = counts**-alpha
        e, c = _line(x, errors)
        e, c = np.where(c < 0, errors.mean(1), e), np.maximum(c, 0)
        e, c = np.maximum(e, 0), np.where(e < 0, errors @ x / (x @ x), c)
        rest = errors - e[:, None] - c[:, None] * x
        miss = np.sqrt((rest**2).mean(1))
        tried.append(np.stack([e, c, 1 - e - c * FAR**-alpha, miss, np.full_like(e, alpha)]))
    every = np.stack(tried)  # (α, 5, R)
    return np.take_along_axis(every, every[:, 3].argmin(0)[None, None], axis=0)[0]


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intercepts and slopes of the rows of y (R, n) over x (n,)."""
    centred = x - x.mean()
    slope = y @ centred / (centred @ centred)
    return y.mean(1) - slope * x.mean(), slope


def detectable(about: Mapping[str, Any], cells: Cells) -> list[str]:
    """The least difference that so many pairs show in four of five studies: two-sided 5 %, Connor 1987."""
    names, rows = np.array(about["sources"]), []
    rule, other = (largest(cells, row)[1][0] for row in ("bag", "length"))
    discordant = np.abs(right(rule) - right(other)) > 0.5
    for what, those in (
        ("all", np.ones(len(names), dtype=bool)),
        *((SHORT[source], names == source) for source in SHORT),
        ("helpful, three sources", names != "harmless-base"),
    ):
        n = int(those.sum())
        d = float(discordant[those[rule["validation"]]].mean())
        chance = next(p for p in np.arange(0.5005, 1, 0.0005) if (stats.pairs_needed(p) or n + 1) <= n)
        found = [f"{(Z95 + Z80) * math.sqrt(share / n):.3f}" for share in (d, 0.3, 0.45)]
        rows.append([what, f"{n:,}", f"{chance:.3f}", f"{d:.2f}", *found])
    headers = ["pairs of", "n", "differs from chance from", "bag and length disagree on"]
    return table([*headers, "difference shown, then", "at 30 %", "at 45 %"], rows)


def study(results: Path) -> str:
    about, cells = load(results)
    left = ", ".join(f"{n} {reason.replace('_', ' ')}" for reason, n in sorted(about["left_out"].items()))
    sources = ", ".join(f"{name} {n:,}" for name, n in sorted(about["train_sources"].items()))
    parts = [
        "# Reward models on HH: the tables",
        "Made by `python benchmarks/hh_rm.py table` from the cells under benchmarks/results/hh_rm; what it "
        "says stands in [../README.md](../README.md).",
        f"{about['train']:,} training pairs ({sources}); left out: {left}. {len(about['sources']):,} "
        "validation pairs, read once a cell, with settings chosen on a tenth of the cell's training pairs, "
        "cut by prompt. A share of the pairs is drawn by the seed. Intervals: 95 %; over pairs for one seed "
        "(Wilson for a share), over seeds and pairs for more. Ties count half.",
    ]
    for title, lines in (
        ("Accuracy at each row's most pairs", accuracies(about, cells)),
        ("Against the rules, pair by pair", differences(about, cells)),
        ("What so many pairs can show", detectable(about, cells)),
        ("Calibration (first seed)", calibrations(cells)),
        ("Length (first seed)", lengthless(about, cells)),
        ("Learning curve", curve(cells)),
        (f"Fits of the curve, and what they say at {FAR:,} pairs", fits(cells)),
    ):
        parts.append("\n".join([f"## {title}", "", *lines]))
    return "\n\n".join(parts) + "\n"
