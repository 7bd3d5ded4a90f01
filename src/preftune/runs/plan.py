"""What is about to happen, in a few lines, before anything slow starts."""

import math
from collections.abc import Sequence

from preftune.config import GRPOConfig, PPOConfig, RunConfig
from preftune.config.show import scored_by
from preftune.data import Dataset
from preftune.data.dataset import SPLIT_NAMES
from preftune.rundir import BASE, RunDir
from preftune.runs.console import Console


def show_plan(
    console: Console, config: RunConfig, dataset: Dataset, run: RunDir, stages: Sequence[str]
) -> None:
    """The data, and every stage with what it starts from and how long it is."""
    counts = (f"{len(getattr(dataset, split)):,} {split}" for split in SPLIT_NAMES)
    console.line(f"data: {', '.join(counts)} pairs")
    rows = [(name, config.stage[name].algorithm, _length(config, dataset, name)) for name in stages]
    if (scratch := config.model.scratch) is not None:
        size = f"GPT-2 {scratch.layers} x {scratch.width} from random weights"
        rows.insert(
            0, (BASE, "pretraining", f"{size}: {scratch.steps} steps of {scratch.batch_size} documents")
        )
    console.plan(config.name, str(run.path), rows)


def _length(config: RunConfig, dataset: Dataset, name: str) -> str:
    stage = config.stage[name]
    if isinstance(stage, PPOConfig | GRPOConfig):
        parents = f"from {stage.init}, scored by {scored_by(stage)}"
        return f"{parents}: {stage.steps} steps of {stage.batch_size} replies"
    rows = min(len(dataset.train), stage.rows or len(dataset.train))
    steps = math.ceil(rows * stage.epochs / stage.batch_size)
    return f"from {stage.init}: {rows:,} rows, {steps} steps of {stage.batch_size}"
