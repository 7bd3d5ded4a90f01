"""A response without a reward: no advantage, no gradient, in no statistic."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from preftune.algorithms.on_policy import group_metrics
from preftune.functional import group_advantages
from preftune.rollout import Rollout

VALID = torch.tensor([True, True, False, True, True, False, True, True])


def masked_rollout(seed: int = 5) -> Rollout:
    return replace(tiny.rollout(seed), valid=VALID)


def disturbed(rollout: Rollout) -> Rollout:
    """The same with other scores, log-probs and values in the rows that have no score."""
    off = ~VALID

    def change(x: Tensor) -> Tensor:
        return torch.where(off.view(-1, *[1] * (x.dim() - 1)), x + 3.0, x)

    assert rollout.values is not None
    return replace(
        rollout,
        scores=change(rollout.scores),
        logprobs=change(rollout.logprobs),
        reference_logprobs=change(rollout.reference_logprobs),
        values=change(rollout.values),
    )


CASES: list[tuple[str, dict[str, Any]]] = [
    ("ppo", {}),
    ("rloo", {}),
    *(
        ("grpo", {"reduction": reduction, "kl_coef": 0.3})
        for reduction in ("dapo", "grpo", "bnpo", "dr_grpo")
    ),
    *(("grpo", {"scale": scale}) for scale in ("batch", "none")),
]


@pytest.mark.parametrize(("algorithm", "config"), CASES)
def test_masked_rows_do_not_touch_a_gradient(algorithm: str, config: dict[str, Any]) -> None:
    rollout = masked_rollout()
    with_mask, metrics = tiny.gradients(algorithm, rollout, **config)
    other, _ = tiny.gradients(algorithm, disturbed(rollout), **config)
    unmasked, _ = tiny.gradients(algorithm, tiny.rollout(5), **config)
    for role, gradient in with_mask.items():
        assert tiny.relative(other[role], gradient) < 1e-6
        assert tiny.relative(unmasked[role], gradient) > 1e-2  # so the mask does something
    assert metrics["frac_reward_masked"] == 0.25


def test_ppo_learns_as_if_the_masked_rows_had_not_been_sampled() -> None:
    rollout = masked_rollout()
    kept = replace(rollout[VALID.nonzero().flatten()], valid=None, group=None)
    with_mask, metrics = tiny.gradients("ppo", rollout)
    without, expected = tiny.gradients("ppo", kept)
    for role in with_mask:
        assert tiny.relative(with_mask[role], without[role]) < 1e-5
    for name in ("objective/scores", "objective/scores_std", "val/explained_variance", "loss/policy_avg"):
        assert metrics[name] == pytest.approx(expected[name], abs=1e-5)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_statistics_leave_masked_rows_out(scale: str) -> None:
    scores = torch.tensor([1.0, 2.0, 99.0, 6.0, 3.0, -99.0, 3.0, 3.0])
    got = group_advantages(scores, 4, scale, valid=VALID)
    first = torch.tensor([1.0, 2.0, 6.0])
    divisor = {"group": first.std() + 1e-4, "batch": scores[VALID].std() + 1e-4, "none": torch.tensor(1.0)}
    torch.testing.assert_close(got[[0, 1, 3]], (first - 3) / divisor[scale])
    assert (got[[2, 4, 5, 6, 7]] == 0).all()  # masked, or equal to all others of its group


def test_a_group_with_one_reward_or_none_teaches_nothing() -> None:
    lonely = torch.tensor([True, False, False, False, False, False, False, False])
    assert (group_advantages(torch.arange(8.0), 4, valid=lonely) == 0).all()


def test_grpo_reports_on_valid_rewards_only() -> None:
    rollout = masked_rollout()
    _, metrics = tiny.gradients("grpo", rollout)
    groups = [rollout.scores[:4][VALID[:4]], rollout.scores[4:][VALID[4:]]]
    assert metrics["reward"] == pytest.approx(rollout.scores[VALID].mean().item(), abs=1e-6)
    assert metrics["reward_std"] == pytest.approx(sum(g.std().item() for g in groups) / 2, abs=1e-6)
    assert metrics["frac_reward_zero_std"] == 0


def test_a_group_with_an_empty_reply_is_measured_as_it_is_learnt_from() -> None:
    rollout = tiny.rollout(5)
    response = rollout.sequences.response.clone()
    response[2] = False
    scores = torch.tensor([0.0, 1.0, 2.0, 1.0, 3.0, 3.0, 3.0, 3.0])
    rollout = replace(rollout, sequences=replace(rollout.sequences, response=response), scores=scores)
    metrics = group_metrics(rollout, 4)
    assert metrics["reward_std"] == pytest.approx(torch.tensor([0.0, 1.0, 1.0]).std().item() / 2, abs=1e-6)


def test_tokens_are_counted() -> None:
    """Trained: prompt and response of every row in every epoch; sampled: responses once."""
    rollout = tiny.rollout(5)
    whole, own = rollout.sequences.attention.sum().item(), rollout.sequences.response.sum().item()
    for algorithm, config in (("ppo", {"epochs": 3}), ("grpo", {"epochs": 2})):
        _, metrics = tiny.gradients(algorithm, rollout, **config)
        assert metrics["tokens/trained"] == config["epochs"] * whole
        assert metrics["tokens/sampled"] == own
    pairs = tiny.pairs(5)
    _, metrics = tiny.gradients("dpo", pairs)
    assert metrics["tokens/trained"] == pairs.chosen.attention.sum() + pairs.rejected.attention.sum()
