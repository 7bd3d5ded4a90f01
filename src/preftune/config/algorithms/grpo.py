"""Group-relative policy optimisation."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from preftune.config.algorithms.base import Healthy, algorithm_field
from preftune.config.algorithms.online import OnlineConfig
from preftune.config.base import NonNegative, Positive


class GRPOConfig(OnlineConfig):
    """Group-relative policy optimisation: no critic, several responses to each prompt."""

    label: ClassVar[str] = "GRPO"
    implementation: ClassVar[str] = "preftune.algorithms.grpo:GRPO"
    healthy: ClassVar[Mapping[str, Healthy]] = {
        "frac_reward_zero_std": Healthy(words="below 0.2", high=0.2),
        "kl": Healthy(words="0 to 0.1", low=0.0, high=0.1),
        "kl_per_sequence": Healthy(words="about 30", alone="at most about 30", high=30.0),
        "ratio": Healthy(words="0.99 to 1.01", low=0.99, high=1.01),
        "clip_ratio/region_mean": Healthy(words="0 to 0.2", low=0.0, high=0.2),
    }
    not_drawn: ClassVar[frozenset[str]] = frozenset({"loss"})  # its page: no meaning of its own
    card: ClassVar[str] = "a policy trained with GRPO against a reward model"

    algorithm: Literal["grpo"] = algorithm_field("grpo")
    group_size: Annotated[int, Field(ge=2)] = Field(
        default=8, description="Responses per prompt; a step has batch_size / group_size prompts."
    )
    kl_coef: NonNegative = Field(default=0.04, description="KL penalty coefficient, in the loss.")
    kl: Literal["k2", "k3", "k3_ratio"] = Field(
        default="k3", description="KL estimator; k3_ratio weights k3 by the policy ratio."
    )
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="Lower clip range of the probability ratio."
    )
    clip_high: Positive = Field(default=0.2, description="Upper clip range of the probability ratio.")
    reduction: Literal["dapo", "grpo", "bnpo", "dr_grpo"] = Field(
        default="dapo",
        description="How token losses are averaged: over all tokens, per response, or by a fixed length.",
    )
    scale: Literal["group", "batch", "none"] = Field(
        default="group",
        description="Standard deviation that normalises advantages: of the group, the batch, or none.",
    )

    @property
    def items_per_row(self) -> int:
        return self.group_size
