"""A stage ready to run."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from preftune.algorithms.base import Algorithm
from preftune.data import Encoder
from preftune.models.roles import Role
from preftune.training.learner import Learner
from preftune.training.loop import Worth


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stage ready to run: the algorithm, where its batches come from, and what to keep of it."""

    algorithm: Algorithm
    learner: Learner
    batch_at: Callable[[int], Any]
    steps: int
    encoder: Encoder
    model: Role
    rows_at: Callable[[int], list[str]]  # names of the data rows of a step
    imitates: bool = False  # its loss on held-out rows says something
    updates: int = 1  # of the weights, in a step
    budget: tuple[str, float] | None = None  # that ends it early
    begin: Callable[[], None] | None = None  # before its first step
    worth: Worth | None = None  # by which its best checkpoint is found
    rows: int | None = None  # that its steps go over, where they are the data's
    rows_per_step: int = 1
    tokens: float | None = None  # that a step learns from, on average, where its rows are known before it
    rejected: dict[str, int] = field(default_factory=dict)
