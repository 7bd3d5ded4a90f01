"""Supervised fine-tuning."""

from typing import ClassVar, Literal

from pydantic import Field

from preftune.config.algorithms.base import Batch, OptimizerConfig, algorithm_field
from preftune.config.algorithms.offline import OfflineConfig
from preftune.config.base import Count, Name, Positive


class SFTConfig(OfflineConfig):
    """Supervised fine-tuning on chosen responses."""

    label: ClassVar[str] = "SFT"
    implementation: ClassVar[str] = "preftune.algorithms.sft:SFT"
    batch: ClassVar[Batch] = "sequences"
    uses: ClassVar[tuple[str, ...]] = ("pairs", "unpaired", "text")
    imitates: ClassVar[bool] = True
    card: ClassVar[str] = "a causal language model, fine-tuned on the chosen responses of preference pairs"

    algorithm: Literal["sft"] = algorithm_field("sft")
    init: Name = Field(default="base", description='Initial weights: a stage, or "base".')
    rows: Count | None = Field(default=None, description="Number of training rows; none uses all.")
    epochs: Count = Field(default=1, description="Training epochs.")
    batch_size: Count = Field(default=32, description="Responses per update.")
    microbatch_size: Count = Field(
        default=8, description="Responses per forward pass; bounds memory, not results."
    )
    learning_rate: Positive = Field(default=2e-5, description="Peak learning rate.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")
