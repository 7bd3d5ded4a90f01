"""What checkpoints cost: seconds of a save and of the copy kept in memory, against seconds of training."""

import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faultlab import write_result
from transformers import GPT2Config, GPT2LMHeadModel

from preftune import api
from preftune.algorithms import SFT
from preftune.config import CheckpointConfig, OptimizerConfig, SFTConfig
from preftune.data import Sequences
from preftune.models.roles import Policy
from preftune.rundir import read_jsonl
from preftune.training import checkpoint
from preftune.training.learner import Learner
from preftune.training.state import TrainState, capture, state_bytes

INTERVAL = CheckpointConfig().every
# `quickstart` with its own sizes of model and batch, and fewer steps.
SETTINGS = ["model.scratch.steps=150", "stage.sft.rows=2000", "stage.ppo.steps=8", "checkpoint.every=2"]
STAGES = ("sft", "ppo")


def timed(function: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        began = time.monotonic()
        result = function(*arguments, **named)
        into.append(time.monotonic() - began)
        return result

    return wrapper


def share(save: float, copy: float, step: float) -> float:
    """Of all time, at the default interval."""
    cost = save / INTERVAL + copy
    return cost / (cost + step)


def recipe(place: Path) -> dict[str, Any]:
    """SFT and PPO of quickstart, with every save and every copy on the clock."""
    found: dict[str, Any] = {}
    save, copied = checkpoint.save, TrainState.copied
    for stage in STAGES:
        saves: list[float] = []
        copies: list[float] = []
        checkpoint.save, TrainState.copied = timed(save, saves), timed(copied, copies)
        run = api.run_recipe("quickstart", SETTINGS, out=str(place), until=stage)
        rows = read_jsonl(run.metrics(stage))
        saves, copies = saves[-(len(rows) // 2) :], copies[-len(rows) :] if stage == "ppo" else []
        step = statistics.mean(row["step_seconds"] for row in rows)
        costs = {
            "save": statistics.mean(saves),
            "copy": statistics.mean(copies) if copies else 0.0,
            "step": step,
        }
        found[stage] = {**costs, "saves": len(saves), "steps": len(rows), "share": share(**costs)}
    checkpoint.save, TrainState.copied = save, copied
    return found


def gpt2(place: Path) -> dict[str, Any]:
    """GPT-2's size (124 M weights, random): an SFT step of 8 rows of 256 tokens, then three saves."""
    learner, policy = Learner(microbatch_size=2), Policy(GPT2LMHeadModel(GPT2Config()))
    learner.train("policy", policy, OptimizerConfig(), 1e-6)
    algorithm = SFT(SFTConfig(batch_size=8, microbatch_size=2), {"policy": policy}, learner)
    ids = torch.randint(0, 50_000, (8, 256), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids, dtype=torch.bool)
    response = real.clone()
    response[:, :128] = False
    steps: list[float] = []
    saves: list[float] = []
    for _ in range(2):  # the first one allocates
        timed(algorithm.step, steps)(Sequences(ids, real, response))
    for i in range(3):
        timed(checkpoint.save, saves)(place / "gpt2", i, capture(learner), keep=1)
    step, save = steps[-1], statistics.median(saves)
    size = state_bytes(learner)
    return {
        "bytes": size,
        "save": save,
        "copy": 0.0,
        "step": step,
        "saves": 3,
        "share": share(save, 0.0, step),
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="preftune-overhead-") as place:
        found = recipe(Path(place) / "run")
        found["gpt2_sft"] = gpt2(Path(place))
    write_result("overhead", {"interval": INTERVAL, "settings": SETTINGS, **found})


if __name__ == "__main__":
    main()
