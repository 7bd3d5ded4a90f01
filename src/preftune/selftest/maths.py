"""Which function compares which entry of the golden vectors."""

from collections.abc import Callable

import torch

from preftune.selftest import losses, signals
from preftune.selftest.record import Comparison
from preftune.selftest.vectors import Entry, entry, vectors

DTYPES = (torch.float64, torch.float32)

# By the beginning of the entry's name.
COMPARISONS: dict[str, Callable[[Entry], None]] = {
    "selective_logprobs": signals.selective_logprobs,
    "reward_bradley_terry": losses.bradley_terry,
    "dpo_family": losses.dpo_family,
    "kl_estimators": signals.kl_estimators,
    "gae_": signals.gae,
    "masked_whiten": signals.masked_whiten,
    "ppo_losses": losses.ppo,
    "ppo_reward_assembly": signals.reward_assembly,
    "ppo_reward_at_last_token": signals.reward_at_last_token,
    "response_mask_pad_equals_eos": signals.response_mask,
    "adaptive_kl_controller": signals.adaptive_kl_controller,
    "group_advantages": signals.group_advantages,
    "grpo_loss": losses.grpo,
    "rloo_sequence_loss": losses.rloo,
    "simpo_beta": losses.simpo,
    "orpo": losses.orpo,
    "kto_": losses.kto,
    "evaluation_stats": signals.evaluation_stats,
}

# These are about whole numbers or Python floats: a second dtype would compare nothing new.
ONE_DTYPE = ("response_mask_pad_equals_eos", "adaptive_kl_controller", "evaluation_stats")


def dtypes(name: str) -> tuple[torch.dtype, ...]:
    """The dtypes an entry is compared in."""
    return DTYPES[:1] if name in ONE_DTYPE else DTYPES


def compare_entry(name: str, dtype: torch.dtype, device: torch.device) -> Entry:
    """The entry, its row of the table filled in."""
    e = entry(name, dtype, device)

    def fill_in() -> None:
        (compare,) = [f for prefix, f in COMPARISONS.items() if name.startswith(prefix)]
        compare(e)

    e.row.under(fill_in)
    return e


def compare_all(device: torch.device) -> list[Comparison]:
    """Every entry in every dtype."""
    return [compare_entry(name, dtype, device).row for name in vectors() for dtype in dtypes(name)]
