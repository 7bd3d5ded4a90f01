"""Updates and passes with `trainable = "top:K"` against full training of the same models, in alternation.

Usage: trunk.py [SIZE ...] [--stages ...] [--pairs N] --shared DIRECTORY; what benchmarks/results/trunk.json
holds with enough pairs is not measured again. Each side is a process of one thread; they take turns, and the
clock is the processor's, so that a busy machine hits both. Beside each ratio stands that of multiply-adds.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "trunk.json"
SIZES = {
    "124m": {"layers": 12, "top": 3, "width": 768, "block": 12 * 768 * 768, "vocabulary": 50257},
    "smollm2": {"layers": 30, "top": 6, "width": 576, "block": 3538944, "vocabulary": 49152},
}
STAGES = [
    *(("dpo", "first"), ("dpo", "kept"), ("reward", "first"), ("reward", "kept"), ("sft", "first")),
    *(("sft", "kept"), ("ppo", "whole"), ("evaluate", "whole"), ("grpo", "whole")),
]
# Against TRL; what is trained, where it is not "top:K".
TRL_STAGES = [("dpo", "first", ""), ("dpo", "kept", ""), ("dpo", "whole", "lora"), ("ppo", "whole", "")]
PROMPT, REPLY, NEW_TOKENS, PAIRS_A_STEP = 160, 120, 48, 4
PROMPTS, GROUP, EPOCHS, POLICIES = 8, 4, 4, 5
RANK, ALPHA = 16, 32
PASSES = {
    "sft": 1,
    "reward": 1,
    "dpo": 2,
    "ppo": 4 + 2 * EPOCHS,
}  # through frozen blocks, where none is shared


def rows(shared: Path, count: int) -> list[list[list[int]]]:
    """Prompt, chosen and rejected of HH-RLHF, in GPT-2's tokens."""
    from transformers import AutoTokenizer

    from preftune.data import Encoder
    from preftune.data.dataset import read_preferences

    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "gpt2-tokenizer")
    encoder = Encoder(tokenizer, "transcript", PROMPT, REPLY, 1024)
    file = sorted((shared / "data" / "hh-rlhf").glob("helpful-base/*.jsonl.gz"))[0]
    preferences, draw = list(read_preferences(file, "skip")), random.Random(0)
    found = []
    while len(found) < count:
        if kept := encoder.usable([preferences[draw.randrange(len(preferences))]])[0]:
            found.append([[int(i) % 49152 for i in part] for part in encoder.pair(kept[0])])
    return found


def network(size: str, scalar: bool) -> Any:
    """Random weights, the same for all roles; a reward model has a pad token more."""
    import torch
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
    )

    shape, more = SIZES[size], {"num_labels": 1, "pad_token_id": 0} if scalar else {}
    torch.manual_seed(0)
    if size == "124m":
        dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        kind = GPT2ForSequenceClassification if scalar else GPT2LMHeadModel
        return kind(GPT2Config(activation_function="gelu_new", **dry, **more))
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["width"],
        intermediate_size=1536,
        num_hidden_layers=shape["layers"],
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **more,
    )
    return (LlamaForSequenceClassification if scalar else LlamaForCausalLM)(config)


class Side:
    """One stage on the real learner: trains all blocks ("full"), those on a shared "trunk", or by "lora"."""

    def __init__(self, size: str, stage: str, states: str, side: str, data: list[Any]) -> None:
        from preftune.models.roles import Critic, Policy, Reference, RewardModel

        self.size, self.stage, self.states, self.data = size, stage, states, data
        self.shares, self.lora = side == "trunk", side == "lora"
        self.make: dict[str, Callable[[], Any]] = {
            "policy": lambda: Policy(network(size, scalar=False)),
            "reference": lambda: Reference(network(size, scalar=False)),
            "reward_model": lambda: RewardModel(self.scalar()),
            "critic": lambda: Critic(self.scalar()),
        }
        self.roles: dict[str, Any] = {}

    def scalar(self) -> Any:
        """A reward model on the policy's blocks: equal seeds draw the same weights only within a class."""
        model = network(self.size, scalar=True)
        model.base_model.load_state_dict(network(self.size, scalar=False).base_model.state_dict())
        return model

    def role(self, name: str) -> Any:
        from preftune.models.trunk import keep_on_disk, share_trunk

        role = self.make[name]()
        if self.shares:
            share_trunk(role.model, SIZES[self.size]["top"])
            if self.states == "kept":
                keep_on_disk(role.model, 1, 1 << 40, "float32", print)
        self.roles[name] = role
        return role

    def algorithm(self, **settings: Any) -> Any:
        from preftune.algorithms import ALGORITHMS
        from preftune.config import OptimizerConfig
        from preftune.models.adapter import adapt, hold_once
        from preftune.rollout.score import Scorer
        from preftune.training.learner import Learner

        kind, learner = ALGORITHMS[self.stage], Learner(microbatch_size=8)
        needs = [*kind.needs, *(["reward_model"] if "max_new_tokens" in settings else [])]
        for name in dict.fromkeys(needs):
            self.role(name)
        if self.lora:
            for name in kind.trains:
                adapt(self.roles[name].model, RANK, ALPHA, seed=0)
            hold_once([role.model for role in self.roles.values()])
        for name, role in self.roles.items():
            if name in kind.trains:
                learner.train(name, role, OptimizerConfig(), 1e-6)
            else:
                learner.freeze(role)
        extra = []
        if "max_new_tokens" in settings:
            encoder: Any = _Ends(self.size)
            extra = [Scorer(reward_model=self.roles["reward_model"], encoder=encoder, translate=None)]
        config: Any = {"algorithm": self.stage, "microbatch_size": 8, **settings}
        return kind(kind.Config(**config), {n: self.roles[n] for n in kind.needs}, learner, *extra)

    def prompts(self, step: int) -> Any:
        from preftune.data import pad_prompts

        part = [self.data[(step * PROMPTS + i) % len(self.data)][0] for i in range(PROMPTS)]
        return pad_prompts(part, [step * 100 + i for i in range(PROMPTS)], 0)

    def batch(self, step: int) -> Any:
        from preftune.data import pad_sequences
        from preftune.data.batch import PairIds, pad_pairs

        part = [self.data[(step * PAIRS_A_STEP + i) % len(self.data)] for i in range(PAIRS_A_STEP)]
        if self.stage == "sft":
            return pad_sequences([p for p, _, _ in part], [c for _, c, _ in part], 0)
        return pad_pairs([PairIds(*row) for row in part], 0)

    def step_function(self) -> Callable[[int], dict[str, float]]:
        if self.stage == "evaluate":
            return self.evaluation()
        online = self.stage in ("ppo", "grpo")
        k = GROUP if self.stage == "grpo" else 1
        settings: dict[str, Any] = {"batch_size": PAIRS_A_STEP}
        if online:
            settings = {"batch_size": PROMPTS * k, "max_new_tokens": NEW_TOKENS, "minibatches": 1}
            settings |= {"missing_eos_score": None}
            settings |= {"epochs": EPOCHS} if self.stage == "ppo" else {"group_size": GROUP}
        made = self.algorithm(**settings)

        def step(number: int) -> dict[str, float]:
            made.learner.begin_step()
            metrics = made.step(self.prompts(number) if online else self.batch(number))
            drawn = metrics.get("completions/mean_length", 0.0) * settings["batch_size"]
            return {"loss": metrics.get("loss", metrics.get("loss/policy_avg", 0.0)), "new_tokens": drawn}

        if self.states == "kept" and self.shares:
            self.fill()
        return step

    def fill(self) -> None:
        """Pass all rows once, before the clock starts."""
        import torch

        from preftune.data.batch import Pairs

        role = next(iter(self.roles.values()))
        with torch.no_grad():
            for number in range(len(self.data) // PAIRS_A_STEP):
                batch = self.batch(number)
                for rows in (batch.chosen, batch.rejected) if isinstance(batch, Pairs) else (batch,):
                    (role.raw_scores if self.stage == "reward" else role.logprobs)(rows)

    def evaluation(self) -> Callable[[int], dict[str, float]]:
        from preftune.evaluation.divergence import divergences
        from preftune.models.trunk import forget_states
        from preftune.rollout.sample import sample

        reference, judge = self.role("reference"), self.role("reward_model")
        policies, end = [self.role("policy") for _ in range(POLICIES)], _Ends(self.size).ends[0]

        def step(number: int) -> dict[str, float]:
            total = 0.0
            for policy in policies:
                forget_states()
                out = sample(
                    policy, self.prompts(number), max_new_tokens=NEW_TOKENS, temperature=1.0, eos_id=end
                )
                total += float(judge.normalised(judge.raw_scores(out)).detach().sum())
                total += sum(divergences(policy, reference, out, 1.0)[0])
            return {"loss": total}

        return step


class _Ends:
    """The last token of a model ends a reply, one in 50,000 of those drawn; it pads, too: -1 will not do."""

    def __init__(self, size: str) -> None:
        self.ends = (SIZES[size]["vocabulary"] - 1,)


def worker() -> None:
    _, _, size, stage, states, side, file = sys.argv
    import torch

    from preftune.models.memory import keep_freed_memory

    sys.path.insert(0, str(ROOT / "benchmarks" / "speed"))
    from work import peak_mb

    torch.set_num_threads(1)
    keep_freed_memory()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    step = Side(size, stage, states, side, json.loads(Path(file).read_text())).step_function()
    print(json.dumps({"ready": True}), file=out, flush=True)
    a, b = torch.randn(768, 768), torch.randn(768, 768)
    for line in sys.stdin:
        began = time.process_time()
        for _ in range(6):
            a @ b
        sgemm = 6 * 2 * 768**3 / (time.process_time() - began)
        began = time.process_time()
        facts = step(int(line))
        seconds = time.process_time() - began
        print(
            json.dumps({"seconds": seconds, "sgemm": sgemm, "peak_mb": peak_mb(), **facts}),
            file=out,
            flush=True,
        )


def flops(size: str, stage: str, states: str, data: list[Any], step: int, side: str) -> float:
    """Floating-point operations of a step in matrix products, two for each multiply-add, without attention
    and adapters. `side` as for `Side`, or "frozen": the same blocks frozen, but nothing shared or kept.
    """
    shape = SIZES[size]
    b, layers, head = shape["block"], shape["layers"], shape["vocabulary"] * shape["width"]
    whole = side in ("full", "lora")
    top = layers if whole else shape["top"]
    online = stage in ("ppo", "grpo", "evaluate")
    part = [
        data[(step * n + i) % len(data)] for n in (PROMPTS if online else PAIRS_A_STEP,) for i in range(n)
    ]
    prompt = sum(len(p) for p, _, _ in part)
    k = GROUP if stage == "grpo" else 1
    reply = (
        PROMPTS * k * NEW_TOKENS if online else sum(len(c) + len(r) * (stage != "sft") for _, c, r in part)
    )
    nodes = prompt + reply
    below = 2 * (layers - top) * b * nodes  # one pass through what is frozen
    look = 2 * top * b * nodes  # one role's own blocks
    train, words = (2 if side == "lora" else 3) * look, 2 * head * reply
    learnt = (6 if side == "full" else 4) * head * reply
    drawn = 2 * layers * b * nodes + words  # sampling
    kept = states == "kept" or stage in ("ppo", "grpo")  # whose states the sampler brings
    below *= PASSES[stage] if side == "frozen" else int(not (whole or kept))
    match stage:
        case "sft":
            return below + train + learnt
        case "reward":
            return below + train
        case "dpo":
            return below + train + learnt + look + words
        case "ppo":
            return drawn + below + 4 * look + 2 * words + EPOCHS * (2 * train + learnt)
        case "grpo":
            return drawn + below + 3 * look + 2 * words + train + learnt
    return POLICIES * (drawn + below + 3 * look + 2 * words)


class Worker:
    def __init__(self, *words: str) -> None:
        command = [sys.executable, __file__, "worker", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a worker ended")
        return json.loads(line)

    def step(self, number: int) -> dict[str, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


Round = tuple[dict[str, float], dict[str, float]]


def compare(size: str, stage: str, states: str, pairs: int, data: list[Any], file: Path) -> dict[str, Any]:
    """Both sides in turns; the first round is not counted."""
    full, trunk = (Worker(size, stage, states, side, str(file)) for side in ("full", "trunk"))
    rounds = [(full.step(i), trunk.step(i)) for i in range(1 + pairs)]
    full.stop()
    trunk.stop()
    work = [
        [flops(size, stage, states, data, i, side) for side in ("full", "trunk")] for i in range(1 + pairs)
    ]
    found = {"stage": stage, "states": states, "against": "full", **figures(rounds, work, ("full", "trunk"))}
    sgemm = [w[0] / a["seconds"] / a["sgemm"] for w, (a, _) in zip(work, rounds, strict=True)]
    return {**found, "share_of_sgemm_full": statistics.median(sgemm[1:])}


def figures(rounds: list[Round], work: list[list[float]], names: tuple[str, str]) -> dict[str, Any]:
    """What a row says of both sides, the faster one second; the first round is not counted."""
    counted = rounds[1:]
    ratios = sorted(a["seconds"] / b["seconds"] for a, b in counted)
    sgemm = [w[1] / b["seconds"] / b["sgemm"] for w, (_, b) in zip(work, rounds, strict=True)]
    return {
        "pairs": len(counted),
        "ratio_median": statistics.median(ratios),
        "ratio_low": ratios[0],
        "ratio_high": ratios[-1],
        "arithmetic_ratio": statistics.median(a / b for a, b in work[1:]),
        **{f"seconds_{n}": statistics.median(r[i]["seconds"] for r in counted) for i, n in enumerate(names)},
        f"share_of_sgemm_{names[1]}": statistics.median(sgemm[1:]),
        **{f"peak_mb_{n}": max(r[i]["peak_mb"] for r in rounds) for i, n in enumerate(names)},
        **{f"loss_{n}": rounds[0][i].get("loss", 0.0) for i, n in enumerate(names)},
    }


def key(row: dict[str, Any]) -> tuple[str, ...]:
    """What a row compares; `trainable` stands where it is not the size's "top:K"."""
    return row["stage"], row["states"], row["against"], row.get("trainable", "")


def write(size: str, found: dict[str, Any]) -> None:
    content = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"sizes": []}
    sizes = {each["size"]: each for each in content["sizes"]}
    entry = sizes.setdefault(size, {"size": size, "top": SIZES[size]["top"], "stages": []})
    entry["stages"] = [*(s for s in entry["stages"] if key(s) != key(found)), found]
    content = {"threads": 1, "clock": "processor seconds", "sizes": list(sizes.values())}
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")


def pairs_of(size: str, *wanted: str) -> int:
    """How many are on record for the row of this `key`."""
    sizes = json.loads(RESULTS.read_text())["sizes"] if RESULTS.is_file() else []
    entries = [s for each in sizes if each["size"] == size for s in each["stages"]]
    return next((s["pairs"] for s in entries if key(s) == wanted), 0)


def say(size: str, row: dict[str, Any]) -> None:
    ratio = f"{row['ratio_median']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"
    print(size, *key(row), f"{ratio}, arithmetic {row['arithmetic_ratio']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--stages", nargs="*", default=[f"{a}-{b}" for a, b in STAGES])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--shared", type=Path, required=True, help="directory with data/hh-rlhf")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PREFTUNE_CACHE"] = folder
        file, data = Path(folder) / "rows.json", rows(wanted.shared, 2 * PROMPTS)
        file.write_text(json.dumps(data))
        for stage, states in (s for s in STAGES if "-".join(s) in wanted.stages):
            for size in wanted.sizes or SIZES:
                if pairs_of(size, stage, states, "full", "") >= wanted.pairs:
                    continue
                found = compare(size, stage, states, wanted.pairs, data, file)
                write(size, found)
                say(size, found)


if __name__ == "__main__":
    worker() if sys.argv[1:2] == ["worker"] else main()
