"""Sums over the microbatches of an update."""

import torch
from torch import Tensor

from preftune.algorithms.base import Loss
from preftune.functional import weighted_sum


class Tally:
    """Running sums of the loss and of metrics over microbatches."""

    def __init__(self) -> None:
        self.weight = torch.tensor(0.0)
        self.values: dict[str, Tensor] = {}
        self.kinds: dict[str, str] = {}

    def add(self, loss: Tensor, out: Loss, weights: Tensor) -> None:
        self.weight = self.weight + weights.sum().detach().float()
        self._add("loss", loss, "loss")
        for name, metric in out.metrics.items():
            if metric.shape == out.terms.shape:
                self._add(name, weighted_sum(metric.detach(), weights), "weight")
            else:
                self._add(name, metric.detach().sum(), "rows")

    def fill(self, kinds: dict[str, str]) -> None:
        """Set zeros under the names that another process has."""
        for name, kind in kinds.items():
            self._add(name, torch.tensor(0.0), kind)

    def _add(self, name: str, value: Tensor, kind: str) -> None:
        self.values[name] = self.values.get(name, torch.zeros_like(value)) + value
        self.kinds[name] = kind
