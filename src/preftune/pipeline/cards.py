"""The README.md of a saved model. Names come from a config, so they are bounded and quoted."""

import json
from typing import Any

from preftune.config import RunConfig

_WHAT = {
    "sft": "a causal language model, fine-tuned on the chosen responses",
    "reward": "a reward model (Bradley-Terry); its weights give the raw score, preftune.json normalises it",
    "ppo": "a policy trained with PPO against the run's reward model",
    "grpo": "a policy trained with GRPO against the run's reward model",
    "dpo": "a policy trained with DPO on preference pairs",
}


def model_card(config: RunConfig, stage: Any) -> str:
    """Front matter and a few facts; the run's ANALYSIS.md has the measurements."""
    base, data = (json.dumps(str(x)[:200]) for x in (config.model.base, config.data.name))
    what = _WHAT[stage.algorithm] if stage.name != "base" else "a small GPT-2 pretrained from random weights"
    settings = json.dumps(dict(stage.inputs).get("settings", {}), indent=2, sort_keys=True)
    return (
        f"---\nlibrary_name: transformers\ntags:\n- preftune\n- {stage.algorithm}\n---\n\n"
        f"# {stage.name}\n\nThis is {what}.\n\n"
        f"- base model: `{base}`\n- data: `{data}`\n"
        f"- seed: {config.seed}\n- precision: {config.precision}\n\n"
        f"Settings of the stage:\n\n```json\n{settings}\n```\n\n"
        "How it compares with the other policies of its run is in the run's ANALYSIS.md.\n"
    )
