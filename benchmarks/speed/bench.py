"""preftune and TRL on the same work, in alternation. Usage: bench.py SIZE [STAGE ...] [--pairs N]

Each side is a process in its own environment; they take turns, A B A B, so that what else the machine does
hits both. Writes benchmarks/results/SIZE.json (stages that were not asked for keep what is there).
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

from preftune.data import Encoder
from preftune.data.dataset import read_preferences
from preftune.models.fast.native import kernel_file
from work import EOS, GROUP, NEW_TOKENS, PROMPT, PROMPTS, RESPONSE, SIZES, STAGES, VOCABULARY

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ENVIRONMENTS = ROOT / ".bench"
SAME_LOSS = {"sft", "reward", "dpo", "dpo_cached"}
GENERATES = {"generate_groups", "generate_distinct"}
SAME_TOKENS = {"generate_groups", "generate_distinct", "evaluate", "ppo", "grpo"}
CYCLE = 6  # steps with batches of their own


def prepare(size: str, shared: Path, seed: int) -> Path:
    """Models and rows of the work, drawn at random from the corpus."""
    directory = ENVIRONMENTS / f"work-{size}-{seed}"
    if (directory / "work.json").is_file():
        return directory
    tokenizer = AutoTokenizer.from_pretrained(shared / "data" / "gpt2-tokenizer")
    encoder = Encoder(tokenizer, "transcript", PROMPT, RESPONSE, 1024)
    files = sorted((shared / "data" / "hh-rlhf").glob("*/*.jsonl.gz"))
    preferences = [p for file in files for p in read_preferences(file, "skip")]
    chosen: dict[int, Any] = {}
    draw = random.Random(seed)
    while len(chosen) < CYCLE * PROMPTS:
        i = draw.randrange(len(preferences))
        kept, _ = encoder.usable([preferences[i]])
        if kept:
            chosen[i] = kept[0]
    rows = []
    for p in chosen.values():
        prompt, good, bad = encoder.pair(p)
        text = [p.prompt.transcript(), p.chosen, p.rejected]
        rows.append({"text": text, "prompt": prompt, "chosen": good, "rejected": bad})
    directory.mkdir(parents=True, exist_ok=True)
    models(directory, size, tokenizer)
    steps = [list(range(i, i + PROMPTS)) for i in range(0, len(rows), PROMPTS)]
    (directory / "work.json").write_text(
        json.dumps({"size": size, "seed": seed, "rows": rows, "steps": steps})
    )
    return directory


def models(directory: Path, size: str, tokenizer: Any) -> None:
    """A GPT-2 with random weights, and a reward model of its shape with a pad token. No dropout."""
    torch.manual_seed(0)
    shape = {k: v for k, v in SIZES[size].items() if k != "batch"}
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **shape, **dry)).save_pretrained(directory / "lm")
    tokenizer.save_pretrained(directory / "lm")
    config = GPT2Config(vocab_size=VOCABULARY + 1, num_labels=1, pad_token_id=VOCABULARY, **shape, **dry)
    GPT2ForSequenceClassification(config).save_pretrained(directory / "rm")
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    tokenizer.save_pretrained(directory / "rm")


class Worker:
    def __init__(self, python: Path, script: str, directory: Path, stage: str, *more: str) -> None:
        self.log = (directory / f"{'-'.join([stage, script, *more])}.log").open("w")
        command = [str(python), str(HERE / script), str(directory), stage, *more]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.answer()

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended; see {self.log.name}")
        return json.loads(line)

    def step(self) -> dict[str, Any]:
        self._say("go")
        return self.answer()

    def stop(self) -> None:
        self._say("stop")
        self.process.wait(60)

    def _say(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()


def theirs(stage: str) -> tuple[Path, str]:
    if stage == "ppo":
        return ENVIRONMENTS / "trl-1.12.0" / "bin" / "python", "theirs_ppo.py"
    return ENVIRONMENTS / "trl-1.16.0" / "bin" / "python", "theirs.py"


def compare(stage: str, directory: Path, pairs: int, warm: int = 1) -> dict[str, Any]:
    """Alternate both sides; the first `warm` steps of each are not counted."""
    sides = [
        Worker(Path(sys.executable), "ours.py", directory, stage),
        Worker(*theirs(stage), directory, stage),
    ]
    if stage in GENERATES and kernel_file().is_file():
        sides.append(Worker(Path(sys.executable), "ours.py", directory, stage, "without-kernel"))
    rounds, machines = [], []
    for _ in range(warm + pairs):
        machines.append(limits())
        rounds.append([side.step() for side in sides])
    for side in sides:
        side.stop()
    check(stage, rounds)
    counted = rounds[warm:]
    found: dict[str, Any] = {"stage": stage, "pairs": len(counted), **typical(machines[warm:])}
    found |= shares(stage, directory, [a["seconds"] for a, *_ in rounds], machines, warm)
    for clock, name in (("seconds", "ratio"), ("cpu_seconds", "cpu_ratio")):
        ratios = sorted(b[clock] / a[clock] for a, b, *_ in counted)
        found |= {
            f"{name}_median": statistics.median(ratios),
            f"{name}_low": ratios[0],
            f"{name}_high": ratios[-1],
        }
        for i, side in enumerate(("ours", "theirs")):
            found[f"{clock}_{side}"] = statistics.median(r[i][clock] for r in counted)
    for i, side in enumerate(("ours", "theirs")):
        found[f"peak_mb_{side}"] = max(r[i]["peak_mb"] for r in rounds)
    if len(sides) > 2:
        found["ratio_without_kernel"] = statistics.median(b["seconds"] / c["seconds"] for _, b, c in counted)
    if stage in SAME_LOSS:
        found["largest_loss_difference"] = max(abs(a["loss"] - b["loss"]) for a, b, *_ in rounds)
    if "new_tokens" in counted[0][0]:
        found["new_tokens"] = counted[0][0]["new_tokens"]
    return found


def check_tokens(stage: str, directory: Path) -> dict[str, float]:
    """Equal work by log-probs, for the stages that sample: see `equal`."""
    worker = Worker(Path(sys.executable), "ours.py", directory, "drift")
    found = worker.step()
    worker.stop()
    facts = {name: found[name] for name in ("drift_drawn", "drift_vocabulary")}
    if stage == "grpo":
        both = [("ours.py", Path(sys.executable)), ("theirs.py", theirs(stage)[0])]
        workers = [Worker(python, script, directory, "grpo_loss") for script, python in both]
        losses = [worker.step()["loss"] for worker in workers]
        for worker in workers:
            worker.stop()
        facts["largest_loss_difference"] = abs(losses[0] - losses[1])
    allowed = {"drift_drawn": 1e-5, "drift_vocabulary": 5e-5, "largest_loss_difference": 1e-4}
    for name, value in facts.items():
        if value > allowed[name]:
            raise SystemExit(f"{stage}: {name} is {value}, allowed is {allowed[name]}")
    return facts


def check(stage: str, rounds: list[list[dict[str, Any]]]) -> None:
    """That both sides did the same work."""
    for i, (a, b, *_) in enumerate(rounds):
        if stage in SAME_LOSS and abs(a["loss"] - b["loss"]) > 1e-4:
            raise SystemExit(f"{stage}, step {i}: losses differ: {a['loss']} and {b['loss']}")
        if stage in SAME_TOKENS and abs(a["new_tokens"] - b["new_tokens"]) > 0.02 * b["new_tokens"]:
            raise SystemExit(f"{stage}, step {i}: {a['new_tokens']} and {b['new_tokens']} new tokens")


def limits() -> dict[str, float]:
    """What this machine can do: sgemm in GFLOP/s and reading in GB/s, the best of several tries."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    long = torch.randn(1 << 25)
    sgemm = min(_seconds(lambda: a @ b) for _ in range(8))
    read = min(_seconds(lambda: long.sum()) for _ in range(8))
    return {"sgemm_gflops": 2 * 1024**3 / sgemm / 1e9, "read_gb_per_s": 4 * len(long) / read / 1e9}


def _seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def typical(machines: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The median of what was measured between the rounds."""
    return {"machine": {name: statistics.median(m[name] for m in machines) for name in machines[0]}}


def shares(
    stage: str, directory: Path, seconds: list[float], machines: list[dict[str, float]], warm: int
) -> dict[str, float]:
    """Our share of the machine's limits, each round against what was measured just before it: the median."""
    work = json.loads((directory / "work.json").read_text())
    count, steps = len(seconds), work["steps"]
    if stage in SAME_LOSS:
        needed = [useful(stage, work, steps[i % len(steps)]) for i in range(count)]
        rates = [n["useful_gflop"] / t for n, t in zip(needed, seconds, strict=True)]
        found = [rate / m["sgemm_gflops"] for rate, m in zip(rates, machines, strict=True)]
        facts = {name: statistics.median(n[name] for n in needed[warm:]) for name in needed[0]}
        return {**facts, "share_of_sgemm": statistics.median(found[warm:])}
    if stage in GENERATES:
        least = [decoding_limit(stage, work, steps[i % len(steps)], m) for i, m in enumerate(machines)]
        found = [limit / t for limit, t in zip(least, seconds, strict=True)]
        return {"share_of_limit": statistics.median(found[warm:])}
    return {}


def useful(stage: str, work: dict[str, Any], step: list[int]) -> dict[str, float]:
    """Tokens of a step when nothing is computed twice, and the multiplications they need."""
    shape = SIZES[work["size"]]
    body, head = 12 * shape["n_layer"] * shape["n_embd"] ** 2, VOCABULARY * shape["n_embd"]
    tokens = flops = 0.0
    for i in step[: shape["batch"]]:
        row = {k: len(work["rows"][i][k]) for k in ("prompt", "chosen", "rejected")}
        own = row["chosen"] + (row["rejected"] if stage != "sft" else 0)
        tokens += row["prompt"] + own
        flops += 6 * body * (row["prompt"] + own) + 6 * head * own * (stage != "reward")
        if stage == "dpo":
            flops += 2 * body * (row["prompt"] + own) + 2 * head * own
    return {"useful_tokens": tokens, "useful_gflop": flops / 1e9}


def decoding_limit(stage: str, work: dict[str, Any], step: list[int], machine: dict[str, float]) -> float:
    """Seconds that a step takes at least: prompts once, then each token reads all weights or multiplies."""
    shape = SIZES[work["size"]]
    body, head = 12 * shape["n_layer"] * shape["n_embd"] ** 2, VOCABULARY * shape["n_embd"]
    prompts = 1 if stage == "generate_groups" else GROUP
    length = sum(len(work["rows"][i]["prompt"]) for i in step[:prompts])
    flops = machine["sgemm_gflops"] * 1e9
    token = max(2 * GROUP * (body + head) / flops, 4 * (body + head) / machine["read_gb_per_s"] / 1e9)
    return 2 * body * length / flops + NEW_TOKENS * token


def write(path: Path, size: str, stages: list[dict[str, Any]], threads: int) -> None:
    old = json.loads(path.read_text())["stages"] if path.is_file() else []
    new = {s["stage"]: s for s in [*old, *stages]}
    content = {
        "size": size,
        "shape": SIZES[size],
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": threads,
        "new_tokens": NEW_TOKENS,
        "group": GROUP,
        "eos": EOS,
        "stages": [new[s] for s in STAGES if s in new],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("stages", nargs="*", help=", ".join(STAGES))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, required=True, help="directory with data/hh-rlhf")
    parser.add_argument("--note", help="what else the reader should know of this run")
    wanted = parser.parse_args()
    directory = prepare(wanted.size, wanted.shared, wanted.seed)
    path = ROOT / "benchmarks" / "results" / f"{wanted.size}.json"
    for stage in wanted.stages or STAGES:
        found = compare(stage, directory, wanted.pairs)
        if stage in SAME_TOKENS:
            found |= check_tokens(stage, directory)
        if wanted.note:
            found["note"] = wanted.note
        found["kernel"] = kernel_file().is_file()
        write(path, wanted.size, [found], torch.get_num_threads())
        line = (
            f"{stage:18s} {found['ratio_median']:.2f} [{found['ratio_low']:.2f}, {found['ratio_high']:.2f}]"
        )
        print(f"{line}  cpu {found['cpu_ratio_median']:.2f}", flush=True)


if __name__ == "__main__":
    main()
