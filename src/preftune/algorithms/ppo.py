"""Proximal policy optimisation on a learned reward (Schulman et al., arXiv:1707.06347; Ziegler et al.,
arXiv:1909.08593).

    sample y ~ π(.|x);  score s = r(x, y), or a fixed score if y does not end
    R_t = -kl_coef (log π_old - log π_ref)_t + [t last] s        KL to SFT in the reward, per token
    A, returns = GAE(R, V_old; γ, λ);  A <- whitened over the rollout
    repeat `epochs` times over `minibatches`:
        policy:  -min(ρ A, clip(ρ, 1 ± clip) A),  ρ = π / π_old
        critic:  ½ max((V - ret)², (V_old + clip(V - V_old, ± value_clip) - ret)²)

Choices: the score sits on the last written token (no pad position is trained); critic and policy are separate
networks with an optimizer each, so there is no value coefficient; advantages are whitened over the rollout,
not a minibatch. With `kl_target` the coefficient is steered after each step (Ziegler et al., section 2.2).
The first `critic_warmup` steps train the critic alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from preftune.algorithms.base import Learner, Loss, Metrics, Roles, averaged
from preftune.algorithms.on_policy import (
    corrected,
    kl_per_sequence,
    passes,
    response_metrics,
    sampled,
    sampled_step,
)
from preftune.config import PPOConfig, StageSettings
from preftune.data.batch import Prompts, Rows, Sequences
from preftune.errors import UsageError
from preftune.functional import (
    AdaptiveKL,
    gae,
    kl_estimate,
    masked_whiten,
    ppo_policy_loss,
    ppo_value_loss,
    shaped_rewards,
    token_mean,
)
from preftune.functional.masked import zero_off
from preftune.models.roles import Role
from preftune.rollout.rollout import Rollout
from preftune.rollout.score import Scorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience(Rows):
    """A rollout with its advantages and returns, all (B, T)."""

    sequences: Sequences
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor


class PPO:
    Config: ClassVar[type[StageSettings]] = PPOConfig
    needs: ClassVar[tuple[str, ...]] = ("policy", "reference", "critic")
    trains: ClassVar[tuple[str, ...]] = ("policy", "critic")

    def __init__(
        self, config: PPOConfig, models: Mapping[str, Role], learner: Learner, scorer: Scorer | None = None
    ) -> None:
        self.config, self.learner, self.scorer = config, learner, scorer
        self.roles = Roles(models)
        self.policy, self.critic = self.roles.policy, self.roles.critic

    @property
    def kl_coef(self) -> float:
        """As set, or as `steer` has changed it: the learner saves it with the training state."""
        return self.learner.scalars.get("kl_coef", self.config.kl_coef)

    @property
    def policy_waits(self) -> bool:
        """Whether this step trains the critic alone: one of the first `critic_warmup`."""
        return self.learner.scalars.get("critic_steps", 0.0) < self.config.critic_warmup

    def step(self, batch: Prompts) -> Metrics:
        # 1. sample responses, score them, look them up under policy, reference and critic
        # 2. rewards and advantages; 3. several updates of policy and critic
        return sampled_step(self, batch)

    def rollout(self, batch: Prompts) -> Rollout:
        return sampled(batch, self.config, self.roles, self.scorer, self.learner, self.critic)

    def improve(self, rollout: Rollout, seed: int = 0) -> Metrics:
        """All updates on one rollout, that of all processes."""
        self.learner.note("rewards", rollout.scores)
        experience = self.experience(rollout)
        updates = passes(experience, self.config, seed, self.learner, self.update)
        first = {f"first/{name}": updates[0][name] for name in ("policy/clipfrac_avg", "val/ratio")}
        metrics = {**averaged(updates), **first, **self.report(rollout, experience)}
        if self.policy_waits:
            self.learner.scalars["critic_steps"] = self.learner.scalars.get("critic_steps", 0.0) + 1
        else:
            self.steer(metrics["objective/kl"], len(rollout))
        return metrics

    def steer(self, kl: float, responses: int) -> None:
        """Bring the coefficient nearer to where the KL is `kl_target`, for the next step."""
        config = self.config
        if config.kl_target is not None and math.isfinite(kl):
            controller = AdaptiveKL(self.kl_coef, config.kl_target, config.kl_horizon)
            self.learner.scalars["kl_coef"] = controller.observe(kl, responses)

    def experience(self, rollout: Rollout) -> Experience:
        config, sequences = self.config, rollout.learnable
        response = sequences.response
        if rollout.values is None:
            raise UsageError("the rollout has no values", "collect it with the critic")
        written = rollout.sequences.response
        rewards = shaped_rewards(
            rollout.scores, rollout.logprobs, rollout.reference_logprobs, written, self.kl_coef
        )
        advantages, returns = gae(rewards, rollout.values, response, config.gamma, config.lam)
        learnt = advantages[response]
        white = masked_whiten(learnt, torch.ones_like(learnt))
        return Experience(
            sequences=sequences,
            logprobs=rollout.logprobs,
            values=rollout.values,
            advantages=corrected(torch.zeros_like(advantages).masked_scatter(response, white), rollout),
            returns=returns,
        )

    def update(self, batch: Experience) -> Metrics:
        """One minibatch: one update of the policy, one of the critic."""
        response = batch.sequences.response
        weights = token_mean(response, self.learner.total(response.sum()))
        policy = self.update_policy(batch, weights)
        value = self.learner.update("critic", batch, weights, self.value_loss)
        return {
            **{name: number for name, number in policy.items() if name != "loss"},
            "loss/policy_avg": policy["loss"],
            "loss/value_avg": value["loss"],
            "val/clipfrac_avg": value["val/clipfrac_avg"],
            "grad_norm/critic": value["grad_norm"],
        }

    def update_policy(self, batch: Experience, weights: Tensor) -> Metrics:
        """One update, or only its metrics, with a gradient of 0, while the policy waits for the critic."""
        if not self.policy_waits:
            return self.learner.update("policy", batch, weights, self.policy_loss)
        with self.learner.measuring():
            return {**self.learner.update("policy", batch, weights, self.policy_loss), "grad_norm": 0.0}

    def policy_loss(self, batch: Experience) -> Loss:
        config, response = self.config, batch.sequences.response
        logprobs, entropy = self.policy.logprobs_and_entropy(batch.sequences, config.temperature)
        terms = ppo_policy_loss(
            logprobs, batch.logprobs, batch.advantages, config.clip, config.clip, mask=response
        )
        ratio = (logprobs.detach() - batch.logprobs).exp()
        clipped = ((ratio - 1) * batch.advantages.sign() > config.clip) & response
        return Loss(
            terms,
            {
                "policy/entropy_avg": entropy,
                "policy/approxkl_avg": kl_estimate(batch.logprobs, logprobs.detach(), "k3"),
                "policy/clipfrac_avg": clipped.to(ratio.dtype),
                "val/ratio": ratio,
            },
        )

    def value_loss(self, batch: Experience) -> Loss:
        values, clip = self.critic.values(batch.sequences), self.config.value_clip
        terms = ppo_value_loss(values, batch.values, batch.returns, clip, mask=batch.sequences.response)
        moved = (values.detach() - batch.values).abs()
        clipped = moved > clip if clip is not None else torch.zeros_like(moved, dtype=torch.bool)
        return Loss(terms, {"val/clipfrac_avg": clipped.to(values.dtype)})

    def report(self, rollout: Rollout, experience: Experience) -> Metrics:
        """What was sampled, before the updates."""
        response, learnt = rollout.sequences.response, experience.sequences.response
        kl, scores = kl_per_sequence(rollout), rollout.valid_scores
        errors, returns = (experience.returns - experience.values)[learnt], experience.returns[learnt]
        return {
            **response_metrics(rollout, self.config),
            "objective/entropy": -zero_off(rollout.logprobs, response).sum(1).mean().item(),
            "objective/kl": kl.mean().item(),
            "objective/scores": scores.mean().item(),
            "objective/scores_std": scores.std().item() if len(scores) > 1 else 0.0,
            "objective/non_score_reward": -self.kl_coef * kl.mean().item(),
            "objective/rlhf_reward": (scores.mean() - self.kl_coef * kl.mean()).item(),
            "val/explained_variance": (1 - errors.var() / returns.var().clamp(min=1e-8)).item()
            if len(returns) > 1  # of one token there is no variance
            else 0.0,
            "kl_coef": self.kl_coef,
        }
