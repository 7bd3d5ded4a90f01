"""What an algorithm is, and what it hands to the learner."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from torch import Tensor

from preftune.config import StageSettings
from preftune.errors import UsageError
from preftune.models.roles import Critic, Policy, Reference, RewardModel, Role

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Loss:
    """Unreduced loss terms, (B, T) or (B,), and metrics.

    A metric shaped like `terms` is averaged with the learner's weights; any other is a per-row (B,) value and
    is averaged over rows. Metrics carry no gradient.
    """

    terms: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Roles:
    """The models of an algorithm by role; UsageError for a role that was not given."""

    roles: Mapping[str, Role]

    @property
    def policy(self) -> Policy:
        return cast(Policy, self._get("policy"))

    @property
    def reference(self) -> Reference:
        return cast(Reference, self._get("reference"))

    @property
    def reward_model(self) -> RewardModel:
        return cast(RewardModel, self._get("reward_model"))

    @property
    def critic(self) -> Critic:
        return cast(Critic, self._get("critic"))

    def _get(self, name: str) -> Role:
        if name not in self.roles:
            raise UsageError(f"no {name} was given, but {', '.join(self.roles) or 'nothing'}")
        return self.roles[name]


class Learner(Protocol):
    """The part of training/learner.py that algorithms use. They receive it; they never import it."""

    scalars: dict[str, float]  # numbers that an algorithm carries from step to step, saved in checkpoints

    def update(self, role: str, batch: Any, weights: Tensor, loss: Callable[[Any], Loss]) -> Metrics:
        """One optimizer step of `role` on all rows of `batch`, this process's share of a global one.

        `weights` (B, T) or (B,) must sum to 1 over the global batch; `loss` maps a microbatch to unreduced
        terms. Returns metrics averaged over the batch, with "loss" and "grad_norm" (before clipping).
        """
        ...

    def measuring(self) -> AbstractContextManager[None]:
        """Within `with`, an update computes its metrics and changes nothing."""
        ...

    def total(self, count: Tensor) -> Tensor:
        """A count summed over all processes."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """Rows (N, ...) of all processes, in the order of the global batch; columns are filled up with 0."""
        ...

    def share(self, batch: Any) -> Any:
        """This process's rows of a batch that every process has: there may be none."""
        ...

    def note(self, name: str, values: Tensor) -> None:
        """Numbers to write down, under this name, if this step turns out to hold one that is not finite."""
        ...

    def say_once(self, text: str) -> None:
        """Report to the caller; the same text only once."""
        ...


class Algorithm(Protocol):
    """Consumes one batch, changes the policy, reports numbers. The single extension point.

    What plan, report and cards say of it stands on its `Config`. One that samples (`Config.batch` is
    "prompts") is given a scorer too, and has `improve(rollout)`, all updates on one rollout.
    """

    Config: ClassVar[type[StageSettings]]
    needs: ClassVar[tuple[str, ...]]  # roles that are made for it: it reads all of them
    trains: ClassVar[tuple[str, ...]]  # those of them that it changes

    def __init__(self, config: Any, models: Mapping[str, Role], learner: Learner) -> None: ...

    def step(self, batch: Any) -> Metrics:
        """One step: one update of a batch of rows; or sample, score, and several updates."""
        ...


@runtime_checkable
class OnPolicy(Protocol):
    """One that samples, in two halves: what was sampled, and what is learnt from it (its `advantages`)."""

    def rollout(self, batch: Any) -> Any: ...

    def experience(self, rollout: Any) -> Any: ...


def averaged(updates: list[Metrics]) -> Metrics:
    """The mean of each metric over the updates of one step; of a norm, over the updates that have one: an
    fp16 scaler skips some, which do not.
    """

    def mean(name: str) -> float:
        values = [update[name] for update in updates]
        finite = [x for x in values if math.isfinite(x)] if name.startswith("grad_norm") else values
        return sum(finite or values) / len(finite or values)

    return {name: mean(name) for name in updates[0]}
