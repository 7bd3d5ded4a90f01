"""One step of one algorithm on given data: the real class and the real learner, nothing sampled."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from preftune.algorithms import ALGORITHMS, GRPO, PPO
from preftune.algorithms.base import Algorithm, Metrics
from preftune.config import OptimizerConfig, build
from preftune.data.batch import Pairs, Sequences
from preftune.errors import UsageError
from preftune.models.roles import Role
from preftune.rollout.rollout import Rollout
from preftune.training.learner import Learner

_BATCHES = {"sft": Sequences, "reward": Pairs, "dpo": Pairs, "ppo": Rollout, "grpo": Rollout}
OptimizerLike = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer]


def one_update(
    algorithm: str,
    models: Mapping[str, Role],
    batch: Sequences | Pairs | Rollout,
    *,
    optimizer: OptimizerLike | Mapping[str, OptimizerLike],
    microbatch_size: int | None = None,
    **config: Any,
) -> Metrics:
    """Update `models` in place on one batch and return the step's metrics ("loss", "grad_norm" before
    clipping, ...).

    `models` maps the role names that the algorithm needs to roles. `batch` is `Sequences` for sft, `Pairs`
    for reward and dpo, and a `Rollout` with log-probs, values and scores for ppo and grpo. `optimizer` is a
    torch optimizer over the trained role's parameters, or a function from parameters to one, or a mapping of
    these by role (PPO trains "policy" and "critic"). `config` takes the keys of the algorithm's config; there
    is one epoch of one minibatch unless it says otherwise.
    """
    if algorithm not in ALGORITHMS:
        raise UsageError(f"no algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
    kind = ALGORITHMS[algorithm]
    rows = len(batch)
    single: dict[str, Any] = {"epochs": 1, "minibatches": 1} if issubclass(kind, PPO | GRPO) else {}
    if issubclass(kind, GRPO) and isinstance(batch, Rollout) and batch.group is not None:
        single["group_size"] = int((batch.group == batch.group[0]).sum())
    batch_class = _BATCHES[algorithm]
    if not isinstance(batch, batch_class):
        raise UsageError(f"{algorithm} takes {batch_class.__name__}, not {type(batch).__name__}")
    sizes = {"batch_size": rows, "microbatch_size": microbatch_size or rows}
    settings = build(kind.Config, {**single, **sizes, "algorithm": algorithm, **config}, algorithm)
    _check_roles(kind, models)
    learner = Learner(microbatch_size=settings.microbatch_size)
    for name, role in models.items():
        if name in kind.trains:
            learner.adopt(name, role, _optimizer_for(name, role, optimizer), OptimizerConfig())
        else:
            learner.freeze(role)
    runner = kind(settings, models, learner)
    if isinstance(runner, PPO | GRPO):
        assert isinstance(batch, Rollout)
        return runner.improve(batch)
    return runner.step(batch)


def _check_roles(kind: type[Algorithm], models: Mapping[str, Role]) -> None:
    """Everything trained is there, and nothing trained is frozen under another name. UsageError otherwise."""
    given_with_rollout = ("reference", "reward_model") if issubclass(kind, PPO | GRPO) else ()
    missing = [name for name in kind.needs if name not in models and name not in given_with_rollout]
    if missing:
        raise UsageError(f"models lacks {', '.join(missing)}; it has {', '.join(models) or 'nothing'}")
    owners: dict[int, str] = {}
    for name, role in models.items():
        other = owners.setdefault(id(role.model), name)
        if other != name:
            raise UsageError(f"{other} and {name} share one model object", hint="copy.deepcopy one of them")


def _optimizer_for(
    name: str, role: Role, optimizer: OptimizerLike | Mapping[str, OptimizerLike]
) -> torch.optim.Optimizer:
    chosen = optimizer[name] if isinstance(optimizer, Mapping) else optimizer
    return chosen if isinstance(chosen, torch.optim.Optimizer) else chosen(role.model.parameters())
