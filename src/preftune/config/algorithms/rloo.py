"""REINFORCE with a leave-one-out baseline."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from preftune.config.algorithms.base import Healthy, algorithm_field
from preftune.config.algorithms.online import OnlineConfig
from preftune.config.base import NonNegative, Positive


class RLOOConfig(OnlineConfig):
    """REINFORCE leave-one-out: whole responses as actions, the other responses to a prompt as baseline."""

    label: ClassVar[str] = "RLOO"
    implementation: ClassVar[str] = "preftune.algorithms.rloo:RLOO"
    healthy: ClassVar[Mapping[str, Healthy]] = {
        "frac_reward_zero_std": Healthy(words="below 0.2", high=0.2),
        "kl_per_sequence": Healthy(words="about 30", alone="at most about 30", high=30.0),
        "ratio": Healthy(words="0.9 to 1.1", low=0.9, high=1.1),
        "clip_ratio/region_mean": Healthy(words="0 to 0.3", low=0.0, high=0.3),
    }
    not_drawn: ClassVar[frozenset[str]] = frozenset({"loss"})  # its page: no meaning of its own
    card: ClassVar[str] = "a policy trained with RLOO against a reward model"

    algorithm: Literal["rloo"] = algorithm_field("rloo")
    group_size: Annotated[int, Field(ge=2)] = Field(
        default=4, description="Responses per prompt; a step has batch_size / group_size prompts."
    )
    kl_coef: NonNegative = Field(default=0.05, description="KL penalty coefficient, in the reward.")
    clip_low: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.2, description="Lower clip range of the ratio of a response."
    )
    clip_high: Positive = Field(default=0.2, description="Upper clip range of the ratio of a response.")

    @property
    def items_per_row(self) -> int:
        return self.group_size
