"""One measurement of proof.py, as JSON into FILE: measure.py KIND FILE [WORDS]; kinds are the functions here.

Where the device is a CPU (ACCELERATE_USE_CPU) everything runs there: a rehearsal, whose numbers say nothing.
"""

import json
import math
import random
import sys
import time
from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from beside import held_gib, limits, peak_gib, seconds_of, slowest, trl, vllm
from preftune.algorithms import ALGORITHMS
from preftune.config import OptimizerConfig
from preftune.data import Pairs, pad_prompts, pad_sequences
from preftune.models.fast.head import logprobs_and_entropy
from preftune.models.fast.static import recorder, without_graphs
from preftune.models.roles import Policy, Reference, casting
from preftune.rollout.sample import sample
from preftune.rundir import RunDir, read_jsonl
from preftune.selftest import updates
from preftune.training import one_update
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


def golden(words: list[str]) -> dict[str, Any]:
    """The updates of `preftune selftest`, whose numbers are TRL's in float32, in three precisions."""
    device, found = Learner().device, dict[str, Any]()
    names = list(updates.UPDATES)[:1] if "--small" in words else list(updates.UPDATES)
    for name, (loss, norm) in {"float32": (1e-5, 1e-4), "bf16": (0.02, 0.15), "fp16": (0.005, 0.05)}.items():
        kind = type("Half", (Learner,), {"__init__": partialmethod(_in_precision, name)})
        step = updates.PARAMETER if name == "float32" else 2.1e-3  # AdamW's first is its rate, up or down
        each = 1 if name == "float32" else updates.slack(device)  # the same everywhere
        loose = {"LOSS": loss / each, "GRAD_NORM": norm / each, "PARAMETER": step / each}
        with patch.object(one_update, "Learner", kind), patch.multiple(updates, **loose):
            rows = [updates.compare_update(what, device) for what in names]
        bad = [f"{row.what}: {failure}" for row in rows for failure in row.failures]
        found[name] = {"updates": len(rows), "failures": bad}
    return found | {"ok": not any(found[name]["failures"] for name in found)}


def _in_precision(self: Learner, precision: Any, **more: Any) -> None:
    Learner.__init__(self, precision, **more)
    if self.accelerator.scaler is not None:  # one that skips no update
        self.accelerator.scaler = torch.amp.GradScaler(self.device.type, init_scale=256.0)


def speed(words: list[str]) -> dict[str, Any]:
    """Sampling beside `generate` and vLLM, updates beside TRL's, shares of what the card can do, peak memory;
    where ours is slower, what it spends its time on.
    """
    shape, small = words[0], words[0] == "small"
    found: dict[str, Any] = {"shape": shape, "ok": True}
    for name in ("float32", "bf16"):
        half, device = name == "bf16", Learner().device
        card = limits(device, torch.bfloat16 if half else torch.float32, small)
        found[name] = {"card": card, "sampling": sampling(shape, name, card)}
        for stage in ("sft", "dpo"):
            both = update(stage, shape, name, card)
            apart = abs(both["first loss"] - both["TRL"].get("first loss", both["first loss"]))
            found["ok"] = found["ok"] and (half or apart < 1e-3)  # the same work
            found[name][stage] = both
    return found


def sampling(shape: str, precision: Any, card: dict[str, float]) -> dict[str, Any]:
    rows, prompt, new = (4, 8, 8) if shape == "small" else (64, 128, 128)
    before, policy, learner = held_gib(), Policy(model_of(shape)), Learner(precision)
    learner.freeze(policy)
    top, ids = policy.model.config.vocab_size, drawn(policy, rows, prompt)
    given = pad_prompts(ids, list(range(rows)), 0).to(learner.device)

    def ours() -> None:
        sample(policy, given, max_new_tokens=new, temperature=1.0, eos_id=top)

    def theirs() -> None:
        with torch.no_grad(), casting(policy):
            policy.model.generate(
                given.ids, attention_mask=given.attention, do_sample=True, max_new_tokens=new,
                min_new_tokens=new, top_k=0, pad_token_id=0,
            )  # fmt: skip

    spent, peak = peak_gib(lambda: seconds_of(ours), before)
    weights = sum(p.numel() for p in policy.model.parameters())
    token = max(
        (4 if precision == "float32" else 2) * weights / card["bytes/s"], 2 * weights * rows / card["FLOP/s"]
    )
    found: dict[str, Any] = {
        "rows": rows, "prompt": prompt, "new": new, "tokens/s": rows * new / spent, "peak GiB": peak,
        "share of the limit": token * new / spent,
        "by a CUDA graph": recorder(policy.model, learner.device) is not None,
        "tokens/s without it": rows * new / seconds_of(without_graphs()(ours)),
        "generate, tokens/s": rows * new / seconds_of(theirs),
        "vLLM": vllm(policy.model, ids, new, precision != "float32"),
    }  # fmt: skip
    if found["tokens/s"] < max(found["generate, tokens/s"], found["vLLM"].get("tokens/s", 0)):
        found["profile"] = slowest(ours)
    return found


def update(stage: str, shape: str, precision: Any, card: dict[str, float]) -> dict[str, Any]:
    """One of SFT or DPO, in one microbatch, and TRL's on the same rows and weights."""
    count, length = (2, 8) if shape == "small" else (8, 128)
    before, policy, learner = held_gib(), Policy(model_of(shape)), Learner(precision)
    parts = ("prompt", "chosen") if stage == "sft" else ("prompt", "chosen", "rejected")
    rows = {part: drawn(policy, count, length, seed) for seed, part in enumerate(parts)}
    sides = [pad_sequences(rows["prompt"], rows[part], 0) for part in parts[1:]]
    kind = ALGORITHMS[stage]
    models: dict[str, Any] = {"policy": policy}
    if stage == "dpo":
        models["reference"] = Reference(model_of(shape))
        learner.freeze(models["reference"])
    settings = OptimizerConfig(weight_decay=0.0, max_grad_norm=1.0)
    learner.train("policy", policy, settings, 1e-6)
    made: Any = kind(kind.Config(algorithm=stage, batch_size=count), models, learner)
    batch = learner.place(sides[0] if stage == "sft" else Pairs(*sides))
    first = made.step(batch)["loss"]
    spent, peak = peak_gib(lambda: seconds_of(lambda: made.step(batch)), before)
    weights = sum(p.numel() for p in policy.model.parameters())
    flops = (6 if stage == "sft" else 8) * weights * count * length * len(parts)
    found = {
        "rows": count, "tokens a part": length, "seconds an update": spent, "first loss": first,
        "peak GiB": peak, "share of the limit": flops / card["FLOP/s"] / spent,
    }  # fmt: skip
    found["TRL"] = trl(stage, lambda: model_of(shape), rows, precision != "float32")
    if spent > found["TRL"].get("seconds an update", math.inf):
        found["profile"] = slowest(lambda: made.step(batch))
    return found


def drawn(policy: Policy, rows: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random tokens, none of which is an end."""
    draw, top = random.Random(seed), policy.model.config.vocab_size - 1
    return [[draw.randrange(1, top) for _ in range(length)] for _ in range(rows)]


def model_of(shape: str) -> Any:
    """The same random weights each time, in a known shape; no dropout."""
    torch.manual_seed(0)
    if shape in LLAMA:
        width, inner, layers, heads, kv = LLAMA[shape]
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                num_attention_heads=heads, num_key_value_heads=kv, tie_word_embeddings=True,
            )
        )  # fmt: skip
    tiny = {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**(tiny if shape == "small" else {}), **dry))


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
    reviews = [(row.chosen, "pos") for row in rows] + [(row.rejected, "neg") for row in rows]
    lines = [json.dumps({"text": f"{text} " * 8, "label": label}) for text, label in reviews]
    (folder / "reviews.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
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
    kinds = {
        "precision": precision,
        "golden": golden,
        "gradients": gradients,
        "speed": speed,
        "capped": capped,
    }
    found = standins([str(file), *words]) if kind == "standins" else kinds[kind](words)
    target = file / "standins.json" if kind == "standins" else file
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(write(sys.argv[1], Path(sys.argv[2]), sys.argv[3:]))
