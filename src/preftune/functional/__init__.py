"""Pure maths: tensors in, tensors out. No model, config, file or rank; torch only.

Every per-token tensor is (B, T), column t about token t. Only `token_logprobs`, `entropy` and `full_kl`
shift. Results are float32, or float64 if any floating input is. Masks are bool or 0/1; off the mask inputs
are ignored (NaN and inf too), and outputs and gradients are exactly 0. Losses are minimised and unreduced: a
scalar is `weighted_sum(terms, weights)`.
"""

from .advantages import gae, group_advantages, leave_one_out_advantages, missing_eos_scores, shaped_rewards
from .kl import AdaptiveKL, full_kl, kl_estimate
from .logprobs import entropy, token_logprobs
from .losses import (
    bradley_terry_loss,
    kto_kl,
    kto_loss,
    orpo_odds_term,
    ppo_policy_loss,
    ppo_value_loss,
    preference_loss,
    simpo_loss,
)
from .masked import last_response_index, masked_mean, masked_var, masked_whiten, response_mask
from .weights import constant_length, sequence_mean, token_mean, weighted_sum

__all__ = [
    "AdaptiveKL",
    "bradley_terry_loss",
    "constant_length",
    "entropy",
    "full_kl",
    "gae",
    "group_advantages",
    "kl_estimate",
    "kto_kl",
    "kto_loss",
    "last_response_index",
    "leave_one_out_advantages",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "missing_eos_scores",
    "orpo_odds_term",
    "ppo_policy_loss",
    "ppo_value_loss",
    "preference_loss",
    "response_mask",
    "sequence_mean",
    "shaped_rewards",
    "simpo_loss",
    "token_logprobs",
    "token_mean",
    "weighted_sum",
]
