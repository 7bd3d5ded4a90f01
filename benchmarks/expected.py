"""What a shipped recipe is expected to give: runs that differ in their seed, written beside the recipe.

    python benchmarks/expected.py quickstart --seeds 0 1 2 3 4 [--out DIR] [KEY=VALUE]...

A run that is finished is not made again. `preftune run RECIPE` compares itself with the file at its end.
"""

import argparse
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from preftune import report
from preftune.config import load_recipe
from preftune.measure.expected import numbers_of, settings_sha256
from preftune.records.base import VERSION
from preftune.records.expected import ExpectedRecord
from preftune.rundir import RunDir, read_json, write_json

RECIPES = Path(__file__).parents[1] / "src" / "preftune" / "recipes"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/expected"))
    asked = parser.parse_intermixed_args()
    found: list[dict[str, float]] = []
    costs: list[tuple[float, float]] = []
    for seed in asked.seeds:
        out = asked.out / asked.recipe / f"seed-{seed}"
        costs.append(run_of(asked.recipe, seed, out, asked.overrides))
        found.append(numbers_of(report.load_run(RunDir(out))))
        print(f"seed {seed}: {costs[-1][0]:.0f} s", flush=True)
    config = load_recipe(asked.recipe, asked.overrides).config
    first = read_json(asked.out / asked.recipe / f"seed-{asked.seeds[0]}" / "run.json")
    record = {
        "version": VERSION,
        "recipe": asked.recipe,
        "settings_sha256": settings_sha256(config),
        "made": f"{datetime.now(UTC):%Y-%m-%d}, commit {str(first['commit'])[:7]}",
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
