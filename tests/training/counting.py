"""An algorithm whose weights say how many steps they have behind them, for tests of how a stage ends."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from resuming import Killed

from preftune.config import OptimizerConfig
from preftune.models.roles import Policy
from preftune.training.learner import Learner
from preftune.training.loop import EarlierState, Plan, train
from tiny import causal_lm


class Counting:
    """Each step adds 1 to a weight of its policy, and gives what `measured` says of the steps before it."""

    def __init__(self, measured: Callable[[int], dict[str, float]]) -> None:
        self.learner, policy, self.measured = Learner(), Policy(causal_lm(1)), measured
        self.learner.train("policy", policy, OptimizerConfig(), 1e-3)
        self.weight = next(policy.model.parameters())
        self.start = self.weight.detach().clone()

    @property
    def moved(self) -> float:
        return (self.weight.detach() - self.start).mean().item()

    @property
    def steps(self) -> int:
        return round(self.moved)

    def step(self, batch: Any) -> dict[str, float]:
        metrics = self.measured(self.steps)
        with torch.no_grad():
            self.weight += 1
        self.learner.updates += 1
        return metrics


def play(algorithm: Counting, out: Path, every: int, kill_at: int = 0, **plan: Any) -> EarlierState | None:
    """Nine steps with a checkpoint `every` so many; how they ended."""

    def on_step(step: int, metrics: Mapping[str, float]) -> None:
        if step == kill_at:
            raise Killed

    files = {"metrics": out / "metrics.jsonl", "checkpoints": out / "checkpoints"}
    whole = Plan(steps=9, **files, checkpoint_every=every, keep=1, **plan)
    given: Any = algorithm
    return train(given, algorithm.learner, lambda step: step, whole, on_step)
