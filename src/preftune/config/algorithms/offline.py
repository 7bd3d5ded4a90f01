"""What algorithms share that learn from training rows."""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

from pydantic import Field

from preftune.config.algorithms.base import OptimizerConfig, Part, StageSettings
from preftune.config.base import Count, Name, Positive, later


class OfflineConfig(StageSettings):
    """What algorithms share that learn from training rows: how many of them, and how often."""

    length: ClassVar[str] = "epochs"

    algorithm: Any = Field(description="Algorithm of this stage.")
    part: Part = later(
        "all",
        "Half of the training prompts to learn from: what learns from one half and a judge on "
        "the other share no prompt.",
    )
    sources: Name | None = later(
        None, "Learn only from rows whose source, the directory of their file, has this in its name."
    )
    init: Name = Field(default="sft", description='Initial policy and reference: a policy stage, or "base".')
    rows: Count | None = Field(
        default=None, description="Number of training rows, such as pairs or single responses; none uses all."
    )
    epochs: Count = Field(default=1, description="Training epochs.")
    batch_size: Count = Field(default=32, description="Pairs per update.")
    microbatch_size: Count = Field(
        default=8, description="How many of batch_size per forward pass; bounds memory, not results."
    )
    learning_rate: Positive = Field(default=2e-6, description="Peak learning rate.")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW.")

    def training_part(self) -> Part:
        return self.part

    @property
    def most_rows(self) -> int | None:
        return self.rows

    def learns_from(self, source: str) -> bool:
        return self.sources is None or self.sources in source

    def on_part(self, part: Part) -> Self:
        return self.model_copy(update={"part": part})

    def rows_planned(self, rows: int) -> float:
        return min(self.rows or rows, rows or math.inf) * self.epochs

    def steps_on(self, rows: float) -> int:
        return math.ceil(self.epochs * rows / self.rows_per_step)

    def tokens_per_row(self, prompt: float, chosen: float, rejected: float) -> float:
        return prompt + chosen if self.batch == "sequences" else 2 * prompt + chosen + rejected

    def consuming(self, rows_wanted: float, rows: int) -> Self:
        rounded = max(round(rows_wanted / self.rows_per_step), 1) * self.rows_per_step
        if rounded <= rows:
            return self.model_copy(update={"rows": rounded, "epochs": 1})
        return self.model_copy(update={"rows": None, "epochs": max(round(rounded / rows), 1)})

    def plan(self, rows: Sequence[int] | None = None) -> str:
        if rows is not None:
            taken = [min(count, self.rows or count) for count in rows]
            steps = sum(map(self.steps_on, taken))
            return f"from {self.init}: {sum(taken):,} rows, {steps} steps of {self.batch_size}"
        amount = "all rows" if self.rows is None else f"{self.rows} rows"
        times = "" if self.epochs == 1 else f", {self.epochs} times"
        return f"from {self.init}: {amount}{times} in batches of {self.batch_size}"
