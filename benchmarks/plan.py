"""What `preftune plan` says beside what a run then takes, stage by stage.

    python benchmarks/plan.py tiny quickstart
    python benchmarks/plan.py hh-scratch --shared DIR

Both sides count processor seconds of their process, not seconds by the clock, so that a busy machine does not
matter; with one thread they are the same on an idle core. What is in the result file is not made again.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "plan.json"
# hh-scratch with a budget that a busy core can bear; lengths, models and batches are its own.
SMALLER = ("model.scratch.steps=30", "stage.sft.rows=160", "stage.rm.rows=160", "stage.rm2=none")
SMALLER += ("stage.ppo.steps=4", "stage.grpo.steps=4", "stage.dpo.rows=160", "evaluation.prompts=10")
CASES = {
    "tiny": ("tiny",),
    "quickstart": ("quickstart",),
    "hh-scratch": ("hh-scratch", "data.name={shared}/data/hh-rlhf/helpful-base", *SMALLER),
}


def planned(words: list[str]) -> dict[str, Any]:
    """Seconds and MiB of every stage, as estimated."""
    from preftune import cli
    from preftune.config import load_recipe
    from preftune.measure.estimate import estimate
    from preftune.runs.inputs import absolute
    from preftune.runs.reopen import found_data

    _ = cli  # in memory, as in the command
    config = absolute(load_recipe(words[0], words[1:]).config)
    dataset, base = found_data(config, None)
    costs = list(estimate(config, dataset, base))
    return {cost.name: {"seconds": cost.seconds, "mib": cost.memory_mb} for cost in costs}


def measured(words: list[str]) -> dict[str, Any]:
    """Seconds and MiB of every stage of a run."""
    from preftune.cli import main
    from preftune.rundir import RunDir, read_object

    with tempfile.TemporaryDirectory() as place:
        if main(["run", *words, "--out", f"{place}/run"]) != 0:
            raise SystemExit("the run failed")
        run = RunDir(f"{place}/run")
        records = {file.parent.name: read_object(file) for file in run.path.glob("stages/*/stage.json")}
    return {
        name: {"seconds": record["seconds"], "mib": record["peak_memory_mb"]}
        for name, record in records.items()
    }


def child(part: str, words: list[str]) -> dict[str, Any]:
    """One side, in a process of its own: memory is that of a process up to now."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "out.json"
        command = [sys.executable, __file__, "--part", part, "--out", str(file), *words]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return json.loads(file.read_text(encoding="utf-8"))


def known() -> dict[str, Any]:
    """What is in the result file."""
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}


def table() -> str:
    """The results as the table of docs/commands.md: stages in the order of their length."""
    lines = [
        "| recipe, stage | time: planned | measured | memory: planned | measured |",
        "|---|---|---|---|---|",
    ]
    for name, result in known().items():
        both = [(stage, sides["planned"], sides["measured"]) for stage, sides in result["stages"].items()]
        for stage, said, was in sorted(both, key=lambda row: -row[2]["seconds"]):
            lines.append(f"| {name}, {stage} | {_beside(said, was)} |")
        sums = [
            {
                "seconds": sum(row[side]["seconds"] for row in both),
                "mib": max(row[side]["mib"] for row in both),
            }
            for side in (1, 2)
        ]
        lines.append(f"| **{name}, all** | {_beside(*sums)} |")
    return "\n".join(lines)


def _beside(said: dict[str, float], was: dict[str, float]) -> str:
    off = {unit: f"{said[unit] / was[unit] - 1:+.0%}".replace("-", "−") for unit in said}
    return (
        f"{said['seconds']:.1f} s ({off['seconds']}) | {was['seconds']:.1f} s | "
        f"{said['mib']:,.0f} MiB ({off['mib']}) | {was['mib']:,.0f} MiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="by default the table of what is known is printed")
    parser.add_argument("--shared", default=os.environ.get("PREFTUNE_SHARED", "../shared"))
    parser.add_argument("--part", choices=["plan", "run"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    asked = parser.parse_args()
    if asked.part:
        _ = threading, queue  # both have taken the true clock, which their waiting needs
        time.monotonic = time.process_time
        found = planned(asked.words) if asked.part == "plan" else measured(asked.words)
        asked.out.write_text(json.dumps(found), encoding="utf-8")
        return
    if not asked.words:
        print(table())
    for name in asked.words:
        if name in known():
            continue
        words = [word.format(shared=asked.shared) for word in CASES[name]]
        sides = {"planned": child("plan", words), "measured": child("run", words)}
        result = {
            "settings": list(CASES[name][1:]),
            "made": datetime.now(UTC).strftime("%Y-%m-%d"),
            "stages": {
                stage: {side: sides[side].get(stage) for side in sides} for stage in sides["measured"]
            },
        }
        results = known() | {name: result}
        RESULT.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
