"""What all sides of the speed benchmark share: the sizes, the work, and how a worker talks to its parent.

Runs in three environments, so it imports the standard library only.
"""

import json
import os
import resource
import sys
import time
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
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.say(seconds=seconds, cpu_seconds=cpu, peak_mb=peak, **facts)
        self.wait()
