"""Names that others call, tests/slow/test_cases.py too: they stay, with the order of what they take."""

import inspect
from importlib import import_module
from typing import Any

import pytest

NAMES: dict[str, dict[str, str]] = {
    "preftune.functional": {
        "token_logprobs": "logits ids temperature",
        "entropy": "logits temperature",
        "full_kl": "logits reference_logits temperature",
        "response_mask": "ids eos_id start",
        "last_response_index": "response",
        "masked_mean": "x mask dim",
        "masked_var": "x mask unbiased",
        "masked_whiten": "x mask shift_mean unbiased eps",
        "kl_estimate": "logprobs reference_logprobs kind",
        "bradley_terry_loss": "chosen rejected margin center_coef",
        "preference_loss": "policy_chosen policy_rejected reference_chosen reference_rejected",
        "simpo_loss": "chosen_mean rejected_mean",
        "orpo_odds_term": "chosen_mean rejected_mean",
        "kto_kl": "policy reference",
        "kto_loss": "policy reference desirable kl",
        "missing_eos_scores": "scores ended",
        "shaped_rewards": "scores logprobs reference_logprobs response kl_coef",
        "gae": "rewards values response gamma lam",
        "group_advantages": "scores group_size scale eps",
        "leave_one_out_advantages": "scores group_size",
        "ppo_policy_loss": "logprobs old_logprobs advantages clip_low clip_high",
        "ppo_value_loss": "values old_values returns clip",
        "token_mean": "mask total",
        "sequence_mean": "mask total",
        "constant_length": "mask max_length total",
        "weighted_sum": "terms weights",
        "AdaptiveKL": "initial target horizon",
    },
    "preftune.evaluation.stats": {
        "wilson": "wins n z",
        "win_rate": "a b",
        "paired_difference": "a b",
        "brier": "p label",
        "ece": "p label bins",
        "distinct_n": "tokens n",
        "repetition_n": "tokens n",
    },
    "preftune.evaluation.compare": {"judged": "records family"},
    "preftune.evaluation.length": {"controlled_win_rate": "wins longer resamples seed"},
    "preftune.models.load": {"load_causal_lm": "source", "load_tokenizer": "source"},
    "preftune.models.locate": {"locate": "base"},
    "preftune.models.scalar": {"init_scalar_model": "source tokenizer seed"},
    "preftune.data": {
        "Sequences": "ids attention response",
        "Pairs": "chosen rejected",
        "split_pair": "chosen rejected",
        "read_preferences": "path",
        "load_dataset": "config",
        "RejectedRow": "reason",
    },
    "preftune": {
        "load_reward_model": "directory",
        "load_policy": "directory",
        "one_update": "algorithm models batch",
        **dict.fromkeys(("train_reward_model", "supervised_finetune"), "recipe overrides"),
        **dict.fromkeys(("ppo_train", "grpo_train", "dpo_train", "run"), "recipe overrides"),
    },
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in NAMES for name in NAMES[module]])
def test_a_public_name_takes_what_it_took(module: str, name: str) -> None:
    called: Any = getattr(import_module(module), name)
    parameters = inspect.signature(called).parameters.values()
    asked = NAMES[module][name].split()
    in_order = [one.name for one in parameters if one.kind != one.KEYWORD_ONLY or one.name in asked]
    assert in_order[: len(asked)] == asked


@pytest.mark.parametrize(
    ("module", "name", "method", "takes"),
    [
        ("preftune.runs.standalone", "RewardModelHandle", "score", "self prompts responses ended"),
        ("preftune.runs.standalone", "RewardModelHandle", "raw_score", "self prompts responses ended"),
        ("preftune.runs.standalone", "PolicyHandle", "logprobs", "self sequences"),
        (
            "preftune.runs.standalone",
            "PolicyHandle",
            "generate",
            "self prompts max_new_tokens temperature seed",
        ),
        ("preftune.functional", "AdaptiveKL", "observe", "self kl n"),
    ],
)
def test_so_does_a_public_method(module: str, name: str, method: str, takes: str) -> None:
    called = getattr(getattr(import_module(module), name), method)
    assert list(inspect.signature(called).parameters) == takes.split()
