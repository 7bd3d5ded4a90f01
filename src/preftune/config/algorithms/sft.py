"""Supervised fine-tuning."""

from typing import ClassVar, Literal

from pydantic import Field

from preftune.config.algorithms.base import Batch, algorithm_field
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
    batch_size: Count = Field(default=32, description="Responses per update.")
    learning_rate: Positive = Field(default=2e-5, description="Peak learning rate.")
