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

from preftune.algorithms.base import Learner, Loss, Metrics, averaged
from preftune.algorithms.minibatch import minibatches, response_metrics
from preftune.config import GRPOConfig
from preftune.data.batch import Prompts, Sequences
from preftune.functional import (
    constant_length,
    group_advantages,
    kl_estimate,
    ppo_policy_loss,
    sequence_mean,
    token_mean,
)
from preftune.functional.advantages import centred_groups
from preftune.functional.masked import zero_off
from preftune.models.roles import Policy, Reference, Role
from preftune.rollout.collect import collect
from preftune.rollout.rollout import Rollout, take_rows
from preftune.rollout.score import Scorer
from preftune.seeding import derive_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """A rollout with the advantage of each response: log-probs (B, T), advantages (B,)."""

    sequences: Sequences
    logprobs: Tensor
    reference_logprobs: Tensor
    advantages: Tensor

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, rows: slice | Tensor) -> "Experience":
        return take_rows(self, rows)


class GRPO:
    Config: ClassVar[type] = GRPOConfig
    needs: ClassVar[tuple[str, ...]] = ("policy", "reference", "reward_model")
    trains: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(
        self, config: GRPOConfig, models: Mapping[str, Role], learner: Learner, scorer: Scorer | None = None
    ) -> None:
        self.config, self.learner, self.scorer = config, learner, scorer
        self.policy: Policy = models["policy"]  # type: ignore[assignment]
        self.reference: Reference | None = models.get("reference")  # type: ignore[assignment]

    def step(self, batch: Prompts) -> Metrics:
        # 1. sample groups of responses and score them
        rollout = self.rollout(batch)
        # 2. advantages within each group; 3. updates of the policy
        return self.improve(rollout, seed=derive_seed("minibatches", *batch.seeds))

    def rollout(self, batch: Prompts) -> Rollout:
        assert self.scorer is not None
        assert self.reference is not None
        return collect(
            batch,
            policy=self.policy,
            reference=self.reference,
            scorer=self.scorer,
            responses_per_prompt=self.config.group_size,
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            missing_eos_score=self.config.missing_eos_score,
            batch_size=self.config.microbatch_size,
            say=self.learner.say_once,
        )

    def improve(self, rollout: Rollout, seed: int = 0) -> Metrics:
        """All updates on one rollout."""
        self.learner.note("rewards", rollout.scores)
        experience = self.experience(rollout)
        updates = []
        for epoch in range(self.config.epochs):
            for part in minibatches(experience, self.config.minibatches, derive_seed(seed, epoch)):
                updates.append(self.learner.update("policy", part, self.weights(part), self.loss))
        return {**averaged(updates), **self.learner.average(self.report(rollout))}

    def experience(self, rollout: Rollout) -> Experience:
        size = self.config.group_size
        if rollout.group is not None and (rollout.group.view(-1, size) != rollout.group[::size, None]).any():
            raise ValueError(f"rows of a group must follow each other, {size} at a time")
        pooled, mine = self.learner.pool(rollout.scores)
        valid, _ = self.learner.pool(rollout.learnable.response.any(1).to(rollout.scores))
        advantages = group_advantages(pooled, size, self.config.scale, valid=valid)[mine]
        return Experience(
            sequences=rollout.learnable,
            logprobs=rollout.logprobs,
            reference_logprobs=rollout.reference_logprobs,
            advantages=advantages,
        )

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
        sign = batch.advantages.sign().unsqueeze(1)
        low = (ratio.detach() < 1 - config.clip_low) & (sign < 0) & response
        high = (ratio.detach() > 1 + config.clip_high) & (sign > 0) & response
        return Loss(
            terms + config.kl_coef * kl,
            {
                "entropy": entropy,
                "kl": kl.detach(),
                "clip_ratio/low_mean": low.to(kl.dtype),
                "clip_ratio/high_mean": high.to(kl.dtype),
                "clip_ratio/region_mean": (low | high).to(kl.dtype),
                "ratio": ratio.detach() * response,
            },
        )

    def report(self, rollout: Rollout) -> Metrics:
        """What was sampled, before the updates. `kl_per_sequence` is k1 summed over the response."""
        centred = centred_groups(rollout.scores, self.config.group_size, rollout.valid)
        valid = rollout.learnable.response.any(1).view_as(centred)
        variance = centred.square().sum(1) / (valid.sum(1) - 1).clamp(min=1)
        kl = zero_off(rollout.logprobs - rollout.reference_logprobs, rollout.sequences.response).sum(1)
        return {
            **response_metrics(rollout, self.config.max_new_tokens, self.config.epochs),
            "reward": rollout.valid_scores.mean().item(),
            "reward_std": variance.sqrt().mean().item(),
            "frac_reward_zero_std": (centred == 0).all(1).float().mean().item(),
            "kl_per_sequence": kl.mean().item(),
        }
