"""Supervised fine-tuning: L = -Σ m_t log π(y_t | x, y_<t) / Σ m_t over the whole batch.

m is the response mask, one EOS included; the prompt is context only. The token mean is taken over the global
batch, so that microbatches and processes change nothing. Pretraining from scratch is the same loss on every
token.
"""

from collections.abc import Mapping
from typing import ClassVar

from preftune.algorithms.base import Learner, Loss, Metrics, Roles
from preftune.config import SFTConfig, StageSettings
from preftune.data.batch import Sequences
from preftune.functional import token_mean
from preftune.models.roles import Role


class SFT:
    Config: ClassVar[type[StageSettings]] = SFTConfig
    needs: ClassVar[tuple[str, ...]] = ("policy",)
    trains: ClassVar[tuple[str, ...]] = ("policy",)

    def __init__(self, config: SFTConfig, models: Mapping[str, Role], learner: Learner) -> None:
        self.config, self.learner = config, learner
        self.policy = Roles(models).policy

    def step(self, batch: Sequences) -> Metrics:
        tokens = self.learner.total(batch.response.sum())
        return self.learner.update("policy", batch, token_mean(batch.response, tokens), self.loss)

    def loss(self, batch: Sequences) -> Loss:
        logprobs, entropy = self.policy.logprobs_and_entropy(batch)
        return Loss(-logprobs, {"entropy": entropy})
