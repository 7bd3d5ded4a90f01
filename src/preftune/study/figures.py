"""Figures of a study as SVG, in the style of the report's."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from preftune.report.plots.drawing import BLUE, COLOURS, INK, MARKERS, SETTINGS, save
from preftune.study.former import todays_words
from preftune.study.sweep import from_record, sweeps_of

GOLD, SCORE = BLUE, "#d55e00"
Study = Mapping[str, Any]


def draw(study: Study) -> dict[str, str]:
    """File name -> SVG text."""
    study = todays_words(study)
    with matplotlib.rc_context(SETTINGS):
        figures = {"gains.svg": _gains(study), "kl.svg": _distances(study)}
        if study["sweep"] is not None:
            figures["sweep.svg"] = _sweep(study)
        if study.get("frontier"):
            figures["frontier.svg"] = _frontier(study)
    return figures


def _panels(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A row of panels, in inches."""
    figure = Figure(figsize=(width, height), dpi=72, layout="constrained")  # dpi of SVG: points
    return figure, list(figure.subplots(1, columns, squeeze=False).flat)


def _policies_shown(study: Study) -> list[str]:
    return [name for name in study["policies"] if name not in (study["reference"], "base")]


def _gains(study: Study) -> str:
    """Gold gain of every policy: pooled interval and one point a seed; a panel a prompt set."""
    names, kinds = _policies_shown(study), study["prompt_sets"]
    figure, panels = _panels(len(kinds), 3.2 * len(kinds) + 1.4, 0.42 * len(names) + 1.5)
    for column, (axes, kind) in enumerate(zip(panels, kinds, strict=True)):
        for row, name in enumerate(reversed(names)):
            pooled = study["policies"][name]["sets"][kind]
            ends = [pooled["gold_gain_low"], pooled["gold_gain_high"]]
            axes.plot(ends, [row, row], color=INK, linewidth=2)
            axes.plot([pooled["gold_gain"]], [row], "D", color=INK, markersize=6)
            for seed in study["seeds"]:
                policy = seed["policies"][name]
                marker, colour = ("x", SCORE) if policy["collapsed"] else ("o", GOLD)
                gain = policy["sets"][kind]["gold_gain"]
                axes.plot([gain], [row + 0.22], marker, color=colour, markersize=4)
        axes.axvline(0, color=INK, linewidth=0.8)
        labels = [study["policies"][name]["label"] for name in reversed(names)]
        axes.set_yticks(range(len(names)), labels if column == 0 else [""] * len(names))
        axes.set_ylim(-0.6, len(names) - 0.3)
        axes.set_title(kind)
        axes.set_xlabel("gold gain over SFT")
    return save(figure)


def _distances(study: Study) -> str:
    """Gold and score gain against √KL: best-of-n as a line, policies as points, one a seed."""
    figure, panels = _panels(2, 8.6, 3.8)
    for axes, gain, label in zip(panels, ("gold_gain", "score_gain"), ("gold", "score"), strict=True):
        _best_of_n(axes, study["best_of_n"], gain, INK)
        for i, name in enumerate(_policies_shown(study)):
            if name.startswith("best_of_"):
                continue
            policies = [p for seed in study["seeds"] if (p := seed["policies"][name])["kl"] is not None]
            x = [max(p["kl"], 0.0) ** 0.5 for p in policies]
            y = [p[gain] for p in policies]
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            label_of = study["policies"][name]["label"]
            axes.plot(x, y, marker, color=colour, markersize=5, label=label_of)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("√KL to SFT (nats per response)")
        axes.set_ylabel(f"{label} gain over SFT")
    panels[0].legend(fontsize=8, frameon=False)
    return save(figure)


def _best_of_n(axes: Axes, curve: Sequence[Mapping[str, Any]], gain: str, colour: str) -> None:
    d = [point["kl"] ** 0.5 for point in curve]
    axes.plot(d, [point[gain] for point in curve], color=colour, linewidth=1.2, label="best-of-n")
    low, high = ([point[f"{gain}_{end}"] for point in curve] for end in ("low", "high"))
    axes.fill_between(d, low, high, color=colour, alpha=0.12, linewidth=0)


def _sweep(study: Study) -> str:
    """Gold and score against √KL for each swept setting and, last, for best-of-n, with the laws."""
    sweeps = sweeps_of(study)
    figure, panels = _panels(len(sweeps) + 1, 4.3 * (len(sweeps) + 1), 3.8)
    panel_data = [(sweep["key"], sweep["points"], sweep["laws"], "rl", 5) for sweep in sweeps]
    panel_data.append(("best-of-n", sweeps[0]["best_of_n"], sweeps[0]["laws"], "bon", 4))
    for axes, (title, points, laws, kind, size) in zip(panels, panel_data, strict=True):
        d = [point["sqrt_kl"] for point in points]
        for word, colour, marker in (("gold", GOLD, "o"), ("score", SCORE, "s")):
            gains = [point[f"{word}_gain"] for point in points]
            axes.plot(d, gains, marker, color=colour, markersize=size, label=word)
            _law(axes, laws[f"{kind}_{word}"], max(d, default=0.0), colour)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("√KL to SFT (nats per response)")
        axes.set_ylabel("gain over SFT")
    panels[0].legend(fontsize=8, frameon=False)
    return save(figure)


def _frontier(study: Study) -> str:
    """Gold against √KL, a line for each swept method and one for best-of-n; bars are intervals over seeds and
    prompts (Rafailov et al. 2023, figure 2 left).
    """
    figure, (axes,) = _panels(1, 5.6, 4.0)
    _best_of_n(axes, study["best_of_n"], "gold_gain", INK)
    methods = {row["setting"]: row["method"] for row in study["frontier"]}
    for i, sweep in enumerate(sweeps_of(study)):
        if sweep["key"] not in methods:
            continue
        with_kl = [point for point in sweep["means"] if point["sqrt_kl"] is not None]
        points = sorted(with_kl, key=lambda point: point["sqrt_kl"])
        gain, low, high = (
            np.array([point[f"gold_gain{end}"] for point in points], float) for end in ("", "_low", "_high")
        )
        axes.errorbar(
            [point["sqrt_kl"] for point in points],
            gain,
            yerr=[gain - low, high - gain],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=5,
            linewidth=1.2,
            elinewidth=0.8,
            label=f"{methods[sweep['key']]} ({sweep['key'].split('.')[-1]} swept)",
        )
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("√KL to SFT (nats per response)")
    axes.set_ylabel("gold gain over SFT")
    axes.legend(fontsize=8, frameon=False, loc="upper left")  # gains begin below it
    return save(figure)


def _law(axes: Axes, record: Mapping[str, Any] | None, farthest: float, colour: str) -> None:
    if record is not None and farthest > 0:
        d = np.linspace(farthest / 200, farthest, 200)
        axes.plot(d, from_record(record)(d), color=colour, linewidth=1.2, linestyle="--")
