"""How cost grows: seconds of generation and of an update against what one would expect to pay for.

Usage: growth.py --shared DIR > benchmarks/results/growth.json. CPU time, the least of three, one thread.
Each series is fitted by seconds = a · x^p, over all of it and over its larger half: p above 1 there, and
growing, is a surprise.
"""

import argparse
import json
import math
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bench import prepare
from ours import Side
from preftune.data import pad_prompts, pad_sequences
from preftune.models.roles import Policy
from preftune.rollout.sample import sample
from work import EOS, VOCABULARY


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The least CPU time of several calls after one that does not count."""
    work()
    return min(timeit.repeat(work, "gc.enable()", time.process_time, repeat=times, number=1))


def power(points: list[tuple[float, float]]) -> float:
    """p of seconds = a · x^p by least squares of logarithms."""
    x, y = [[math.log(v) for v in column] for column in zip(*points, strict=True)]
    return statistics.linear_regression(x, y).slope


def series(name: str, points: list[tuple[float, float]]) -> dict[str, Any]:
    print(name, [(x, round(s, 3)) for x, s in points], file=sys.stderr)
    return {
        "series": name,
        "points": points,
        "power": power(points),
        "power_of_larger_half": power(points[len(points) // 2 :]),
    }


def policy(width: int = 256, layers: int = 6) -> Policy:
    torch.manual_seed(0)
    shape = {"n_embd": width, "n_layer": layers, "n_head": width // 64}
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return Policy(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape, **dry)))


def generation(model: Policy, prompts: int, k: int, new: int, length: int = 128) -> Callable[[], Any]:
    ids = torch.randint(0, EOS, (prompts, length), generator=torch.Generator().manual_seed(1)).tolist()
    batch = pad_prompts(ids, range(prompts), EOS)
    return lambda: sample(
        model, batch, max_new_tokens=new, temperature=1.0, eos_id=-1, responses_per_prompt=k
    )


def update(side: Side, rows: int, response: int) -> Callable[[], Any]:
    """An SFT step on prompts of 64 tokens."""
    runner = side.algorithm("sft", rows, batch_size=rows)
    random = torch.Generator().manual_seed(rows)
    prompts, responses = (torch.randint(0, EOS, (rows, n), generator=random).tolist() for n in (64, response))
    batch = pad_sequences(prompts, responses, EOS)
    return lambda: runner.step(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True)
    side = Side(prepare("small", parser.parse_args().shared, 0), "sft")
    model = policy()
    sizes = [(128, 6), (256, 6), (384, 6), (512, 8)]
    models = [policy(*size) for size in sizes]
    counts = [sum(p.numel() for p in one.model.parameters()) for one in models]
    found = [
        series(
            "generation: new tokens", [(n, seconds(generation(model, 1, 8, n))) for n in (24, 48, 96, 192)]
        ),
        series(
            "generation: group size", [(k, seconds(generation(model, 1, k, 32))) for k in (4, 8, 16, 32, 64)]
        ),
        series(
            "generation: prompts", [(b, seconds(generation(model, b, 1, 32))) for b in (4, 8, 16, 32, 64)]
        ),
        series(
            "generation: prompt length",
            [(n, seconds(generation(model, 8, 1, 2, n))) for n in (64, 128, 256, 512)],
        ),
        series(
            "generation: parameters",
            [(n, seconds(generation(m, 1, 8, 32))) for n, m in zip(counts, models, strict=True)],
        ),
        series("SFT: rows", [(b, seconds(update(side, b, 64))) for b in (2, 4, 8, 16)]),
        series("SFT: response tokens", [(n, seconds(update(side, 4, n))) for n in (32, 64, 128, 256)]),
    ]
    print(json.dumps({"series": found}, indent=1))


if __name__ == "__main__":
    main()
