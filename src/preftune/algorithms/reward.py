"""Reward modelling: Bradley-Terry on pairs, L = -log σ(r(x, y_c) - r(x, y_r)) [+ c (r_c + r_r)²].

The score is read at the last real token, the EOS of a complete response. Chosen and rejected go through one
forward.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch

from preftune.algorithms.base import Learner, Loss, Metrics, Roles
from preftune.config import RewardConfig, StageSettings
from preftune.data.batch import Pairs, concatenate
from preftune.functional import bradley_terry_loss
from preftune.models.roles import Role


class Reward:
    Config: ClassVar[type[StageSettings]] = RewardConfig
    needs: ClassVar[tuple[str, ...]] = ("reward_model",)
    trains: ClassVar[tuple[str, ...]] = ("reward_model",)

    def __init__(self, config: RewardConfig, models: Mapping[str, Role], learner: Learner) -> None:
        self.config, self.learner = config, learner
        self.reward_model = Roles(models).reward_model

    def step(self, batch: Pairs) -> Metrics:
        rows = torch.ones(len(batch), device=batch.chosen.ids.device)
        return self.learner.update("reward_model", batch, rows / self.learner.total(rows.sum()), self.loss)

    def loss(self, batch: Pairs) -> Loss:
        scores = self.reward_model.raw_scores(concatenate(batch.chosen, batch.rejected))
        chosen, rejected = scores.chunk(2)
        terms = bradley_terry_loss(chosen, rejected, center_coef=self.config.center_coef)
        margin = (chosen - rejected).detach()
        return Loss(
            terms,
            {
                "accuracy": (margin > 0).float(),
                "margin": margin,
                "mean_reward": (chosen + rejected).detach() / 2,
            },
        )
