"""One step of one algorithm on given data: the real class and the real learner, nothing sampled."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from preftune.algorithms import ALGORITHMS
from preftune.algorithms.base import Algorithm, Metrics
from preftune.config import OptimizerConfig, build
from preftune.data.batch import Pairs, Sequences, Unpaired
from preftune.errors import UsageError
from preftune.models.roles import Role
from preftune.rollout.rollout import Rollout
from preftune.training.learner import Learner

_BATCHES = {"sequences": Sequences, "pairs": Pairs, "unpaired": Unpaired, "prompts": Rollout}
OptimizerLike = torch.optim.Optimizer | Callable[[Any], torch.optim.Optimizer]


def one_update(
    algorithm: str,
    models: Mapping[str, Role],
    batch: Sequences | Pairs | Unpaired | Rollout,
    *,
    optimizer: OptimizerLike | Mapping[str, OptimizerLike],
    microbatch_size: int | None = None,
    **config: Any,
) -> Metrics:
    """Update `models` in place on one batch and return the step's metrics ("loss", "grad_norm" before
    clipping, ...).

    `models` maps the role names that the algorithm needs to roles. `batch` is what its settings say
    (`Sequences` for sft, `Pairs` for reward and dpo); for one that samples, such as ppo and grpo, it is a
    `Rollout` with log-probs, values and scores, and no reference is needed. `optimizer` is a
    torch optimizer over the trained role's parameters, or a function from parameters to one, or a mapping of
    these by role (PPO trains "policy" and "critic"). `config` takes the keys of the algorithm's config; there
    is one epoch of one minibatch unless it says otherwise. Models and batch go to the GPU, if there is one.
    """
    if algorithm not in ALGORITHMS:
        raise UsageError(f"no algorithm {algorithm!r}; there are {', '.join(ALGORITHMS)}")
    kind = ALGORITHMS[algorithm]
    rows = len(batch)
    single: dict[str, Any] = {}
    batch_class = _BATCHES[kind.Config.batch]
    if not isinstance(batch, batch_class):
        raise UsageError(f"{algorithm} takes {batch_class.__name__}, not {type(batch).__name__}")
    if isinstance(batch, Rollout):
        single = {"epochs": 1, "minibatches": 1}
        if "group_size" in kind.Config.model_fields and batch.group is not None:
            single["group_size"] = int((batch.group == batch.group[0]).sum())
    sizes = {"batch_size": rows, "microbatch_size": microbatch_size or rows}
    settings = build(kind.Config, {**single, **sizes, "algorithm": algorithm, **config}, algorithm)
    _check_roles(kind, models, optional=("reference",) if isinstance(batch, Rollout) else ())
    learner = Learner(microbatch_size=settings.microbatch_size)
    for name, role in models.items():
        if name in kind.trains:
            learner.adopt(name, role, _optimizer_for(name, role, optimizer), OptimizerConfig())
        else:
            learner.freeze(role)
    runner: Any = kind(settings, models, learner)
    batch = batch.to(learner.device)
    return runner.improve(batch) if isinstance(batch, Rollout) else runner.step(batch)


def _check_roles(kind: type[Algorithm], models: Mapping[str, Role], optional: tuple[str, ...]) -> None:
    """UsageError unless all roles but the `optional` are there, each with a model of its own (one model could
    be trained and frozen at once).
    """
    missing = [name for name in kind.needs if name not in models and name not in optional]
    if missing:
        raise UsageError(f"models lacks {', '.join(missing)}; it has {', '.join(models) or 'nothing'}")
    owners: dict[int, str] = {}
    for name, role in models.items():
        owner = owners.setdefault(id(role.model), name)
        if owner != name:
            raise UsageError(f"{owner} and {name} share one model object", hint="copy.deepcopy one of them")


def _optimizer_for(
    name: str, role: Role, optimizer: OptimizerLike | Mapping[str, OptimizerLike]
) -> torch.optim.Optimizer:
    chosen = optimizer[name] if isinstance(optimizer, Mapping) else optimizer
    return chosen if isinstance(chosen, torch.optim.Optimizer) else chosen(role.model.parameters())
