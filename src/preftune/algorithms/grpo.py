"""Group relative policy optimisation (Shao et al., arXiv:2402.03300) and its published variants.

    sample K responses y_1..y_K ~ π(.|x) to each prompt; scores s_i
    A_i = (s_i - mean_group) / (std_group + 1e-4), the same for every token of y_i;  equal scores: exactly 0
    repeat `epochs` times over `minibatches`:
        -min(ρ A, clip(ρ, 1 - clip_low, 1 + clip_high) A) + kl_coef · kl,   ρ = π / π_old

Variants. `reduction`: "grpo" is the mean over a sequence's tokens, then over sequences; "dapo" the mean over
all tokens of the global batch (arXiv:2503.14476), and so is "bnpo", since nothing here is normalised per
microbatch; "dr_grpo" divides by a constant length (arXiv:2503.20783). `scale` divides by the group's std, the
batch's, or nothing. `kl` is k3 as in the paper, k2, or k3 times the ratio; the last two have the gradient of
the reverse KL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from preftune.algorithms.base import Learner, Loss, Metrics, Roles
from preftune.algorithms.on_policy import (
    clip_metrics,
    corrected,
    group_metrics,
    group_updates,
    response_metrics,
    sampled,
    sampled_step,
    scored_rows,
)
from preftune.config import GRPOConfig, StageSettings
from preftune.data.batch import Prompts, Rows, Sequences
from preftune.functional import (
    constant_length,
    group_advantages,
    kl_estimate,
    ppo_policy_loss,
    sequence_mean,
    token_mean,
)
from preftune.models.roles import Role
from preftune.rollout.rollout import Rollout
from preftune.rollout.score import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(Rows):
    """A rollout with the advantage of each response: log-probs (B, T), advantages (B,), or (B, T) where
    another sampler's tokens are weighted.
    """

    sequences: Sequences
    logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor


class GRPO:
    Config: ClassVar[type[StageSettings]] = GRPOConfig
    needs: ClassVar[tuple[str, ...]] = ("policy", "reference")
    trains: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(
        self, config: GRPOConfig, models: Mapping[str, Role], learner: Learner, scorer: Scorer | None = None
    ) -> None:
        self.config, self.learner, self.scorer = config, learner, scorer
        self.roles = Roles(models)
        self.policy = self.roles.policy

    def step(self, batch: Prompts) -> Metrics:
        # 1. sample groups of responses and score them
        # 2. advantages within each group; 3. updates of the policy
        return sampled_step(self, batch)

    def rollout(self, batch: Prompts) -> Rollout:
        return sampled(batch, self.config, self.roles, self.scorer, self.learner)

    def improve(self, rollout: Rollout, seed: int = 0) -> Metrics:
        return group_updates(self, rollout, seed)

    def experience(self, rollout: Rollout) -> Experience:
        size, valid = self.config.group_size, scored_rows(rollout, self.config.group_size)
        advantages = group_advantages(rollout.scores, size, self.config.scale, valid=valid)
        return Experience(
            sequences=rollout.learnable,
            logprobs=rollout.logprobs,
            reference_logprobs=rollout.reference_logprobs,
            advantages=corrected(advantages, rollout),
        )

    def update(self, batch: Experience) -> Metrics:
        return self.learner.update("policy", batch, self.weights(batch), self.loss)

    def weights(self, batch: Experience) -> Tensor:
        """How terms are averaged over the global minibatch: (B, T), summing to 1 (dr_grpo: to at most 1)."""
        response, total = batch.sequences.response, self.learner.total
        match self.config.reduction:
            case "grpo":
                return sequence_mean(response, total(response.any(1).sum()))
            case "dr_grpo":
                # All responses, those without a score too: a constant does not depend on what was sampled.
                rows = total(torch.tensor(len(response), device=response.device))
                return constant_length(response, self.config.max_new_tokens, rows)
            case _:
                return token_mean(response, total(response.sum()))

    def loss(self, batch: Experience) -> Loss:
        config, response = self.config, batch.sequences.response
        logprobs, entropy = self.policy.logprobs_and_entropy(batch.sequences, config.temperature)
        terms = ppo_policy_loss(
            logprobs, batch.logprobs, batch.advantages, config.clip_low, config.clip_high, mask=response
        )
        ratio = (logprobs - batch.logprobs).exp()
        kl = kl_estimate(logprobs, batch.reference_logprobs, "k2" if config.kl == "k2" else "k3")
        if config.kl == "k3_ratio":
            kl = kl * ratio
        clipped = clip_metrics(ratio.detach(), batch.advantages, config.clip_low, config.clip_high, response)
        return Loss(terms + config.kl_coef * kl, {"entropy": entropy, "kl": kl.detach(), **clipped})

    def report(self, rollout: Rollout) -> Metrics:
        """What was sampled, before the updates. `kl_per_sequence` is k1 summed over the response."""
        groups = group_metrics(rollout, self.config.group_size)
        return {**response_metrics(rollout, self.config), **groups}
