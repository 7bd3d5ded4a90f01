"""RLOO: rewards, baseline, ratio of a whole response, against hand calculation and TRL's golden vector."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.algorithms.base import Loss, Metrics
from preftune.algorithms.rloo import RLOO, Experience
from preftune.config.algorithms.rloo import RLOOConfig
from preftune.data import Sequences
from preftune.errors import UsageError
from preftune.functional import weighted_sum
from preftune.models.roles import Policy
from tiny import causal_lm, flat, gradients, prompts, roles, rollout, runner

GOLDEN = {
    "old": [
        [-3.0, -5.064011, -0.587309, -2.20601, -0.285553, -0.922974],
        [-0.78868, -1.866939, -1.025118, -0.920495, -1.055909, -0.48524],
        [-1.872234, -0.278499, -2.130787, -1.028822, -0.873592, -0.716859],
        [-1.494343, -2.700309, -1.349825, -0.542036, -1.513822, -3.213702],
    ],
    "new": [
        [-0.9, -4.889674, -0.21445, -2.175144, -0.087542, -0.763867],
        [-0.57217, -1.589706, -0.99739, -1.297774, -1.499132, -0.493843],
        [-1.536843, -0.001, -2.318879, -1.155469, -0.709941, -0.672799],
        [-1.2389, -2.269164, -0.655499, -0.679986, -1.512422, -3.339478],
    ],
    "lengths": [6, 5, 4, 2],
    "advantages": [-1.349682, 1.737373, -0.684748, 0.0],
    "loss": 6.928509910214375,  # RLOOTrainer._compute_loss of TRL 1.16
    "ratios": [20.804722412493707, 0.741536421449634, 1.3473652246686159, 1.9869245678188918],
}


class Reader:
    """A learner that works the loss out and changes nothing."""

    def total(self, count: Tensor) -> Tensor:
        return count

    def update(self, role: str, batch: Any, weights: Tensor, loss: Callable[[Any], Loss]) -> Metrics:
        out = loss(batch)
        metrics = {name: float(weighted_sum(value, weights)) for name, value in out.metrics.items()}
        return {"loss": float(weighted_sum(out.terms, weights)), **metrics}


def test_the_loss_of_an_update_is_trls() -> None:
    old, new = (torch.tensor(GOLDEN[name], dtype=torch.float64) for name in ("old", "new"))
    real = torch.arange(6) < torch.tensor(GOLDEN["lengths"]).unsqueeze(1)
    policy = SimpleNamespace(logprobs_and_entropy=lambda batch, temperature: (new, torch.zeros_like(new)))
    made = RLOO(RLOOConfig(), {"policy": policy}, Reader())  # type: ignore[arg-type, dict-item]
    advantages = torch.tensor(GOLDEN["advantages"], dtype=torch.float64)
    rows = Sequences(torch.zeros(4, 6, dtype=torch.long), real, real)
    metrics = made.update(Experience(sequences=rows, logprobs=old, advantages=advantages))
    assert metrics["loss"] == pytest.approx(GOLDEN["loss"], rel=1e-6)
    assert metrics["ratio"] == pytest.approx(sum(GOLDEN["ratios"]) / 4, rel=1e-6)
    # Row 0: ratio above 1.2 and a bad response: not clipped. Row 1: below 0.8, good: not. Row 2 as row 0.
    assert metrics["clip_ratio/region_mean"] == 0.0


def test_a_response_that_has_moved_as_its_advantage_wants_is_clipped_whole() -> None:
    batch = rollout(5)
    _, metrics = gradients("rloo", batch, clip_low=0.01, clip_high=0.01, kl_coef=0.0)
    made, _ = runner("rloo", roles("rloo"), kl_coef=0.0)
    advantages = made.experience(batch).advantages
    with torch.no_grad():
        new = Policy(causal_lm(1)).logprobs(batch.sequences)
    ratio = ((new - batch.logprobs) * batch.sequences.response).sum(1).exp()
    high, low = (ratio > 1.01) & (advantages > 0), (ratio < 0.99) & (advantages < 0)
    assert metrics["clip_ratio/high_mean"] == pytest.approx(high.float().mean().item(), abs=1e-6)
    assert metrics["clip_ratio/low_mean"] == pytest.approx(low.float().mean().item(), abs=1e-6)
    assert high.any()
    assert low.any()
    assert metrics["ratio"] == pytest.approx(ratio.mean().item(), rel=1e-5)


def test_rewards_are_scores_less_the_kl_of_the_response_and_the_baseline_is_the_others_mean() -> None:
    """K = 2: A = R_1 - R_2 and its negative."""
    made, _ = runner("rloo", roles("rloo"), group_size=2, kl_coef=0.25)
    batch = rollout(5)
    kl = ((batch.logprobs - batch.reference_logprobs) * batch.sequences.response).sum(1)
    first, second = (batch.scores - 0.25 * kl).view(-1, 2).unbind(1)
    expected = torch.stack([first - second, second - first], 1).flatten()
    torch.testing.assert_close(made.experience(batch).advantages, expected, atol=1e-6, rtol=0)
    assert kl.abs().min() > 1e-3
    report = made.report(batch)
    assert report["reward"] == pytest.approx(batch.scores.mean().item(), abs=1e-6)
    expected_reward = (batch.scores - 0.25 * kl).mean().item()
    assert report["objective/rlhf_reward"] == pytest.approx(expected_reward, abs=1e-5)


def test_masked_responses_are_in_no_baseline() -> None:
    """Scores 1, 2, 6 are left of the first group, one response of the second."""
    valid = torch.tensor([True, True, False, True, False, False, True, False])
    scores = torch.tensor([1.0, 2.0, 99.0, 6.0, 3.0, -99.0, 3.0, 3.0])
    made, _ = runner("rloo", roles("rloo"), kl_coef=0.0)
    got = made.experience(replace(rollout(5), scores=scores, valid=valid)).advantages
    torch.testing.assert_close(got, torch.tensor([1 - 4.0, 2 - 3.5, 0, 6 - 1.5, 0, 0, 0, 0]))


def test_at_ratio_1_the_gradient_is_reinforce() -> None:
    """-1/B Σ_i A_i ∇ Σ_t log π(y_it), by autograd on the plain sum."""
    policy = Policy(causal_lm(1))
    batch = rollout(5, policy=policy, noise=0.0)
    got, metrics = gradients("rloo", batch)
    made, _ = runner("rloo", roles("rloo"))
    advantages = made.experience(batch).advantages
    plain = Policy(causal_lm(1))
    (-(plain.logprobs(batch.sequences).sum(1) * advantages).mean()).backward()
    expected = {n: p.grad for n, p in plain.model.named_parameters() if p.grad is not None}
    assert (flat(got["policy"]) - flat(expected)).norm() / flat(expected).norm() < 1e-5
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5)


def test_without_a_scorer_sampling_says_what_is_missing() -> None:
    made, _ = runner("rloo", roles("rloo"))
    with pytest.raises(UsageError, match="nothing scores the responses of rloo"):
        made.step(prompts(3))


def test_a_role_that_was_not_given_is_named() -> None:
    with pytest.raises(UsageError, match="no policy was given, but reference"):
        RLOO(RLOOConfig(), {"reference": roles("rloo")["reference"]}, Reader())  # type: ignore[arg-type]
