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
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "plan.json"
# hh-scratch with a budget that a busy core can bear; lengths, models and batches are its own.
SMALLER = ("model.scratch.steps=60", "stage.sft.rows=320", "stage.rm.rows=320", "stage.rm2.rows=320")
SMALLER += ("stage.ppo.steps=6", "stage.grpo.steps=6", "stage.dpo.rows=320", "evaluation.prompts=20")
CASES = {
    "tiny": ("tiny",),
    "quickstart": ("quickstart",),
    "hh-scratch": ("hh-scratch", "data.name={shared}/data/hh-rlhf", *SMALLER),
}


def planned(words: list[str]) -> dict[str, Any]:
    """Seconds and MiB of every stage by the probe."""
    from preftune.config import load_recipe
    from preftune.runs.inputs import absolute
    from preftune.runs.probe import probe
    from preftune.runs.reopen import found_data

    config = absolute(load_recipe(words[0], words[1:]).config)
    dataset, base = found_data(config, None)
    costs = [asdict(cost) for cost in probe(config, dataset, base)]
    return {cost["name"]: {"seconds": cost["seconds"], "mib": cost["memory_mb"]} for cost in costs}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="+")
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
    results = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    for name in asked.words:
        if name in results:
            continue
        words = [word.format(shared=asked.shared) for word in CASES[name]]
        sides = {"planned": child("plan", words), "measured": child("run", words)}
        results[name] = {
            "settings": list(CASES[name][1:]),
            "made": datetime.now(UTC).strftime("%Y-%m-%d"),
            "stages": {
                stage: {side: sides[side].get(stage) for side in sides} for stage in sides["measured"]
            },
        }
        RESULT.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
