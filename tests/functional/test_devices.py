"""Every function works where its inputs are: on the `meta` device, a tensor made on the CPU is an error."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from preftune import functional as pf

META = torch.device("meta")
ROWS, COLUMNS, VOCABULARY = 4, 5, 7

IDS = torch.zeros(ROWS, COLUMNS, dtype=torch.long, device=META)
MASK = torch.ones(ROWS, COLUMNS, dtype=torch.bool, device=META)
CELLS = torch.zeros(ROWS, COLUMNS, device=META)
EACH = torch.zeros(ROWS, device=META)
LOGITS = torch.zeros(ROWS, COLUMNS, VOCABULARY, device=META)

CALLS: dict[str, Callable[[], Any]] = {
    "token_logprobs": lambda: pf.token_logprobs(LOGITS, IDS),
    "entropy": lambda: pf.entropy(LOGITS),
    "full_kl": lambda: pf.full_kl(LOGITS, LOGITS),
    "response_mask": lambda: pf.response_mask(IDS, 1, start=2),
    "response_mask, starts": lambda: pf.response_mask(IDS, 1, start=EACH.long()),
    "last_response_index": lambda: pf.last_response_index(MASK),
    "masked_mean": lambda: pf.masked_mean(CELLS, MASK),
    "masked_mean, rows": lambda: pf.masked_mean(CELLS, MASK, dim=1),
    "masked_var": lambda: pf.masked_var(CELLS, MASK),
    "masked_whiten": lambda: pf.masked_whiten(CELLS, MASK),
    "kl_estimate": lambda: pf.kl_estimate(CELLS, CELLS, "k3"),
    "bradley_terry_loss": lambda: pf.bradley_terry_loss(EACH, EACH, EACH, 0.1),
    "preference_loss": lambda: pf.preference_loss(EACH, EACH, EACH, EACH, beta=0.1),
    "simpo_loss": lambda: pf.simpo_loss(EACH, EACH, beta=1.0, gamma=1.0),
    "orpo_odds_term": lambda: pf.orpo_odds_term(EACH, EACH),
    "kto_kl": lambda: pf.kto_kl(EACH, EACH),
    "kto_loss": lambda: pf.kto_loss(EACH, EACH, EACH.bool(), EACH[0], beta=0.1),
    "missing_eos_scores": lambda: pf.missing_eos_scores(EACH, EACH.bool(), replace=-1.0),
    "group_advantages": lambda: pf.group_advantages(EACH, 2),
    "leave_one_out_advantages": lambda: pf.leave_one_out_advantages(EACH, 2),
    "ppo_policy_loss": lambda: pf.ppo_policy_loss(CELLS, CELLS, EACH, mask=MASK),
    "ppo_policy_loss, sequence": lambda: pf.ppo_policy_loss(CELLS, CELLS, EACH, level="sequence", mask=MASK),
    "ppo_value_loss": lambda: pf.ppo_value_loss(CELLS, CELLS, CELLS, mask=MASK),
    "token_mean": lambda: pf.token_mean(MASK),
    "sequence_mean": lambda: pf.sequence_mean(MASK),
    "constant_length": lambda: pf.constant_length(MASK, 9),
    "weighted_sum": lambda: pf.weighted_sum(CELLS, CELLS),
}


@pytest.mark.parametrize("name", CALLS)
def test_results_are_where_the_inputs_are(name: str) -> None:
    made = CALLS[name]()
    for result in made if isinstance(made, tuple) else (made,):
        assert result.device == META


def test_rewards_and_advantages_are_where_the_inputs_are() -> None:
    """Both read values, which `meta` has none of: here the inputs are elsewhere than new tensors."""
    cells = torch.ones(2, 3)
    with torch.device("meta"):
        assert pf.shaped_rewards(cells[:, 0], cells, cells, cells, 0.1).device == cells.device
        advantages, returns = pf.gae(cells, cells, cells, 1.0, 0.95)
    assert advantages.device == returns.device == cells.device


def test_every_function_is_called() -> None:
    reads_values = {
        "AdaptiveKL",
        "shaped_rewards",
        "gae",
    }  # floats; empty rows; where replies are
    assert {name.split(",")[0] for name in CALLS} == set(pf.__all__) - reads_values
