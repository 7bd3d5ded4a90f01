"""Supervised fine-tuning."""

from typing import ClassVar, Literal

from pydantic import Field

from preftune.config.algorithms.base import Batch, OfflineConfig, OptimizerConfig, algorithm_field
from preftune.config.base import Count, Name, Positive


class SFTConfig(OfflineConfig):
    """Supervised fine-tuning on chosen responses."""

    label: ClassVar[str] = "SFT"
    implementation: ClassVar[str] = "preftune.algorithms.sft:SFT"
    batch: ClassVar[Batch] = "sequences"
    imitates: ClassVar[bool] = True
    card: ClassVar[str] = "a causal language model, fine-tuned on the chosen responses of preference pairs"

    algorithm: Literal["sft"] = algorithm_field("sft")
    init: Name = Field(default="base", description='Where the weights come from: a stage, or "base".')
    rows: Count | None = Field(default=None, description="Training rows to use; none takes all.")
    epochs: Count = Field(default=1, description="Passes over the rows.")
    batch_size: Count = Field(default=32, description="Responses per update.")
    microbatch_size: Count = Field(default=8, description="Responses in memory at a time.")
    learning_rate: Positive = Field(default=2e-5, description="Highest learning rate.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")
