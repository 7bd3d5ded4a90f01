"""What is about to happen, in a few lines, before anything slow starts."""

from collections.abc import Sequence

from preftune.config import RunConfig
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
    trained = [(name, config.stage[name]) for name in stages]
    rows = [(name, stage.algorithm, stage.plan(len(dataset.train))) for name, stage in trained]
    if (scratch := config.model.scratch) is not None:
        size = f"GPT-2 {scratch.layers} x {scratch.width} from random weights"
        rows.insert(
            0, (BASE, "pretraining", f"{size}: {scratch.steps} steps of {scratch.batch_size} documents")
        )
    console.plan(config.name, str(run.path), rows)
