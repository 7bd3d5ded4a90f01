"""Stages of five steps on models of a few thousand weights, made from nothing as a new process would."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from patience import PATIENCE
from preftune.algorithms import ALGORITHMS
from preftune.algorithms.base import Algorithm
from preftune.config import OptimizerConfig
from preftune.data import Sequences
from preftune.models.adapter import adapt, hold_once
from preftune.models.roles import quantise_role
from preftune.models.shards import unsharded
from preftune.models.trunk import keep_on_disk, share_trunk
from preftune.rundir import read_jsonl
from preftune.training import checkpoint
from preftune.training.learner import Learner
from preftune.training.loop import Plan, train
from tiny import EOS, Judge, grouped, online, pairs, prompts, roles, sequences, state, unpaired

STEPS = 5
TIMES = ("time", "step_seconds", "sampling_seconds")
EVERY = pytest.mark.parametrize("algorithm", ALGORITHMS)
Wholes = Callable[[str], tuple[Path, dict[str, dict[str, Tensor]]]]
BATCHES = {"sequences": sequences, "pairs": pairs, "unpaired": unpaired, "prompts": prompts}


class Killed(Exception):
    """Stands in for a kill: nothing runs after it."""


def rule(batch: Sequences) -> Tensor:
    return ((batch.ids == 7) & batch.response).sum(1).float() - batch.response.sum(1) / 5


def prepare(
    algorithm: str,
    top: int | None = None,
    rank: int | None = None,
    shard: bool = False,
    by_block: bool = False,
    kept: bool = False,
    quantised: bool = False,
    adamw: OptimizerConfig = OptimizerConfig(),  # noqa: B008 - frozen
    **own: Any,
) -> tuple[Algorithm, Learner, dict[str, Any]]:
    """Everything from nothing, as a new process would."""
    kind, models = ALGORITHMS[algorithm], roles(algorithm)
    settings: dict[str, Any] = {"microbatch_size": 3}
    if online(algorithm):
        settings |= {"max_new_tokens": 8, "batch_size": 8, "minibatches": 2, "epochs": 2}
        settings |= {"group_size": 2} if grouped(algorithm) else {}
    config = kind.Config(**(settings | own))
    learner = Learner(microbatch_size=3, process_timeout=PATIENCE, shard=shard, by_block=by_block)
    for name, role in models.items():
        if top is not None:
            share_trunk(role.model, top)
        if kept:
            keep_on_disk(role.model, 1000, 1 << 30, "float32", print)
        if quantised:
            quantise_role(role)
        if rank is not None and name in kind.trains:
            adapt(role.model, rank, 8, seed=3)
        if name in kind.trains:
            learner.train(name, role, adamw, 1e-2)
        else:
            learner.freeze(role)
    learner.shard_frozen(role for name, role in models.items() if name not in kind.trains)
    if rank is not None:
        hold_once([role.model for role in models.values()])
    extra = {"scorer": Judge(rule, EOS)} if online(algorithm) else {}
    return kind(config, models, learner, **extra), learner, models


def plan_for(algorithm: str, out: Path, steps: int = STEPS, **more: Any) -> Plan:
    return Plan(
        steps=steps,
        metrics=out / "metrics.jsonl",
        checkpoints=out / "checkpoints",
        checkpoint_every=2,
        keep=1,
        ledger=out / "ledger.jsonl",
        rows_at=lambda step: [f"row {step}"],
        updates=(4 if online(algorithm) else 1) * len(ALGORITHMS[algorithm].trains),
        **more,
    )


def run(
    algorithm: str,
    out: Path,
    kill_at: int | None = None,
    say: Callable[[str], None] = print,
    top: int | None = None,
    rank: int | None = None,
    size: int = 8,
    steps: int = STEPS,
    **own: Any,
) -> dict[str, dict[str, Tensor]]:
    """Train with settings of its own, or die in the on_step call of `kill_at`; the trained roles' weights."""
    made, learner, models = prepare(algorithm, top, rank, **own)

    def on_step(step: int, metrics: Any) -> None:
        if step == kill_at:
            raise Killed

    size, make = min(size, 4) if grouped(algorithm) else size, BATCHES[ALGORITHMS[algorithm].Config.batch]
    plan = plan_for(algorithm, out, steps, say=say)
    train(made, learner, lambda step: learner.place(make(step, size)), plan, on_step)
    found = {}
    for name in learner.trained:
        with unsharded(models[name]):
            found[name] = state(models[name].model)
    return found


def rows(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in read_jsonl(out / "metrics.jsonl")]


def optimizer_digests(out: Path, step: int = STEPS) -> dict[str, str]:
    """SHA-256 of weights and moments in the last checkpoint."""
    return checkpoint.digests(checkpoint.checkpoint_at(out / "checkpoints", step))
