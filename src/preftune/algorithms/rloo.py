"""REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al., arXiv:2402.14740): a response is one action.

    sample K responses y_1..y_K ~ π(.|x) to each prompt; scores s_i
    R_i = s_i - kl_coef Σ_t (log π_old - log π_ref)_t;  A_i = R_i - mean of the other R_j
    repeat `epochs` times over `minibatches`:
        -min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A),  ρ = π(y) / π_old(y) of the whole response

At ρ = 1 the gradient is that of REINFORCE with an unbiased baseline: no critic, no standard deviation. The
mean is over responses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from preftune.algorithms.base import Learner, Loss, Metrics, Roles
from preftune.algorithms.on_policy import (
    clip_metrics,
    corrected,
    group_metrics,
    group_updates,
    kl_per_sequence,
    response_metrics,
    sampled,
    sampled_step,
    scored_rows,
)
from preftune.config import StageSettings
from preftune.config.algorithms.rloo import RLOOConfig
from preftune.data.batch import Prompts, Rows, Sequences
from preftune.functional import leave_one_out_advantages, ppo_policy_loss, sequence_mean
from preftune.functional.masked import zero_off
from preftune.models.roles import Role
from preftune.rollout.rollout import Rollout
from preftune.rollout.score import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(Rows):
    """A rollout with the advantage of each response: log-probs (B, T), advantages (B,) or (B, 1)."""

    sequences: Sequences
    logprobs: Tensor
    advantages: Tensor


class RLOO:
    Config: ClassVar[type[StageSettings]] = RLOOConfig
    needs: ClassVar[tuple[str, ...]] = ("policy", "reference")
    trains: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(
        self, config: RLOOConfig, models: Mapping[str, Role], learner: Learner, scorer: Scorer | None = None
    ) -> None:
        self.config, self.learner, self.scorer = config, learner, scorer
        self.roles = Roles(models)
        self.policy = self.roles.policy

    def step(self, batch: Prompts) -> Metrics:
        return sampled_step(self, batch)

    def rollout(self, batch: Prompts) -> Rollout:
        return sampled(batch, self.config, self.roles, self.scorer, self.learner)

    def improve(self, rollout: Rollout, seed: int = 0) -> Metrics:
        return group_updates(self, rollout, seed)

    def experience(self, rollout: Rollout) -> Experience:
        size, valid = self.config.group_size, scored_rows(rollout, self.config.group_size)
        rewards = rollout.scores - self.config.kl_coef * kl_per_sequence(rollout)
        return Experience(
            sequences=rollout.learnable,
            logprobs=rollout.logprobs,
            advantages=corrected(leave_one_out_advantages(rewards, size, valid), rollout, "sequence_sum"),
        )

    def update(self, batch: Experience) -> Metrics:
        response = batch.sequences.response
        weights = sequence_mean(response, self.learner.total(response.any(1).sum()))
        return self.learner.update("policy", batch, weights, self.loss)

    def loss(self, batch: Experience) -> Loss:
        config, response = self.config, batch.sequences.response
        low, high = config.clip_low, config.clip_high
        logprobs, entropy = self.policy.logprobs_and_entropy(batch.sequences, config.temperature)
        terms = ppo_policy_loss(
            logprobs, batch.logprobs, batch.advantages, low, high, level="sequence_sum", mask=response
        )
        moved = zero_off(logprobs.detach() - batch.logprobs, response).sum(1, keepdim=True)
        ratio = moved.clamp(max=88.0).exp()  # finite, as in the loss
        return Loss(terms, {"entropy": entropy, **clip_metrics(ratio, batch.advantages, low, high, response)})

    def report(self, rollout: Rollout) -> Metrics:
        """What was sampled, before the updates."""
        groups = group_metrics(rollout, self.config.group_size)
        penalty = self.config.kl_coef * groups["kl_per_sequence"]
        return {
            **response_metrics(rollout, self.config),
            **groups,
            "objective/rlhf_reward": groups["reward"] - penalty,
        }
