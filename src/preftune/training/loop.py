"""The outer loop: it counts, logs and checkpoints, and does not know which algorithm it drives.

A batch is a pure function of the step, so a resumed run sees the same batches as an uninterrupted one.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.algorithms.base import Algorithm, Metrics
from preftune.training import checkpoint
from preftune.training.learner import Learner
from preftune.training.metrics import MetricsLog


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long to train and where to write."""

    steps: int
    metrics: Path
    checkpoints: Path
    checkpoint_every: int
    keep: int


def train(
    algorithm: Algorithm,
    learner: Learner,
    batch_at: Callable[[int], Any],
    plan: Plan,
    on_step: Callable[[int, Metrics], None],
) -> None:
    """Run the remaining steps; the last state is left in the learner's models."""
    start = checkpoint.restore(plan.checkpoints, learner)
    log = MetricsLog(plan.metrics, resume_at=start) if learner.is_main else None
    for step in range(start, plan.steps):
        began = time.monotonic()
        factor = learner.set_progress(step, plan.steps)
        metrics = algorithm.step(batch_at(step))
        row = {**metrics, "lr_factor": factor, "step_seconds": time.monotonic() - began}
        if log is not None:
            log.append(step + 1, row)
        on_step(step + 1, row)
        if (step + 1) % plan.checkpoint_every == 0 and step + 1 < plan.steps:
            if learner.is_main:
                checkpoint.save(plan.checkpoints, step + 1, learner, plan.keep)
            learner.wait()
