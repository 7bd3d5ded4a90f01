"""Where the time of a stage goes. Usage: where.py SIZE STAGE ... --shared DIR

Adds to benchmarks/results/where.json: CPU seconds a step by part, the mean of five steps (PPO: one). Of the
updates without a rollout it is wall time by kind of torch's operations: leave the core to it.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, SAME_LOSS, prepare
from ours import Side
from preftune.models.fast import decode, native
from preftune.models.memory import keep_freed_memory
from preftune.rollout import collect
from preftune.rollout import sample as sampler
from preftune.training.learner import Learner
from work import SIZES, STAGES, timed

RESULT = ROOT / "benchmarks" / "results" / "where.json"
KINDS = {
    "aten::mm": "matrix products",
    "aten::addmm": "matrix products",
    "aten::_scaled_dot": "attention",
    "aten::fill_": "zeroing new gradients",
    "aten::_fused_adamw_": "AdamW",
}
spent: Counter[str] = Counter()


def clocked(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    return timed(spent, part, function, time.process_time)


def watch() -> None:
    """Clocks around the parts; those of one layer are inside those of a step."""
    sampler._draw = clocked("drawing tokens", sampler._draw)
    sampler.next_logits = clocked("head", sampler.next_logits)
    decode.GridDecoder.start = clocked("prompts", decode.GridDecoder.start)
    decode.GridDecoder.step = clocked("steps", decode.GridDecoder.step)
    decode.GridDecoder.attend = clocked("attention", decode.GridDecoder.attend)
    usual = native.FewRows.__init__

    def with_clocks(self: native.FewRows, model: Any) -> None:
        usual(self, model)
        self.products = {layer: clocked("linear layers", product) for layer, product in self.products.items()}

    native.FewRows.__init__ = with_clocks


def watch_updates() -> None:
    collect.sample = clocked("sampling", collect.sample)
    Learner._step = clocked("clipping and AdamW", Learner._step)
    Learner.update = clocked("updates", Learner.update)


def parts_of(stage: str, total: float, count: int) -> dict[str, float]:
    """Seconds of a step by part, each counted once."""
    parts = {part: seconds / count for part, seconds in spent.items()}
    if stage == "ppo":
        sampling, optimizer = parts["sampling"], parts["clipping and AdamW"]
        updates = parts["updates"] - optimizer
        rest = total / count - sampling - updates - optimizer
        return {
            "sampling": sampling,
            "forward and backward": updates,
            "clipping and AdamW": optimizer,
            "scores, log-probs, values": rest,
        }
    inside = parts["attention"] + parts.get("linear layers", 0)
    parts["transformers, norms, activations"] = parts.pop("steps") - inside
    return {**parts, "everything else": total / count - sum(parts.values())}


def operations(step: Callable[[list[int]], Any], steps: list[list[int]]) -> dict[str, float]:
    """Seconds of a step by kind of operation; what autograd and Python add between them is the rest."""
    parts = Counter[str]()
    began = time.perf_counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for rows in steps:
            step(rows)
    whole = time.perf_counter() - began
    for event in profile.key_averages():
        kind = next((kind for prefix, kind in KINDS.items() if event.key.startswith(prefix)), None)
        if kind is not None:
            parts[kind] += event.self_cpu_time_total / 1e6 / len(steps)
    return {**parts, "everything else": whole / len(steps) - parts.total()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("stages", nargs="+", choices=[s for s in STAGES if s not in ("grpo", "evaluate")])
    parser.add_argument("--shared", type=Path, required=True)
    wanted = parser.parse_args()
    keep_freed_memory()  # as a session does
    watch()
    watch_updates()
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    for stage in wanted.stages:
        torch.manual_seed(0)
        side = Side(prepare(wanted.size, wanted.shared, 0), stage)
        step = side.make()
        step(side.work["steps"][0])
        spent.clear()
        began = time.process_time()
        steps = side.work["steps"][1 : 2 if stage == "ppo" else None]
        if stage in SAME_LOSS:
            parts = operations(step, steps)
        else:
            for rows in steps:
                step(rows)
            parts = parts_of(stage, time.process_time() - began, len(steps))
        found.setdefault(wanted.size, {})[stage] = parts
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
