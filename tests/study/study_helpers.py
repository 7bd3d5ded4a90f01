"""The smallest study there is: settings on top of the recipe `tiny`."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from preftune.rundir import read_json
from preftune.study.design import Request
from preftune.study.places import seed_dir

SEEDS = (3, 4)  # of the study that tests share
POLICIES = {"base", "sft", "ppo", "grpo", "dpo", "ceiling", "best_of_4"}
SMALL = (
    "model.scratch.steps=6",
    "data.pairs=120",
    "stage.sft.rows=32",
    "stage.rm.rows=32",
    "stage.ppo.steps=2",
    "stage.dpo.rows=32",
    "evaluation.prompts=6",
    "evaluation.pool=4",
    "evaluation.max_new_tokens=10",
    "stage.ppo.max_new_tokens=10",
    "stage.grpo.max_new_tokens=10",
)


def wanted(**changes: Any) -> Request:
    return Request(recipe="tiny", overrides=SMALL, **{"fresh_pairs": 20, "replies": 2, **changes})


def study_json(out: Path) -> dict[str, Any]:
    return read_json(out / "study.json")


def values(out: Path, seed: int, policy: str, kind: str, measure: str) -> np.ndarray:
    """A policy's per-prompt values, from its own file."""
    return np.array(
        read_json(out / f"seed-{seed}" / "study" / f"{policy}.json")["sets"][kind][measure], float
    )


def without_grpo(out: Path, seed: int) -> None:
    """Make of a finished seed one that was killed after all other stages, before GRPO was measured."""
    place = seed_dir(out, seed)
    (out / "study.json").unlink()
    for name in ("seed", "grpo"):
        (place / "study" / f"{name}.json").unlink()
    shutil.rmtree(place / "models" / "policy_grpo")
    (place / "stages" / "grpo" / "stage.json").unlink()
    (place / "stages" / "grpo" / "metrics.jsonl").unlink()
