"""What sampling and an update cost from 0.5 M to 135 M weights: processor time, the least of three.

    python benchmarks/sizes.py         (prints the table of docs/scaling.md; 135 M takes minutes)

Random weights; the smallest three are of GPT-2's kind with 512 tokens, the largest has SmolLM2-135M's shape.
Eight replies of 32 tokens to prompts of 32; an SFT update on eight rows of 32 + 32 tokens, in one microbatch.
"""

import sys
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from preftune.algorithms import SFT
from preftune.config import OptimizerConfig, SFTConfig
from preftune.data import pad_prompts, pad_sequences
from preftune.models.roles import Policy
from preftune.rollout.sample import sample
from preftune.training.learner import Learner

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from measure import drawn, model_of

SHAPES = [(96, 4), (256, 5), (512, 7)]  # width, blocks
ROWS, TOKENS = 8, 32


def least(work: Callable[[], Any], times: int = 3) -> float:
    work()
    return min(timeit.repeat(work, "gc.enable()", time.process_time, repeat=times, number=1))


def gpt2(width: int, layers: int) -> Any:
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    shape = {"vocab_size": 512, "n_embd": width, "n_layer": layers, "n_head": width // 32, "n_positions": 128}
    return GPT2LMHeadModel(GPT2Config(**shape, **ends))


def main() -> None:
    print("| weights | sampling | an update | a token sampled, per weight | a token learnt, per weight |")
    print("|---" * 5 + "|")
    for make in (*(lambda shape=shape: gpt2(*shape) for shape in SHAPES), lambda: model_of("135m")):
        policy, learner = Policy(make()), Learner()
        learner.train("policy", policy, OptimizerConfig(), 1e-6)
        weights = sum(p.numel() for p in policy.model.parameters())
        prompts, replies = (drawn(policy, ROWS, TOKENS, seed) for seed in (0, 1))
        given = pad_prompts(prompts, list(range(ROWS)), 0)
        sampling = least(
            lambda p=policy, g=given: sample(p, g, max_new_tokens=TOKENS, temperature=1.0, eos_id=-1)
        )
        made = SFT(SFTConfig(batch_size=ROWS), {"policy": policy}, learner)
        batch = pad_sequences(prompts, replies, 0)
        update = least(lambda m=made, b=batch: m.step(b))
        each = [seconds / weights / tokens for seconds, tokens in ((sampling, 256), (update, 512))]
        cells = (
            f"{weights / 1e6:.1f} M",
            f"{sampling:.2g} s",
            f"{update:.2g} s",
            *(f"{x * 1e12:.1f} ps" for x in each),
        )
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
