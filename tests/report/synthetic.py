"""A run directory with plausible files and no training, for tests of the report."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preftune.report.sentences import verdict_sentences
from preftune.report.view import RunView
from preftune.rundir import RunDir, read_json, read_jsonl, write_json, write_jsonl, write_text

CONFIG = """name = "{name}"
seed = 3
precision = "float32"

[model]
base = "gpt2"

[data]
name = "Anthropic/hh-rlhf"
data_dir = "harmless-base"
form = "transcript"

[stage.sft]
algorithm = "sft"

[stage.rm]
algorithm = "reward"

[stage.ppo]
algorithm = "ppo"

[stage.grpo]
algorithm = "grpo"

[stage.dpo]
algorithm = "dpo"
"""
LABELS = {"base": "base (gpt2)", "policy_sft": "SFT", "policy_ppo": "PPO", "policy_grpo": "GRPO"}
LABELS |= {"policy_dpo": "DPO", "best_of_4": "best of 4 (SFT)"}
# mean difference to SFT, KL per response
POLICIES = {
    "base": (-0.6, 9.0),
    "policy_sft": (0.0, 0.0),
    "policy_ppo": (0.5, 4.2),
    "policy_grpo": (0.05, 1.1),
    "policy_dpo": (-0.4, 7.5),
    "best_of_4": (0.45, None),
}
METRICS = {
    "sft": ("loss", "grad_norm"),
    "rm": ("loss", "rewards/accuracies", "rewards/margins"),
    "ppo": (
        "objective/scores",
        "objective/kl",
        "policy/clipfrac_avg",
        "loss/value_avg",
        "eos_rate",
        "grad_norm",
    ),
    "grpo": ("reward", "objective/kl", "frac_reward_zero_std"),
    "dpo": ("loss", "rewards/margins", "rewards/accuracies"),
}


def make_run(
    path: Path,
    *,
    name: str = "trial",
    prompts: int = 100,
    accuracy: float = 0.68,
    half: float = 0.2,
    gold: Mapping[str, float] | None = None,
    holm: Mapping[str, float] | None = None,
    steps: int = 60,
    text: str = "I can help with that.",
) -> RunDir:
    """Write a finished run. `half` is the half width of the interval of a difference; `gold` maps policies to
    their difference in gold score; `holm` overrides corrected p-values; `text` is what models write."""
    run = RunDir(path)
    write_text(run.config, CONFIG.format(name=name))
    write_json(
        run.run, {"seed": 3, "command": ["preftune", "run"], "versions": {"torch": "2.13.0"}, "commit": "abc"}
    )
    write_json(run.data, _data())
    _stages(run, steps)
    for policy, (difference, kl) in POLICIES.items():
        write_json(run.evaluation(policy), _policy(policy, difference, kl, prompts, half, gold))
    write_jsonl(run.comparisons, _comparisons(prompts, half, gold or {}, holm or {}))
    write_json(run.reward_evaluation, _reward_model(accuracy))
    for policy in POLICIES:
        write_jsonl(run.samples_file(policy, "gpt2"), _samples(policy, text))
    write_jsonl(run.mistakes, [_mistake(index, text) for index in range(12)])
    return run


def verdict(run: RunView) -> str:
    """What is claimed, in one paragraph."""
    return " ".join(verdict_sentences(run))


def unscored(run: RunDir) -> RunDir:
    """The run as one without a reward model leaves it: its policies are compared by gold alone."""
    for path in run.evaluation("x").parent.glob("*.json"):
        write_json(path, read_json(path) | {"score": None, "score_difference_to_sft": None})
    write_jsonl(run.comparisons, [row for row in read_jsonl(run.comparisons) if row["measure"] == "gold"])
    run.reward_evaluation.unlink()
    return run


def _data() -> dict[str, Any]:
    file = {"path": "train.jsonl", "split": "train", "sha256": "0" * 64, "read": 1000, "kept": 990}
    return {
        "name": "Anthropic/hh-rlhf",
        "rows_read": 1000,
        "rows_kept": 990,
        "rejected": {"empty_response": 7, "identical": 3},
        "reasons": {"empty_response": "chosen or rejected is blank"},
        "rows_skipped": 0,
        "files": [file],
        "splits": {"train": 890, "validation": 50, "test": 50},
        "sources": {"train": {"harmless-base": 890}, "validation": {"harmless-base": 50}},
        "duplicates": 1,
        "distinct_prompts": {"train": 888, "validation": 50, "test": 50},
        "prompt_overlap": {"train/validation": 0, "train/test": 2},
        "words": {"train": {"prompt": [31, 140, 1207], "chosen": [9, 60, 300], "rejected": [8, 61, 299]}},
        "content_sha256": {"train": "a" * 64},
    }


def _stages(run: RunDir, steps: int) -> None:
    rng = random.Random(1)
    for stage, metrics in METRICS.items():
        algorithm = {"rm": "reward"}.get(stage, stage)
        record = {"stage": stage, "algorithm": algorithm, "status": "finished", "key": "k", "seconds": 61.5}
        record |= {"peak_memory_mb": 900.2, "steps": steps, "parents": [] if stage == "sft" else ["sft"]}
        record["rejected"] = {"response_too_long_became_equal": 4} if stage == "rm" else {}
        write_json(run.stage_json(stage), record)
        rows = [
            {"step": step, "time": step * 0.5} | {key: 1 / step**0.5 + rng.gauss(0, 0.05) for key in metrics}
            for step in range(1, steps + 1)
        ]
        write_jsonl(run.metrics(stage), rows)


def spread(mean: float, half: float, n: int, **more: Any) -> dict[str, Any]:
    """A mean with its interval."""
    return {"mean": mean, "interval": [mean - half, mean + half], "n": n, **more}


def share(value: float, n: int, half: float = 0.03) -> dict[str, Any]:
    """A share with its interval."""
    return {"value": value, "interval": [max(0.0, value - half), min(1.0, value + half)], "n": n}


def _policy(
    policy: str, difference: float, kl: float | None, n: int, half: float, gold: Mapping[str, float] | None
) -> dict[str, Any]:
    own = policy == "policy_sft"
    measured = kl is not None and {
        "exact_per_sequence": spread(kl, 0.1 * kl, n),
        "exact_per_token": kl / 40,
        "k1_per_sequence": spread(kl, 0.3 * kl, n),
        "k1_per_token": kl / 40,
    }
    return {
        "policy": policy,
        "label": LABELS[policy],
        "n_prompts": n,
        "n_samples": n,
        "score": spread(1.0 + difference, 0.2, n, sd=1.0),
        "score_difference_to_sft": None if own else spread(difference, half, n, p_value=0.01, verdict="?"),
        "win_rate_vs_sft": None if own else share(0.5 + difference / 4, n, 0.1),
        "kl": measured or {"formula": 0.636},
        "length": spread(40.0, 3.0, n, median=39.0),
        "eos_rate": share(0.9, n),
        "empty_share": 0.0,
        "distinct_1": 0.21,
        "distinct_2": 0.63,
        "repetition_4": 0.02,
        "role_leakage": 0.0,
        "gold": None if gold is None else spread(0.4 + gold.get(policy, 0.0), 0.05, n, sd=0.3),
    }


def _comparisons(
    n: int, half: float, gold: Mapping[str, float], holm: Mapping[str, float]
) -> list[dict[str, Any]]:
    differences = {policy: mean for policy, (mean, _) in POLICIES.items() if policy != "policy_sft"}
    measures = {"score": (differences, half)} | ({"gold": (gold, 0.05)} if gold else {})
    return [
        {"policy": policy, "reference": "policy_sft", "measure": measure, "n_needed": 812}
        | spread(mean, width, n, p_value=0.01, p_holm=holm.get(policy, 0.02), verdict="?")
        for measure, (means, width) in measures.items()
        for policy, mean in means.items()
    ]


def _reward_model(accuracy: float) -> dict[str, Any]:
    return {
        "stage": "rm",
        "n": 1000,
        "accuracy": share(accuracy, 1000),
        "accuracy_ties_half": accuracy + 0.001,
        "ties": 2,
        "mean_margin": 0.7,
        "brier": 0.21,
        "ece": 0.04,
        "by_source": {"harmless-base": share(accuracy, 1000)},
        "by_length": {"chosen_longer": share(0.7, 520), "rejected_longer": share(0.64, 470)},
        "baselines": {"longer": share(0.53, 1000), "shorter": share(0.46, 1000)},
        "correlation_score_length": 0.12,
        "margins_histogram": {
            "edges": [-3, -2, -1, 0, 1, 2, 3, 4],
            "counts": [20, 90, 210, 300, 250, 100, 30],
        },
        "score": {"mean": 0.1, "sd": 1.2, "min": -4.0, "max": 4.1},
        "best_reachable": None,
        "gold_component_gaps": None,
    }


def _samples(policy: str, text: str) -> list[dict[str, Any]]:
    rng = random.Random(policy)
    return [
        {
            "row": row,
            "prompt": f"\n\nHuman: Question {row}: {text}\n\nAssistant:",
            "response": f"{text} ({policy})",
        }
        | {"score": rng.gauss(1, 1), "ended": row % 5 > 0, "length": 12, "kl": 0.8}
        for row in range(20)
    ]


def _mistake(index: int, text: str) -> dict[str, Any]:
    margin = -3.0 + 0.25 * index
    return {
        "idx": 40 + index,
        "prompt": f"\n\nHuman: {text}\n\nAssistant:",
        "chosen": f"chosen {text}",
        "rejected": f"rejected {text}",
        "reward_chosen": 0.1,
        "reward_rejected": 0.1 - margin,
        "margin": margin,
        "source": "harmless-base",
        "tags": ["rejected is longer"] if index % 2 else ["rejected is shorter", "very short"],
    }
