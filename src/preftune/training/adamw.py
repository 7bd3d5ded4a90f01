"""AdamW as a stage's settings have it: which weights decay, and how the learning rate goes."""

import math
from typing import Any

import torch

from preftune.config import OptimizerConfig
from preftune.models.trunk import trained_parameters


def decayed_groups(model: torch.nn.Module, settings: OptimizerConfig) -> list[dict[str, Any]]:
    """Parameters of a model as AdamW takes them: those of one dimension, norms and biases, in a group without
    weight decay, as in transformers' Trainer and in nanoGPT.
    """
    parameters = trained_parameters(model)
    if settings.weight_decay == 0 or settings.decay_all:
        return [{"params": parameters}]
    matrices, vectors = ([p for p in parameters if (p.dim() > 1) == wide] for wide in (True, False))
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def schedule_factor(settings: OptimizerConfig, step: int, steps: int) -> float:
    """Linear warm-up over `warmup` of the steps, then constant, linear or cosine down to `final`."""
    warm = settings.warm_steps(steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    progress = (step - warm) / max(steps - warm, 1)
    match settings.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return settings.final + (1 - settings.final) * 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            return settings.final + (1 - settings.final) * (1 - progress)
