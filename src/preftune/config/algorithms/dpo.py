"""Direct preference optimisation."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from preftune.config.algorithms.base import Batch, Healthy, algorithm_field
from preftune.config.algorithms.offline import OfflineConfig
from preftune.config.base import Name, NonNegative, Positive, later
from preftune.kinds import SMOOTHED_KINDS, PreferenceKind


class DPOConfig(OfflineConfig):
    """Direct preference optimisation against the policy it starts from."""

    label: ClassVar[str] = "DPO"
    implementation: ClassVar[str] = "preftune.algorithms.dpo:DPO"
    batch: ClassVar[Batch] = "pairs"
    headline: ClassVar[Mapping[str, str]] = {
        "loss": "loss",
        "rewards/accuracies": "accuracy",
        "rewards/margins": "margin",
    }
    drawn_first: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/accuracies", "rewards/margins"),
        *("rewards/chosen", "logps/chosen", "logps/rejected", "grad_norm"),
    )
    healthy: ClassVar[Mapping[str, Healthy]] = {
        "loss": Healthy(words="0.5 to 0.69", low=0.5, high=0.6932, only={"kind": "sigmoid", "sft_coef": 0.0}),
        "rewards/accuracies": Healthy(words="0.55 to 0.75", low=0.55, high=0.75),
    }
    card: ClassVar[str] = "a policy trained with DPO on preference pairs"

    algorithm: Literal["dpo"] = algorithm_field("dpo")
    reference: Name | None = later(
        None, 'Reference policy, if it is not the initial one: a policy stage, or "base".'
    )
    beta: Positive = Field(default=0.1, description="Strength of the KL constraint to the reference.")
    kind: PreferenceKind = Field(default="sigmoid", description="Preference loss.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        default=0.0, description="Assumed label-noise rate; for kinds sigmoid and robust."
    )
    length_average: bool = Field(
        default=False, description="Average log-probabilities over the response instead of summing them."
    )
    sft_coef: NonNegative = later(
        0.0,
        "Weight of the chosen response's negative log-likelihood per token in the loss (Pang et "
        "al., arXiv:2404.19733); keeps responses, and their ends, likely.",
    )

    @model_validator(mode="after")
    def _smoothing_has_a_kind(self) -> Self:
        if self.label_smoothing and self.kind not in SMOOTHED_KINDS:
            raise ValueError(
                f"label_smoothing = {self.label_smoothing} has no meaning for kind {self.kind!r}: "
                f"set it to 0, or use kind {' or '.join(SMOOTHED_KINDS)}"
            )
        return self

    @property
    def reference_stage(self) -> str:
        return self.reference or self.init

    def implicit_beta(self) -> float | None:
        return None if self.kind == "reference_free" else self.beta  # which is fitted without the reference

    @property
    def implicit_average(self) -> bool:
        return self.length_average

    def variant(self) -> str:
        return f", β {self.beta:g}"
