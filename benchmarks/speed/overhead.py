"""What a step costs besides the model, and how long `preftune run` takes to its first step.

Usage: overhead.py SIZE --shared DIR > benchmarks/results/overhead.json. The first part drives the real
loop over a DPO stage: encoding, the algorithm's step, metrics, one checkpoint. Everything but the update
itself is overhead; the checkpoint counts with its share at the default interval. The second part measures
policies as an evaluation does, with all its statistics: everything but sampling, divergences and scores is
overhead. The third runs the recipe `quickstart` in processes of their own until the first line of its
metrics is there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import prepare
from ours import Side
from preftune.config import EvaluationConfig
from preftune.config.run import CheckpointConfig
from preftune.evaluation import policy
from preftune.evaluation.compare import compare_to
from preftune.evaluation.summary import summarise
from preftune.models.load import load_causal_lm
from preftune.models.roles import Policy, Reference, RewardModel
from preftune.models.scalar import load_scalar_model
from preftune.rollout.score import Scorer
from preftune.training import checkpoint, loop
from work import BETA, NEW_TOKENS, PROMPTS, SIZES, timed


def overhead(side: Side, steps: int) -> dict[str, float]:
    """Seconds of parts of a step, and the share that is not the update."""
    size, spent = SIZES[side.work["size"]]["batch"], Counter[str]()
    runner = side.algorithm("dpo", size, batch_size=size, beta=BETA)

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return timed(spent, name, function, time.perf_counter)

    def batch_at(step: int) -> Any:
        rows = side.work["steps"][step % len(side.work["steps"])][:size]
        return runner.learner.place(side.encoder.pairs([side.rows[i] for i in rows]))

    runner.step = clocked("step", runner.step)
    runner.step(batch_at(0))  # makes the optimizer's state
    spent.clear()
    every = CheckpointConfig().every
    with tempfile.TemporaryDirectory() as place:
        plan = loop.Plan(
            steps=steps,
            metrics=Path(place) / "metrics.jsonl",
            checkpoints=Path(place) / "checkpoints",
            checkpoint_every=steps,
            keep=1,
        )
        checkpoint.save = clocked("checkpoint", checkpoint.save)
        clocked("loop", loop.train)(runner, runner.learner, batch_at, plan, lambda step, row: None)
    bookkeeping = (spent["loop"] - spent["step"] - spent["checkpoint"]) / steps
    whole = spent["step"] / steps + bookkeeping + spent["checkpoint"] / every
    return {
        "steps": steps,
        "step_seconds": spent["step"] / steps,
        "bookkeeping_seconds": bookkeeping,
        "checkpoint_seconds": spent["checkpoint"],
        "checkpoint_every": every,
        "share": 1 - spent["step"] / steps / whole,
    }


def evaluation(side: Side) -> dict[str, float]:
    """Seconds of measuring a policy on every prompt of the work, and the share that no model takes."""
    spent = Counter[str]()

    def clocked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return timed(spent, name, function, time.perf_counter)

    judge = RewardModel(load_scalar_model(side.rm))
    settings = EvaluationConfig(prompts=len(side.rows), max_new_tokens=NEW_TOKENS, batch_size=PROMPTS)
    conditions = policy.Conditions(
        prompts=side.rows,
        encoder=side.encoder,
        scorer=Scorer(reward_model=judge, encoder=side.encoder, translate=None),
        reference=Reference(load_causal_lm(side.lm)),
        settings=settings,
        seed=0,
        device=torch.device("cpu"),
    )
    tuned = Policy(load_causal_lm(side.lm))
    for module, name in ((policy, "sample"), (policy, "divergences"), (Scorer, "scored")):
        setattr(module, name, clocked("models", getattr(module, name)))

    def measured() -> None:
        rows = conditions.rows(tuned, lambda count: None)
        reverse = conditions.reverse_kl(tuned, rows)
        summarise("ppo", "PPO", rows, conditions, None, reverse)
        compare_to("sft", {"sft": rows, "ppo": rows}, settings, 0)

    clocked("all", measured)()
    return {
        "evaluation_prompts": len(side.rows),
        "evaluation_seconds": spent["all"],
        "evaluation_share": 1 - spent["models"] / spent["all"],
    }


def first_step(times: int) -> list[float]:
    """Seconds from the start of `preftune run quickstart` to its first step, beyond importing torch."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        torch_alone, began = time.perf_counter() - began, time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            command = [sys.executable, "-m", "preftune", "run", "quickstart", "--out", f"{place}/run"]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while process.poll() is None and not any(
                path.stat().st_size for path in Path(place).rglob("metrics.jsonl")
            ):
                time.sleep(0.02)
            found.append(time.perf_counter() - began - torch_alone)
            process.kill()
            process.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    wanted = parser.parse_args()
    starts = first_step(3)
    side = Side(prepare(wanted.size, wanted.shared, 0), "dpo")
    found = overhead(side, wanted.steps) | evaluation(side)
    print(
        json.dumps(
            {
                "size": wanted.size,
                **found,
                "first_step_seconds": starts,
                "first_step_median": statistics.median(starts),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
