"""Kahneman-Tversky optimisation (Ethayarajh et al., arXiv:2402.01306, eq. 8): each response by itself.

    g = log π(y|x) - log π_ref(y|x), sums over response tokens, EOS included
    z = max(0, mean of g over mismatched prompts and responses), no gradient: how far the policy has moved
    desirable: w_D (1 - σ(β (g - z)));  undesirable: w_U (1 - σ(β (z - g)))

z is of the policy before the update and of the global batch: neither microbatches nor processes change it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from preftune.algorithms.base import Learner, Loss, Metrics, Roles
from preftune.config import StageSettings
from preftune.config.algorithms.kto import KTOConfig
from preftune.data.batch import Rows, Sequences, Unpaired
from preftune.functional import kto_kl, kto_loss
from preftune.models.roles import Policy, Reference, Role
from preftune.models.shards import readable
from preftune.rollout.collect import by_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged(Rows):
    """Labelled responses with the reference's log-probability of each, and 1 over the share that its label
    has in the global batch: all (B,). `kl` is z.
    """

    sequences: Sequences
    desirable: Tensor
    reference: Tensor
    per_label: Tensor
    kl: float


class KTO:
    Config: ClassVar[type[StageSettings]] = KTOConfig
    needs: ClassVar[tuple[str, ...]] = ("policy", "reference")
    trains: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(self, config: KTOConfig, models: Mapping[str, Role], learner: Learner) -> None:
        self.config, self.learner = config, learner
        self.policy, self.reference = Roles(models).policy, Roles(models).reference

    def step(self, batch: Unpaired) -> Metrics:
        rows = torch.ones(len(batch), device=batch.desirable.device)
        total = self.learner.total(rows.sum())
        judged = self.judged(batch, total)
        metrics = self.learner.update("policy", judged, rows / total, self.loss)
        tokens = self.learner.total(batch.sequences.attention.sum())
        return {
            **metrics,
            "rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"],
            "kl": judged.kl,
            "tokens/trained": float(tokens),
        }

    def judged(self, batch: Unpaired, total: Tensor) -> Judged:
        liked = self.learner.total(batch.desirable.sum())
        share = torch.where(batch.desirable, liked, total - liked) / total
        reference = self.sums(self.reference, batch.sequences)
        return Judged(
            sequences=batch.sequences,
            desirable=batch.desirable,
            reference=reference,
            per_label=1 / share,
            kl=self.distance(batch).item(),
        )

    def distance(self, batch: Unpaired) -> Tensor:
        """z over the mismatched rows of all processes: a scalar, never below 0."""
        policy_sums = self.learner.gather(self.sums(self.policy, batch.mismatched))
        reference_sums = self.learner.gather(self.sums(self.reference, batch.mismatched))
        return kto_kl(policy_sums, reference_sums)

    @torch.no_grad()
    def sums(self, role: Policy | Reference, sequences: Sequences) -> Tensor:
        """Log-probabilities of whole responses, without gradient: (B,)."""
        with readable(role):
            return by_batches(role.logprobs, sequences, self.config.microbatch_size).sum(1)

    def loss(self, batch: Judged) -> Loss:
        config = self.config
        policy = self.policy.logprobs(batch.sequences).sum(1)
        terms = kto_loss(
            policy,
            batch.reference,
            batch.desirable,
            batch.kl,
            beta=config.beta,
            desirable_weight=config.desirable_weight,
            undesirable_weight=config.undesirable_weight,
        )
        logps = policy.detach() * batch.per_label
        rewards = config.beta * (policy.detach() - batch.reference) * batch.per_label
        metrics = {}
        for name, label in (("chosen", batch.desirable), ("rejected", ~batch.desirable)):
            metrics[f"rewards/{name}"], metrics[f"logps/{name}"] = rewards * label, logps * label
        return Loss(terms, metrics)
