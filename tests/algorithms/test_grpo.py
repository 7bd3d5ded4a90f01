"""GRPO: groups, reductions, KL terms and metrics against plain arithmetic."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from preftune.config import GRPOConfig
from preftune.errors import PreftuneError
from preftune.functional import group_advantages
from preftune.models.roles import Policy
from preftune.rollout import Rollout
from tiny import (
    GROUP,
    Judge,
    causal_lm,
    flat,
    gradients,
    prompts,
    relative,
    roles,
    rollout,
    runner,
    sequences,
)


def groups(x: Tensor) -> Tensor:
    return x.view(-1, GROUP)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_a_group_sum_to_zero(scale: str) -> None:
    made, _ = runner("grpo", roles("grpo"), scale=scale)
    advantages = made.experience(rollout(5)).advantages
    assert groups(advantages).sum(1).abs().max() < 1e-5
    assert advantages.abs().max() > 0.1


def test_advantages_are_the_groups_own_scores_standardised() -> None:
    made, _ = runner("grpo", roles("grpo"))
    batch = rollout(5)
    s = groups(batch.scores)
    expected = (s - s.mean(1, keepdim=True)) / (s.std(1, keepdim=True) + 1e-4)
    torch.testing.assert_close(made.experience(batch).advantages, expected.flatten(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_the_scale_of_the_settings_is_that_of_the_advantages(scale: str) -> None:
    made, _ = runner("grpo", roles("grpo"), scale=scale)
    batch = rollout(5)
    expected = group_advantages(batch.scores, GROUP, scale)
    torch.testing.assert_close(made.experience(batch).advantages, expected, atol=0, rtol=0)


def test_the_spread_within_groups_of_two() -> None:
    """sd of two scores: their distance over √2."""
    made, _ = runner("grpo", roles("grpo"), group_size=2)
    batch = rollout(5)
    apart = batch.scores.view(-1, 2).diff().abs().mean() / 2**0.5
    assert made.report(batch)["reward_std"] == pytest.approx(apart.item(), rel=1e-5)


def test_groups_of_equal_scores_give_exactly_no_gradient_without_kl() -> None:
    batch = replace(rollout(5), scores=torch.tensor([0.1] * 4 + [0.7] * 4))
    got, metrics = gradients("grpo", batch, kl_coef=0.0)
    assert (flat(got["policy"]) == 0).all()
    assert metrics["frac_reward_zero_std"] == 1.0
    assert metrics["reward_std"] == pytest.approx(0.0, abs=1e-7)


def test_a_group_of_equal_scores_only_dilutes_the_other() -> None:
    batch = rollout(5)
    half = replace(batch, scores=torch.cat([batch.scores[:4], torch.full((4,), 0.7)]))
    both, metrics = gradients("grpo", half, kl_coef=0.0, reduction="grpo")
    alone, _ = gradients("grpo", batch[:4], kl_coef=0.0, reduction="grpo")
    assert metrics["frac_reward_zero_std"] == 0.5
    halved = {name: g / 2 for name, g in alone["policy"].items()}
    assert relative(both["policy"], halved) < 2e-6


def test_with_kl_such_groups_still_pull_to_the_reference() -> None:
    batch = replace(rollout(5), scores=torch.zeros(8))
    got, _ = gradients("grpo", batch, kl_coef=0.04)
    assert flat(got["policy"]).norm() > 1e-4


@pytest.mark.parametrize("kl", ["k2", "k3", "k3_ratio"])
def test_a_policy_that_is_the_reference_has_kl_exactly_zero(kl: str) -> None:
    policy = Policy(causal_lm(1))
    batch = rollout(5, policy=policy, noise=0.0)
    batch = replace(batch, reference_logprobs=batch.logprobs)
    _, metrics = gradients("grpo", batch, models={"policy": policy}, kl=kl)
    assert metrics["kl"] == 0.0
    assert metrics["kl_per_sequence"] == 0.0
    assert metrics["ratio"] == 1.0


def by_hand(batch: Rollout, reduction: str, kl: str, kl_coef: float, limit: int) -> float:
    """The whole loss in float64 loops over rows and columns."""
    with torch.no_grad():
        new = Policy(causal_lm(1)).logprobs(batch.sequences).double()
    old, reference = batch.logprobs.double(), batch.reference_logprobs.double()
    s = groups(batch.scores.double())
    advantages = ((s - s.mean(1, keepdim=True)) / (s.std(1, keepdim=True) + 1e-4)).flatten()
    per_row = []
    for i in range(len(batch)):
        terms = []
        for t in batch.sequences.response[i].nonzero().flatten().tolist():
            ratio, d = (new[i, t] - old[i, t]).exp(), new[i, t] - reference[i, t]
            penalty = d**2 / 2 if kl == "k2" else (-d).exp() - 1 + d
            penalty = penalty * ratio if kl == "k3_ratio" else penalty
            surrogate = torch.minimum(ratio * advantages[i], ratio.clamp(0.8, 1.28) * advantages[i])
            terms.append(float(-surrogate + kl_coef * penalty))
        per_row.append(terms)
    total = sum(map(sum, per_row))
    match reduction:
        case "grpo":
            return sum(sum(row) / len(row) for row in per_row) / len(per_row)
        case "dr_grpo":
            return total / (len(per_row) * limit)
        case _:
            return total / sum(map(len, per_row))


@pytest.mark.parametrize("kl", ["k2", "k3", "k3_ratio"])
@pytest.mark.parametrize("reduction", ["dapo", "grpo", "bnpo", "dr_grpo"])
def test_the_loss_by_hand(reduction: str, kl: str) -> None:
    batch = rollout(5)
    _, metrics = gradients(
        "grpo",
        batch,
        microbatch_size=3,
        reduction=reduction,
        kl=kl,
        kl_coef=0.3,
        clip_low=0.2,
        clip_high=0.28,
        max_new_tokens=12,
    )
    assert metrics["loss"] == pytest.approx(by_hand(batch, reduction, kl, 0.3, 12), abs=1e-5)


def test_reductions_agree_where_all_responses_have_the_full_length() -> None:
    whole = sequences(5, 8)
    length = int(whole.response.sum(1).min())
    start = whole.response.int().argmax(1, keepdim=True)
    columns = torch.arange(whole.ids.shape[1])
    equal = replace(whole, response=(columns >= start) & (columns < start + length))
    base = rollout(5)
    batch = replace(base, sequences=replace(equal, attention=columns < start + length))

    def losses(limit: int) -> list[float]:
        return [
            gradients("grpo", batch, reduction=reduction, max_new_tokens=limit)[1]["loss"]
            for reduction in ("dapo", "grpo", "bnpo", "dr_grpo")
        ]

    full, half = losses(length), losses(2 * length)
    assert abs(full[0]) > 1e-3
    assert full == pytest.approx([full[0]] * 4, abs=1e-6)
    assert half == pytest.approx([*full[:3], full[3] / 2], abs=1e-6)  # equal, but below the limit


def test_a_constant_length_counts_responses_without_a_score_and_token_means_do_not() -> None:
    """One response of eight has no score. Σ terms / (12 · 8) against Σ terms / tokens that have one."""
    valid = torch.arange(8) != 2
    batch = replace(rollout(5), valid=valid)
    tokens = int(batch.sequences.response[valid].sum())
    settings = {"kl_coef": 0.3, "max_new_tokens": 12, "microbatch_size": 3}
    constant, mean = (
        gradients("grpo", batch, reduction=name, **settings)[1]["loss"] for name in ("dr_grpo", "dapo")
    )
    assert abs(mean) > 1e-3
    assert constant * 12 * 8 == pytest.approx(mean * tokens, rel=1e-4)


@pytest.mark.parametrize("equal", [0, 4])
def test_clip_fractions_count_what_the_minimum_cuts(equal: int) -> None:
    """Nothing of a group of equal scores: its advantages are 0."""
    batch = rollout(5)
    batch = replace(batch, scores=torch.cat([batch.scores[: 8 - equal], torch.full((equal,), 0.7)]))
    _, metrics = gradients("grpo", batch, clip_low=0.2, clip_high=0.28)
    made, _ = runner("grpo", roles("grpo"))
    sign = made.experience(batch).advantages.sign().unsqueeze(1)
    with torch.no_grad():
        ratio = (Policy(causal_lm(1)).logprobs(batch.sequences) - batch.logprobs).exp()
    own = batch.sequences.response
    low, high = (ratio < 0.8) & own, (ratio > 1.28) & own
    for name, cut in (("low", low & (sign < 0)), ("high", high & (sign > 0))):
        assert metrics[f"clip_ratio/{name}_mean"] == pytest.approx((cut.sum() / own.sum()).item(), abs=1e-6)
        assert cut.any()
    assert (low & (sign == 0)).any() == (high & (sign == 0)).any() == bool(equal)


@torch.no_grad()
def test_metrics_by_hand() -> None:
    """Means over response tokens, over responses, and over groups, one of which has equal scores."""
    batch = replace(rollout(5), scores=torch.tensor([1.0, 2.0, 2.0, 5.0] + [0.5] * 4))
    own = batch.sequences.response
    lengths = own.sum(1).float()
    limit = int(lengths.median())
    with torch.enable_grad():
        _, metrics = gradients("grpo", batch, max_new_tokens=limit)
    new, entropy = Policy(causal_lm(1)).logprobs_and_entropy(batch.sequences)
    d = (new - batch.reference_logprobs)[own]
    expected = {
        "entropy": entropy[own].mean(),
        "kl": (torch.exp(-d) - 1 + d).mean(),
        "ratio": (new - batch.logprobs)[own].exp().mean(),
        "clip_ratio/region_mean": metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"],
        "kl_per_sequence": ((batch.logprobs - batch.reference_logprobs) * own).sum(1).mean(),
        "reward": torch.tensor(12 / 8),
        "reward_std": torch.tensor(3.0).sqrt() / 2,  # of 1, 2, 2, 5 with n - 1, and 0
        "frac_reward_zero_std": 0.5,
        "completions/mean_length": lengths.mean(),
        "completions/max_length": lengths.max(),
        "completions/min_length": lengths.min(),
        "completions/clipped_ratio": (lengths >= limit).float().mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), abs=1e-5), name
    assert lengths.min() < limit < lengths.max()


def test_the_share_of_cut_responses_is_that_without_eos_where_this_is_on_record() -> None:
    batch = replace(rollout(5), ended=torch.tensor([True] * 6 + [False] * 2))
    assert gradients("grpo", batch)[1]["completions/clipped_ratio"] == 0.25


def test_the_first_update_of_a_step_has_ratio_1() -> None:
    """A whole step from prompts, at a temperature that old, new and reference log-probs share."""
    models = roles("grpo")
    made, _ = runner("grpo", models, 3, temperature=0.7, max_new_tokens=10)
    made.scorer = Judge(lambda batch: ((batch.ids == 7) & batch.response).sum(1) - batch.response.sum(1) / 5)
    metrics = made.step(prompts(3, 3))
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["clip_ratio/region_mean"] == 0.0
    assert metrics["completions/max_length"] <= 10
    sampled = made.rollout(prompts(3, 3))
    assert sampled.group.tolist() == [0] * GROUP + [1] * GROUP + [2] * GROUP
    starts = sampled.sequences.response.int().argmax(1)
    assert groups(starts).float().std(1).max() == 0  # one prompt a group
    expected = (sampled.logprobs - sampled.reference_logprobs).sum(1).mean().item()
    assert metrics["kl_per_sequence"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_the_first_update_has_minus_the_mean_advantage_as_loss_plus_the_kl_term(kl_coef: float) -> None:
    """At ratio 1, averaged over responses: -mean A = 0, and `kl_coef` times the mean k3 of each response."""
    batch = rollout(5, policy=Policy(causal_lm(1)), noise=0.0)
    got, metrics = gradients("grpo", batch, reduction="grpo", kl_coef=kl_coef)
    assert metrics["loss"] == pytest.approx(kl_coef * metrics["kl"], abs=1e-6)
    assert flat(got["policy"]).norm() > 1e-3  # a loss of 0 is not a gradient of 0


def test_groups_whose_rows_are_apart_are_refused() -> None:
    made, _ = runner("grpo", roles("grpo"))
    with pytest.raises(ValueError, match="4 at a time"):
        made.experience(replace(rollout(5), group=torch.tensor([0, 1] * 4)))


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises((ValueError, PreftuneError)):
        GRPOConfig(group_size=1)
    with pytest.raises((ValueError, PreftuneError)):
        GRPOConfig(batch_size=10, group_size=4)
