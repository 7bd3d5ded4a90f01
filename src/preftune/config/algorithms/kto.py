"""Kahneman-Tversky optimisation."""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from preftune.config.algorithms.base import Batch, Healthy, algorithm_field, must_divide
from preftune.config.algorithms.offline import OfflineConfig
from preftune.config.base import NonNegative, Positive


class KTOConfig(OfflineConfig):
    """Kahneman-Tversky optimisation: responses labelled desirable or not, each judged on its own."""

    label: ClassVar[str] = "KTO"
    implementation: ClassVar[str] = "preftune.algorithms.kto:KTO"
    batch: ClassVar[Batch] = "unpaired"
    uses: ClassVar[tuple[str, ...]] = ("pairs", "unpaired")
    headline: ClassVar[Mapping[str, str]] = {"loss": "loss", "rewards/margins": "margin", "kl": "KL"}
    panel: ClassVar[Mapping[str, str]] = {"loss": "loss", "rewards/margins": "margin"}
    drawn_first: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/margins", "kl"),
        *("rewards/chosen", "logps/chosen", "logps/rejected", "grad_norm"),
    )
    healthy: ClassVar[Mapping[str, Healthy]] = {"loss": Healthy(words="0.3 to 0.5", low=0.3, high=0.5)}
    card: ClassVar[str] = "a policy trained with KTO on desirable and undesirable responses"

    algorithm: Literal["kto"] = algorithm_field("kto")
    batch_size: int = Field(
        default=64, ge=4, description="Responses per update: a pair gives a desirable and an undesirable one."
    )
    beta: Positive = Field(default=0.1, description="Strength of the KL constraint to the reference.")
    desirable_weight: NonNegative = Field(default=1.0, description="Weight of desirable responses.")
    undesirable_weight: NonNegative = Field(default=1.0, description="Weight of undesirable responses.")

    @model_validator(mode="after")
    def _whole_pairs(self) -> Self:
        must_divide("batch_size", self.batch_size, "a pair's responses", self.items_per_row)
        return self

    @property
    def items_per_row(self) -> int:
        return 2

    def implicit_beta(self) -> float | None:
        return self.beta

    def variant(self) -> str:
        return f", β {self.beta:g}"
