"""What all sides of the speed benchmark share: the sizes, the work, and how a worker talks to its parent.

Runs in three environments, so it imports the standard library only.
"""

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = {
    "smoke": {"n_embd": 32, "n_layer": 1, "n_head": 2, "batch": 2},  # does it run
    "small": {"n_embd": 256, "n_layer": 6, "n_head": 4, "batch": 8},
    "124m": {"n_embd": 768, "n_layer": 12, "n_head": 12, "batch": 4},
}
EOS, VOCABULARY = 50256, 50257
PROMPT, RESPONSE = 512, 192  # tokens, at most
NEW_TOKENS, PROMPTS, GROUP = 48, 8, 8
SHIFT = 1.02  # by which a policy's weights are multiplied, where it must differ from its reference
LEARNING_RATE, BETA, KL_COEF = 1e-6, 0.1, 0.05
STAGES = (
    "sft",
    "reward",
    "dpo",
    "dpo_cached",
    "generate_groups",
    "generate_distinct",
    "grpo",
    "ppo",
    "evaluate",
)


def load(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "work.json").read_text(encoding="utf-8"))


def fixed(work: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts of 32 tokens, each twice, with two responses of at most 16."""
    rows = [row for row in work["rows"] if len(row["prompt"]) >= 32][:4]
    prompts = [row["prompt"][-32:] for row in rows for _ in range(2)]
    return prompts, [row[kind][:16] for row in rows for kind in ("chosen", "rejected")]


def batch(work: dict[str, Any]) -> int:
    """Rows of a step on fixed rows."""
    return work.get("batch") or SIZES[work["size"]]["batch"]


def frozen(model: Any, work: dict[str, Any]) -> Any:
    """The model, where the work has a "top" with the embeddings and all blocks but the upper `top` frozen."""
    if top := work.get("top"):
        base = model.base_model.requires_grad_(False)
        parts = list(base.children())
        at = next(i for i, part in enumerate(parts) if type(part).__name__ == "ModuleList")
        for part in (*parts[at][-top:], *parts[at + 1 :]):
            part.requires_grad_(True)
    return model


def peak_mb() -> float:
    """This process's peak memory. Not ru_maxrss, in which a child begins where its parent stands."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def timed(
    spent: Counter[str], part: str, function: Callable[..., Any], clock: Callable[[], float]
) -> Callable[..., Any]:
    """The function with a clock around it, whose seconds are added to `spent[part]`."""

    def wrapped(*args: Any, **named: Any) -> Any:
        began = clock()
        out = function(*args, **named)
        spent[part] += clock() - began
        return out

    return wrapped


class Channel:
    """One JSON object a line from worker to parent; the parent answers "go" or "stop".

    What libraries print goes to stderr.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._wall = self._cpu = 0.0

    def say(self, **facts: Any) -> None:
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()

    def wait(self) -> None:
        """Until the parent says go; ends the process if it says anything else. The clock starts here."""
        if sys.stdin.readline().strip() != "go":
            sys.stdout.flush()
            os._exit(0)
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def done(self, **facts: Any) -> None:
        """Report one step: its time since `wait`, the process's peak memory, and `facts`; then wait again."""
        seconds, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.say(seconds=seconds, cpu_seconds=cpu, peak_mb=peak_mb(), **facts)
        self.wait()
