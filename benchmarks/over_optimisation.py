"""Over-optimisation on real text: PPO without a KL penalty, against one reward model and against ensembles.

    PREFTUNE_REVIEWS=DATA python benchmarks/over_optimisation.py run DATA WORK [--only NAME]
    python benchmarks/over_optimisation.py figure

`run` makes one run of the recipe `sentiment` for each of SETTINGS below WORK, all from the same SFT model and
pairs (Gao et al., arXiv:2210.10760; Coste et al., arXiv:2310.02743). It resumes, and several may run at a
time with --only: all but the first take the pairs from it, and other ensembles the members of the first. At
every step the judges that nothing learns from are measured on the responses that PPO learns from. What a run
gave goes to benchmarks/results/over_optimisation/NAME.json: numbers, no text. `figure` draws those files and
prints tables of them.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from preftune.report.plots.drawing import save

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "over_optimisation"
PICTURE = ROOT / "docs" / "studies" / "sentiment-over-optimisation" / "over-optimisation.svg"
JUDGES = {"sentiment": "gold (VADER)", "liked": "confirmation"}
# What is shown of every step, with the metric that is its standard deviation over responses.
SPREADS = {"objective/scores": "objective/scores_std"}
SPREADS |= {f"rewards/{judge}/mean": f"rewards/{judge}/std" for judge in JUDGES}
SEED, STEPS = 101, 48  # one of the study's seeds
RESPONSES, BIN = 64, 4  # of a step; steps drawn as one point
OF_A_POLICY = ("n_prompts", "score", "golds", "distinct_2", "kl")
COMMON = (
    f"seed={SEED}",
    *(f"stage.{name}=none" for name in ("dpo", "best", "grpo", "ceiling")),
    f"stage.ppo.steps={STEPS}",
    "stage.ppo.kl_coef=0",
    "stage.ppo.watched_functions=preftune.judges.style:sentiment, preftune.judges.reviews:liked",
)
ENSEMBLE = ("stage.rm.members=3",)
SETTINGS: dict[str, tuple[str, tuple[str, ...]]] = {  # what it starts from, and what differs
    "one": ("", ()),
    "min": ("one", (*ENSEMBLE, "stage.rm.combine=min")),
    "mean-sd": ("min", (*ENSEMBLE, "stage.rm.combine=mean-sd", "stage.rm.sd_coef=1.0")),
    "mean": ("min", (*ENSEMBLE, "stage.rm.combine=mean")),
}
NAMES = {
    "one": "one reward model",
    "min": "minimum of three",
    "mean-sd": "mean of three - their sd",
    "mean": "mean of three",
}
COLOURS = {"one": "#b2182b", "min": "#2166ac", "mean-sd": "#1b7837", "mean": "#762a83"}


def run(name: str, data: Path, work: Path) -> None:
    """One setting's run, and its numbers."""
    source, settings = SETTINGS[name]
    out, file = work / name, RESULTS / f"{name}.json"
    words = ["run", "sentiment", f"data.name={data}", *COMMON, *settings, "--out", str(out)]
    if source and not out.exists():
        words += ["--from", str(work / source)]
    subprocess.run([sys.executable, "-m", "preftune", *words], check=True)
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(numbers(out), indent=1) + "\n", encoding="utf-8")


def numbers(out: Path) -> dict[str, Any]:
    """Of each step, and of both policies on held-out prompts."""
    steps = [json.loads(line) for line in (out / "stages/ppo/metrics.jsonl").read_text("utf-8").splitlines()]
    kept = ["step", "objective/kl", *(key for both in SPREADS.items() for key in both)]
    evaluation = out / "evaluation"
    records = {name: json.loads((evaluation / f"policy_{name}.json").read_text()) for name in ("sft", "ppo")}
    policies = {name: {key: record[key] for key in OF_A_POLICY} for name, record in records.items()}
    return {"steps": [{key: row[key] for key in kept} for row in steps], "policies": policies}


class Course:
    """What a run measured step by step, in means over BIN steps."""

    def __init__(self, steps: Sequence[dict[str, float]]) -> None:
        self.steps = steps

    def binned(self, key: str) -> np.ndarray:
        values = [row[key] for row in self.steps]
        return np.array([np.mean(values[i : i + BIN]) for i in range(0, len(values), BIN)])

    def root_kl(self) -> np.ndarray:
        return np.sqrt(np.maximum(self.binned("objective/kl"), 0))

    def reach(self, spread: str) -> np.ndarray:
        """Half of each point's interval over responses, from the metric that is their standard deviation."""
        return 1.96 * self.binned(spread) / math.sqrt(BIN * RESPONSES)


def figure(results: dict[str, dict[str, Any]]) -> str:
    """Score, gold and confirmation against √KL, as SVG text: BIN · RESPONSES responses a point."""
    drawing = Figure(figsize=(10.5, 3.4), layout="constrained")
    panels = drawing.subplots(1, 3)
    titles = ["what it learns from (in its sd)", *JUDGES.values()]
    for panel, (key, spread), title in zip(panels, SPREADS.items(), titles, strict=True):
        for name, result in results.items():
            course = Course(result["steps"])
            x, y, reach = course.root_kl(), course.binned(key), course.reach(spread)
            panel.plot(x, y, marker="o", markersize=3, color=COLOURS[name], label=NAMES[name])
            panel.fill_between(x, y - reach, y + reach, color=COLOURS[name], alpha=0.15, linewidth=0)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("√KL to SFT (√nats)")
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    return save(drawing)


def course_table(results: dict[str, dict[str, Any]]) -> str:
    """Means over BIN steps, with half of their intervals over responses."""
    lines = [
        f"| setting | steps | KL, nats | its score, sd | {' | '.join(JUDGES.values())} |",
        "|" + "---|" * 6,
    ]
    for name, result in results.items():
        course = Course(result["steps"])
        kl = course.binned("objective/kl")
        columns = [zip(course.binned(key), course.reach(SPREADS[key]), strict=True) for key in SPREADS]
        for i, values in enumerate(zip(*columns, strict=True)):
            cells = " | ".join(f"{value:+.2f} ± {reach:.2f}" for value, reach in values)
            lines.append(f"| {NAMES[name]} | {BIN * i + 1} to {BIN * (i + 1)} | {kl[i]:.1f} | {cells} |")
    return "\n".join(lines)


def end_table(results: dict[str, dict[str, Any]]) -> str:
    """SFT and the last policies on held-out prompts."""
    lines = [
        f"| policy | score, sd | {' | '.join(JUDGES.values())} | distinct-2 | KL, nats |",
        "|" + "---|" * 6,
    ]
    policies = {"SFT": results["one"]["policies"]["sft"]}
    policies |= {f"PPO, {NAMES[name]}": result["policies"]["ppo"] for name, result in results.items()}
    for name, policy in policies.items():
        score = policy.get("score") or policy["reward"]  # its key in the first results
        means = [score, *policy["golds"].values()]
        cells = [
            f"{mean['mean']:+.2f} [{mean['interval'][0]:.2f}, {mean['interval'][1]:.2f}]" for mean in means
        ]
        kl = policy["kl"]["exact_per_sequence"]["mean"]
        lines.append(f"| {name} | {' | '.join(cells)} | {policy['distinct_2']:.2f} | {kl:.0f} |")
    return "\n".join(lines)


def main() -> None:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("what", choices=["run", "figure"])
    parser.add_argument("paths", type=Path, nargs="*", help="DATA and WORK of run")
    parser.add_argument("--only", choices=list(SETTINGS))
    asked = parser.parse_args()
    if asked.what == "run":
        for name in [asked.only] if asked.only else SETTINGS:
            run(name, *asked.paths)
        return
    files = {name: RESULTS / f"{name}.json" for name in SETTINGS}
    results = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    print(course_table(results), end_table(results), sep="\n\n")
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    PICTURE.write_text(figure(results), encoding="utf-8")


if __name__ == "__main__":
    main()
