"""Direct preference optimisation (Rafailov et al., arXiv:2305.18290, eq. 7) and its offline relatives.

h = (log π(y_c) - log π_ref(y_c)) - (log π(y_r) - log π_ref(y_r)), sums over response tokens, EOS included;
L = -log σ(βh). At π = π_ref the loss is ln 2. Other kinds change the last line only (`preference_loss`). With
`sft_coef` α, L - α log π(y_c) / |y_c| (Pang et al., arXiv:2404.19733).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from preftune.algorithms.base import Learner, Loss, Metrics, Roles
from preftune.config import DPOConfig, StageSettings
from preftune.data.batch import Pairs, Rows, Sequences, concatenate, content_keys
from preftune.functional import preference_loss
from preftune.models.roles import Role
from preftune.models.shards import readable


@dataclass(frozen=True, slots=True)
class ScoredPairs(Rows):
    """Pairs with the reference's log-probabilities of whole responses: both (B,)."""

    pairs: Pairs
    reference_chosen: Tensor
    reference_rejected: Tensor


class DPO:
    Config: ClassVar[type[StageSettings]] = DPOConfig
    needs: ClassVar[tuple[str, ...]] = ("policy", "reference")
    trains: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(self, config: DPOConfig, models: Mapping[str, Role], learner: Learner) -> None:
        self.config, self.learner = config, learner
        self.policy, self.reference = Roles(models).policy, Roles(models).reference
        self.cache: dict[tuple[bytes, ...], Tensor] = {}

    def step(self, batch: Pairs) -> Metrics:
        rows = torch.ones(len(batch), device=batch.chosen.ids.device)
        weights = rows / self.learner.total(rows.sum())
        tokens = batch.chosen.attention.sum() + batch.rejected.attention.sum()
        trained = float(self.learner.total(tokens))
        metrics = self.learner.update("policy", self.with_reference(batch), weights, self.loss)
        return {**metrics, "tokens/trained": trained}

    def with_reference(self, batch: Pairs) -> ScoredPairs:
        repeated = self.config.epochs > 1  # pairs come back
        size = 1 if repeated else self.config.microbatch_size
        batches = [batch[slice(i, i + size)] for i in range(0, max(len(batch), 1), size)]
        with readable(self.reference):
            summed = [self.remembered(pairs) if repeated else self.reference_sums(pairs) for pairs in batches]
        chosen, rejected = torch.cat(summed, 1)
        return ScoredPairs(batch, chosen, rejected)

    def reference_sums(self, pairs: Pairs) -> Tensor:
        """Log-probabilities of whole responses, chosen and rejected: (2, B)."""
        sequences = concatenate(pairs.chosen, pairs.rejected)
        return torch.stack(self.reference.logprobs(sequences).sum(1).chunk(2))

    def remembered(self, pair: Pairs) -> Tensor:
        """The same for one pair, (2, 1), computed once in a run; one pair at a time, so that a resumed run
        has the same last digits.
        """
        key = (*content_keys(pair.chosen), *content_keys(pair.rejected))
        if key not in self.cache:
            self.cache[key] = self.reference_sums(pair)
        return self.cache[key]

    def loss(self, batch: ScoredPairs) -> Loss:
        pairs, beta = batch.pairs, self.config.beta
        chosen, rejected = self.policy.logprobs(concatenate(pairs.chosen, pairs.rejected)).sum(1).chunk(2)
        averaged = self.config.length_average
        terms = preference_loss(
            chosen,
            rejected,
            batch.reference_chosen,
            batch.reference_rejected,
            beta=beta,
            kind=self.config.kind,
            label_smoothing=self.config.label_smoothing,
            chosen_lengths=_lengths(pairs.chosen) if averaged else None,
            rejected_lengths=_lengths(pairs.rejected) if averaged else None,
        )
        reward_chosen = beta * (chosen - batch.reference_chosen).detach()
        reward_rejected = beta * (rejected - batch.reference_rejected).detach()
        metrics = {
            "rewards/chosen": reward_chosen,
            "rewards/rejected": reward_rejected,
            "rewards/margins": reward_chosen - reward_rejected,
            "rewards/accuracies": (reward_chosen > reward_rejected).float(),
            "logps/chosen": chosen.detach(),
            "logps/rejected": rejected.detach(),
        }
        if self.config.sft_coef:
            nll = -chosen / _lengths(pairs.chosen).clamp(min=1)  # of a token
            terms, metrics["nll_loss"] = terms + self.config.sft_coef * nll, nll.detach()
        return Loss(terms, metrics)


def _lengths(sequences: Sequences) -> Tensor:
    return sequences.response.sum(1)
