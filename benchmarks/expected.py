"""What a shipped recipe is expected to give: runs that differ in their seed, written beside the recipe.

    python benchmarks/expected.py quickstart --seeds 0 1 2 3 4 [--out DIR] [KEY=VALUE]...
    python benchmarks/expected.py quickstart --say

A run that is finished is not made again. `preftune run RECIPE` compares itself with the file at its end.
`--say` prints the file in words, as the recipe's head and docs/commands.md have it (tests compare them).
"""

import argparse
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from preftune import report
from preftune.config import load_recipe
from preftune.measure.expected import expectation, numbers_of, settings_sha256
from preftune.records.base import VERSION
from preftune.records.expected import ExpectedRecord
from preftune.rundir import RunDir, read_json, write_json

RECIPES = Path(__file__).parents[1] / "src" / "preftune" / "recipes"
ACCURACY = "reward model accuracy"
_LEAST = 3  # seeds; the interval of two is 12.7 standard errors to either side
_PEAK = re.compile(r"peak memory ([\d,]+) MiB")


def run_of(recipe: str, seed: int, out: Path, overrides: list[str]) -> tuple[float, float]:
    """Make a run unless it is finished; processor seconds and peak MiB of the call that made it. Stages that
    another command has finished, a study's for example, are not made again: their seconds by the clock count.
    """
    facts = out / "expected.json"
    if not facts.is_file():
        finished = [read_json(file) for file in out.glob("stages/*/stage.json")]
        words = ["run", recipe, f"seed={seed}", *overrides, "--out", str(out)]
        command, before = [sys.executable, "-m", "preftune", *words], os.times()
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks = [float(found.replace(",", "")) for found in _PEAK.findall(text)]
        peaks += [stage.get("peak_memory_mb", 0.0) for stage in finished]  # an evaluation under way has none
        after = os.times()
        seconds = sum(after[2:4]) - sum(before[2:4])  # of children, user and system
        seconds += sum(stage.get("seconds", 0.0) for stage in finished)
        write_json(facts, {"seconds": seconds, "peak_mib": max(peaks, default=0.0)})
    made = read_json(facts)
    return made["seconds"], made["peak_mib"]


def cost(known: ExpectedRecord) -> str:
    """Time of one run, on which machine, and memory: 1 GB is 10^9 bytes."""
    unit, size = ("s", 1) if max(known.seconds) < 300 else ("min", 60)
    low, middle, high = (f"{of(known.seconds) / size:.0f}" for of in (min, np.median, max))
    took = f"{high} {unit}" if low == high else f"{low} to {high} {unit}, median {middle}"
    memory = "" if known.peak_mib is None else f", {known.peak_mib * 2**20 / 1e9:.1f} GB"
    return f"{took} ({known.machine}){memory}"


def main_numbers(known: ExpectedRecord) -> str:
    """Means over seeds with 95 % intervals (Student's t), of two seeds their values: the reward model's
    accuracy; of every policy but base and reference the gain, in gold where there is one, else in its own
    score, and KL.
    """
    numbers, few = known.numbers, len(known.seeds) < _LEAST
    gain = "gold gain" if any(name.endswith(" gold gain") for name in numbers) else "gain"
    tuned = [name.removesuffix(f" {gain}") for name in numbers if name.endswith(f" {gain}")]
    forms = {gain: "+.2f", "KL": ".2f"}
    said = [f"{name} {_in_words(numbers[name], '.3f')}" for name in numbers if name == ACCURACY]
    for measure, form in forms.items():
        found = {name: numbers.get(f"{name} {measure}") for name in tuned if name != "base"}
        cells = [f"{n.partition(' (SFT')[0]} {_in_words(v, form)}" for n, v in found.items() if v]
        said += [f"{measure} {', '.join(cells)}"] if cells else []
    shown = "each" if few else "mean [95 % t-interval]"
    return f"{len(known.seeds)} seeds, {shown}: {'; '.join(said)}"


def _in_words(values: Sequence[float], form: str) -> str:
    n, mean = len(values), float(np.mean(values))
    if n < _LEAST:
        return " and ".join(f"{value:{form}}" for value in values)
    reach = float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1)) / n**0.5
    return f"{mean:{form}} [{mean - reach:{form}}, {mean + reach:{form}}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/expected"))
    parser.add_argument("--say", action="store_true", help="print the file that is there in words")
    asked = parser.parse_intermixed_args()
    if asked.say:
        if (known := expectation(asked.recipe)) is None:
            sys.exit(f"{asked.recipe} has no expected numbers")
        print(f"| {cost(known)} | {main_numbers(known)} |")
        print(textwrap.indent(textwrap.fill(f"Expect {cost(known)}. {main_numbers(known)}.", 126), "# "))
        return
    found: list[dict[str, float]] = []
    costs: list[tuple[float, float]] = []
    for seed in asked.seeds:
        out = asked.out / asked.recipe / f"seed-{seed}"
        costs.append(run_of(asked.recipe, seed, out, asked.overrides))
        found.append(numbers_of(report.load_run(RunDir(out))))
        print(f"seed {seed}: {costs[-1][0]:.0f} s", flush=True)
    config = load_recipe(asked.recipe, asked.overrides).config
    begun = [read_json(asked.out / asked.recipe / f"seed-{seed}" / "run.json") for seed in asked.seeds]
    first, commits = begun[0], list(dict.fromkeys(str(run["commit"])[:7] for run in begun))
    record = {
        "version": VERSION,
        "recipe": asked.recipe,
        "settings_sha256": settings_sha256(config),
        "made": f"{datetime.now(UTC):%Y-%m-%d}, commit{'s' * (len(commits) > 1)} {', '.join(commits)}",
        "machine": f"{first['processor']}, {first['threads']} of {first['cores']} cores",
        "seeds": asked.seeds,
        "seconds": [round(seconds, 1) for seconds, _ in costs],
        "peak_mib": max(peak for _, peak in costs),
        "numbers": {
            name: [float(f"{numbers[name]:.6g}") for numbers in found]
            for name in found[0]
            if all(name in numbers for numbers in found)
        },
    }
    ExpectedRecord.model_validate(record)
    write_json(RECIPES / f"{asked.recipe}.expected.json", record)


if __name__ == "__main__":
    main()
