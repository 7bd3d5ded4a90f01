"""The smallest study there is: settings on top of the recipe `tiny`."""

from typing import Any

from preftune.study.design import Wanted

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


def wanted(**changes: Any) -> Wanted:
    return Wanted(recipe="tiny", overrides=SMALL, **{"fresh_pairs": 20, "replies": 2, **changes})
