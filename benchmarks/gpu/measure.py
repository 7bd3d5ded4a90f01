"""One measurement of proof.py, as JSON into FILE: measure.py KIND FILE [WORDS]; kinds are the functions here.

Where the device is a CPU (ACCELERATE_USE_CPU) everything runs there: a rehearsal, whose numbers say nothing.
"""

import json
import math
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from preftune.algorithms import SFT
from preftune.config import OptimizerConfig, SFTConfig
from preftune.data import pad_prompts, pad_sequences
from preftune.models.fast.head import logprobs_and_entropy
from preftune.models.fast.static import recorder, without_graphs
from preftune.models.roles import Policy, casting
from preftune.rollout.sample import sample
from preftune.rundir import RunDir, read_jsonl
from preftune.training.learner import Learner

VOCABULARY = 50257
CAP = 16 << 30  # bytes: a T4
LLAMA = {"135m": (576, 1536, 30, 9, 3), "360m": (960, 2560, 32, 15, 5)}  # d, MLP, layers, heads, KV heads


def precision(words: list[str]) -> dict[str, Any]:
    """Errors of log-probabilities against float64, logits near -100 as GPT-2's, in three precisions."""
    rows, width, vocabulary = (64, 48, 500) if "--small" in words else (4096, 768, VOCABULARY)
    device, random_numbers = Learner().device, torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(width, vocabulary, bias=False)
    layer.weight.data = torch.randn(vocabulary, width, generator=random_numbers) / width**0.5
    layer.weight.data[:, 0] = -10
    states = torch.randn(rows, width, generator=random_numbers)
    states[:, 0] = 10
    targets = torch.randint(0, vocabulary, (rows,), generator=random_numbers)
    exact = torch.cat(
        [
            torch.log_softmax(part.double() @ layer.weight.detach().double().t(), -1)
            .gather(1, own.unsqueeze(1))
            .squeeze(1)
            for part, own in zip(states.split(256), targets.split(256), strict=True)
        ]
    )
    layer, states, targets = layer.to(device), states.to(device), targets.to(device)
    found: dict[str, Any] = {}
    for name, dtype in (("float32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with torch.no_grad(), torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            got, _ = logprobs_and_entropy(layer, states, targets, 1.0)
        errors = got.cpu().double() - exact
        found[name] = {"sd": errors.std().item(), "largest": errors.abs().max().item()}
    allowed = {"float32": 1e-4, "bf16": 0.02, "fp16": 0.003}
    return found | {"ok": all(found[name]["largest"] < limit for name, limit in allowed.items())}


def gradients(words: list[str]) -> dict[str, Any]:
    """The first loss and gradient norm of each stage of two runs, on the device and on the CPU."""
    device, cpu = (RunDir(Path(word)) for word in words)
    found: dict[str, Any] = {}
    for folder in sorted((cpu.path / "stages").iterdir()):
        if not (folder / "metrics.jsonl").is_file():
            continue
        first = [read_jsonl(run.metrics(folder.name))[0] for run in (device, cpu)]
        for name in ("loss", "grad_norm"):
            if name in first[0]:
                found[f"{folder.name}: {name}"] = [row[name] for row in first]
    # Stages that sample differ in a token now and then; the base and what is trained on rows do not.
    near = {n: math.isclose(*both, rel_tol=1e-3, abs_tol=1e-6) for n, both in found.items()}
    same = [ok for n, ok in near.items() if n.split(":")[0] in ("base", "sft", "rm", "dpo")]
    return {"first": found, "near": near, "ok": bool(same) and all(same)}


def speed(words: list[str]) -> dict[str, Any]:
    """Tokens/s of sampling (with its graph, without) beside `generate`, seconds of an update, peak memory."""
    shape, found = words[0], dict[str, Any]()
    small = shape == "small"
    rows, prompt, new = (4, 8, 8) if small else (64, 128, 128)
    for name in ("float32", "bf16"):
        torch.manual_seed(0)
        policy, learner = Policy(model_of(shape)), Learner("float32" if name == "float32" else "bf16")
        learner.train("policy", policy, OptimizerConfig(), 1e-6)
        draw = random.Random(0)
        top = policy.model.config.vocab_size - 1
        ids = [[draw.randrange(top) for _ in range(prompt)] for _ in range(rows)]
        given = pad_prompts(ids, list(range(rows)), 0).to(learner.device)
        batch = pad_sequences(ids, ids, 0).to(learner.device)
        algorithm = SFT(SFTConfig(batch_size=rows, microbatch_size=8), {"policy": policy}, learner)

        def ours(policy: Policy = policy, given: Any = given) -> None:
            sample(policy, given, max_new_tokens=new, temperature=1.0, eos_id=policy.model.config.vocab_size)

        def theirs(policy: Policy = policy, given: Any = given) -> None:
            with torch.no_grad(), casting(policy):
                policy.model.generate(
                    given.ids, attention_mask=given.attention, do_sample=True, max_new_tokens=new,
                    min_new_tokens=new, top_k=0, pad_token_id=0,
                )  # fmt: skip

        tokens = rows * new
        found[name] = {
            "sampled tokens/s": tokens / seconds_of(ours),
            "sampled by a CUDA graph": recorder(policy.model, learner.device) is not None,
            "sampled tokens/s without it": tokens / seconds_of(without_graphs()(ours)),
            "transformers.generate tokens/s": tokens / seconds_of(theirs),
            "seconds an update": seconds_of(lambda a=algorithm, b=batch: a.step(b)),  # type: ignore[misc]
            "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        }
    return {"shape": shape, "rows": rows, "prompt": prompt, "new": new, **found, "ok": True}


def model_of(shape: str) -> Any:
    """Random weights in a known shape."""
    if shape in LLAMA:
        width, inner, layers, heads, kv = LLAMA[shape]
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True,
            )
        )  # fmt: skip
    tiny = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**(tiny if shape == "small" else {}), bos_token_id=0, eos_token_id=0))


def seconds_of(work: Callable[[], Any]) -> float:
    """The best of three, after one to warm up."""
    times = []
    for _ in range(4):
        began = time.monotonic()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.monotonic() - began)
    return min(times[1:])


def standins(words: list[str]) -> dict[str, Any]:
    """A model and pairs of the shape that hh-colab asks the hub for, made of the built-in world."""
    from preftune.models.load import scratch_gpt2
    from preftune.runs.sources import make_tokenizer
    from preftune.world.dataset import world_dataset

    folder, small = Path(words[0]), "--small" in words
    rows = world_dataset(seed=0, pairs=200 if small else 2000).train
    tokenizer = make_tokenizer("world", rows, 512)
    size = (2, 32, 2, 128) if small else (12, 768, 12, 1024)
    layers, width, heads, positions = size
    model = scratch_gpt2(tokenizer, layers=layers, width=width, heads=heads, positions=positions, seed=0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            prompt = row.prompt.transcript().rstrip()
            pair = {"chosen": f"{prompt} {row.chosen}", "rejected": f"{prompt} {row.rejected}"}
            file.write(json.dumps(pair) + "\n")
    return {"rows": len(rows), "parameters": sum(p.numel() for p in model.parameters()), "ok": True}


def capped(words: list[str]) -> dict[str, Any]:
    """A command of preftune on a card of which it may take 16 GB."""
    from preftune.cli import main

    if torch.cuda.is_available():
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(CAP / whole, 1.0))
    began = time.monotonic()
    code = main(words)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {"seconds": time.monotonic() - began, "peak GiB of the last stage": peak, "ok": code == 0}


def write(kind: str, file: Path, words: list[str]) -> int:
    kinds = {"precision": precision, "gradients": gradients, "speed": speed, "capped": capped}
    found = standins([str(file), *words]) if kind == "standins" else kinds[kind](words)
    target = file / "standins.json" if kind == "standins" else file
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(write(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
