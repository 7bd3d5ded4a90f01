"""What newer runs have evaluated: all about the reward model, length control, second opinions."""

import math
from typing import Any

from synthetic import POLICIES, share, spread

from preftune.rundir import RunDir, append_jsonl, read_json, read_jsonl, write_json, write_jsonl

BAND = {"low": 0.62, "high": 0.66, "text": "62 to 66 % for GPT-2 small on HH", "source": "our estimate"}
TAG = {"mistakes": 7, "share": 0.58, "pairs": 300, "share_of_pairs": 0.3, "error_rate": share(0.41, 300)}


def add_newer_parts(run: RunDir, prompts: int = 100) -> RunDir:
    """Add to a run of `make_run` all that an older evaluation lacks; PPO's gain is largely length."""
    record = read_json(run.reward_evaluation)
    write_json(run.reward_evaluation, record | newer_reward_model(record["accuracy"]["value"]))
    other = {"stage": "rm2", "n": 1000, "accuracy": share(0.66, 1000), "held_out": True}
    write_json(run.evaluation("reward_model_rm2"), other)
    for policy in POLICIES:
        row = read_json(run.evaluation(policy))
        write_json(run.evaluation(policy), row | more(policy, row, prompts))
    for policy, (difference, _) in POLICIES.items():
        add_comparisons(run, policy, difference, prompts)
    add_pairs(run, prompts)
    curve = [point(n, prompts) for n in range(1, 17)]
    record = {"reference": "policy_sft", "label": "SFT", "n_samples": 16, "curve": curve}
    write_json(run.evaluation("best_of_n"), record)
    write_jsonl(run.mistakes, [mistake | tokens(mistake) for mistake in read_jsonl(run.mistakes)])
    return run


def add_pairs(run: RunDir, prompts: int) -> None:
    """What `evaluate --pairs elsewhere.jsonl` writes."""
    directory = run.pairs("elsewhere")
    write_json(directory / "pairs.json", {"file": "else<where>.jsonl", "n": 310, "seen_in_training": 5})
    judge = (
        read_json(run.reward_evaluation) | newer_reward_model(0.58) | {"n": 310, "accuracy": share(0.58, 310)}
    )
    write_json(directory / "reward_model.json", judge)
    for policy in ("policy_ppo", "policy_sft"):
        opinion = {"accuracy_logprob_per_token": share(0.59, 310)}
        opinion["accuracy"] = None if policy == "policy_sft" else share(0.53, 310)
        row = read_json(run.evaluation(policy))
        record = row | more(policy, row, prompts) | {"preference": opinion}
        write_json(directory / f"{policy}.json", record)


def newer_reward_model(accuracy: float) -> dict[str, Any]:
    """The added keys of reward_model.json."""
    bins = [
        {
            "low": 0.5 + 0.05 * i,
            "high": 0.55 + 0.05 * i,
            "confidence": 0.525 + 0.05 * i,
            "accuracy": 0.5 + 0.04 * i,
        }
        | {"n": 100 - 10 * i, "interval": [0.45 + 0.04 * i, 0.55 + 0.04 * i]}
        for i in range(9)
    ]
    tests = [
        {
            "baseline": name,
            "difference": accuracy - value,
            "p_value": 0.001,
            "p_holm": 0.002,
            "verdict": "better",
        }
        | {"interval": [accuracy - value - 0.04, accuracy - value + 0.04], "n_discordant": 400}
        for name, value in (("longer", 0.53), ("shorter", 0.46), ("bag_of_words", 0.61))
    ]
    return {
        "accuracy_ties_half_interval": [accuracy - 0.03, accuracy + 0.03],
        "by_length_difference": [
            {"label": "-20 to -6", "low": -20, "high": -6} | share(0.6, 210),
            {"label": "over 20", "low": 20, "high": None, "value": None, "interval": [0.0, 1.0], "n": 0},
        ],
        "by_turns": {"1": share(0.7, 600), "4+": share(0.61, 80)},
        "baselines": {
            "longer": share(0.53, 1000), "shorter": share(0.46, 1000),
            "bag_of_words": share(0.61, 1000) | {"trained_on": 890, "words": 3000, "l2": 1.0},
        },
        "baseline_tests": tests,
        "reliability": [*bins, {"low": 0.95, "high": 1.0, "n": 0, "accuracy": None}],
        "mean_margin_interval": [0.6, 0.8], "brier_interval": [0.2, 0.22], "ece_if_calibrated": 0.03,
        "temperature": {
            "value": 1.7, "nll_before": 0.66, "nll_after": 0.61, "nll_coin": 0.6931, "n": 1000,
            "nll_gain": spread(0.05, 0.02, 1000),
        },
        "correlation_score_length_interval": [0.06, 0.18],
        "score_by_length": [
            {"low": 2, "high": 20, "length": 11.5, "chosen": spread(0.1, 0.1, 250), "rejected": None},
            {"low": 20, "high": 90, "length": 44.0, "chosen": spread(0.6, 0.1, 250)}
            | {"rejected": spread(0.2, 0.1, 240)},
        ],
        "sanity": [
            {"name": "chosen", "label": "chosen", "below_chosen": None} | spread(0.4, 0.1, 200),
            {"name": "shuffled_words", "label": "its words shuffled", "below_chosen": share(0.8, 200)}
            | spread(-0.6, 0.1, 200),
            {"name": "empty", "label": "nothing", "below_chosen": share(0.51, 200)} | spread(0.3, 0.1, 200),
        ],
        "invariance": {
            "n": 16, "padding_max_difference": 2e-6, "batch_max_difference": 3e-6,
            "tolerance": 1e-4, "ok": True,
        },
        "expected_band": BAND,
        "power": {
            "chance": {"n": 1000, "n_needed": 197, "detectable": 0.544},
            "baseline": {"name": "bag_of_words", "n": 1000, "n_needed": 812},
        },
        "n_mistakes": 12,
        "mistake_tags": {"rejected is longer": TAG, "very short": TAG | {"mistakes": 6}},
    }  # fmt: skip


def more(policy: str, row: dict[str, Any], n: int) -> dict[str, Any]:
    """The added keys of a policy's record."""
    difference, own = POLICIES[policy][0], policy == "policy_sft"
    matched = 0.0 if policy == "policy_ppo" else difference
    control = {
        "method": "pairs whose lengths differ by at most 4 tokens", "source": "ours", "n": n,
        "matched_caliper": 4,
        "win_rate": share(0.5 + matched / 4, n, 0.1), "raw_win_rate": share(0.5 + difference / 4, n, 0.1),
        "gain": spread(difference, 0.2, n), "gain_length_matched": spread(matched, 0.2, n),
        "share_surviving": share(matched / difference, n, 0.2) if difference > 0.2 else None,
    }  # fmt: skip
    kl = dict(row["kl"])
    if "formula" not in kl:
        kl |= {"reverse_per_sequence": spread(2.0, 0.2, n), "reverse_per_token": spread(0.05, 0.01, n)}
    return {
        "kl": kl,
        "held_out_score": spread(0.2 + difference / 2, 0.2, n, sd=1.0, stage="rm2", shares_pairs=False),
        "win_rate_vs_chosen": share(0.4, n, 0.1),
        "length_controlled": None if own else control,
        "empty": share(0.0, n),
        "role_leakage_rate": share(0.01, n),
        "repetition": spread(0.02, 0.01, n),
        "prompts": [{"row": i, "score": math.sin(i) + difference, "length": 12} for i in range(n)],
    }


def add_comparisons(run: RunDir, policy: str, difference: float, n: int) -> None:
    """Held out: PPO loses what it gained. Chosen: nobody is better. Best of 4: only DPO is worse."""
    base = {"policy": policy, "n_needed": 300, "p_value": 0.01, "p_holm": 0.02}
    second = -0.5 if policy == "policy_ppo" else difference
    if policy != "policy_sft":
        append_jsonl(
            run.comparisons,
            base | {"reference": "policy_sft", "measure": "held_out"} | spread(second, 0.2, n),
        )
    if policy not in ("base", "policy_sft", "best_of_4"):
        against = spread(difference - 0.45, 0.2, n)
        append_jsonl(run.comparisons, base | {"reference": "best_of_4", "measure": "score"} | against)
    append_jsonl(run.comparisons, base | {"reference": "chosen", "measure": "score"} | spread(-0.1, 0.2, n))


def point(n: int, prompts: int) -> dict[str, Any]:
    kl = math.log(n) - (n - 1) / n
    gain = 0.4 * kl**0.5
    return {"n": n, "kl_formula": kl, "score": spread(1 + gain, 0.1, prompts), "gold": None} | {
        "held_out": spread(0.2 + gain / 2, 0.1, prompts)
    }


def tokens(mistake: dict[str, Any]) -> dict[str, Any]:
    """Scores after each word, and what goes with them."""
    found: dict[str, Any] = {
        "confidence": 1 / (1 + math.exp(mistake["margin"])),
        "length_chosen": 9,
        "turns": 1,
    }
    for side in ("chosen", "rejected"):
        words = mistake[side].split(" ")
        pieces = [word if i == 0 else f" {word}" for i, word in enumerate(words)]
        found[f"tokens_{side}"] = [[piece, math.sin(2.0 * i)] for i, piece in enumerate(pieces)]
    return found
