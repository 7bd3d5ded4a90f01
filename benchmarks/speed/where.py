"""Where the time of a generation stage goes. Usage: where.py SIZE STAGE ... --shared DIR

Adds to benchmarks/results/where.json: CPU seconds a step by part, the mean of five steps. What is left over
is transformers' own code, norms and activations.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench import ROOT, prepare
from ours import Side
from preftune.models import decode, native
from preftune.rollout import sample as sampler
from work import SIZES, STAGES

RESULT = ROOT / "benchmarks" / "results" / "where.json"
spent: Counter[str] = Counter()


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **named: Any) -> Any:
        began = time.process_time()
        out = function(*args, **named)
        spent[part] += time.process_time() - began
        return out

    return wrapped


def watch() -> None:
    """Clocks around the parts; those of one layer are inside those of a step."""
    sampler._draw = timed("drawing tokens", sampler._draw)
    sampler.next_logits = timed("head", sampler.next_logits)
    decode.GridDecoder.start = timed("prompts", decode.GridDecoder.start)
    decode.GridDecoder.step = timed("steps", decode.GridDecoder.step)
    decode.GridDecoder.attend = timed("attention", decode.GridDecoder.attend)
    usual = native.FewRows.__init__

    def clocked(self: native.FewRows, model: Any) -> None:
        usual(self, model)
        self.products = [(module, timed("linear layers", product)) for module, product in self.products]

    native.FewRows.__init__ = clocked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("stages", nargs="+", choices=[s for s in STAGES if s.startswith("generate")])
    parser.add_argument("--shared", type=Path, required=True)
    wanted = parser.parse_args()
    watch()
    found = json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.is_file() else {}
    for stage in wanted.stages:
        torch.manual_seed(0)
        side = Side(prepare(wanted.size, wanted.shared, 0), stage)
        step = side.make()
        step(side.work["steps"][0])
        spent.clear()
        began = time.process_time()
        for rows in side.work["steps"][1:]:
            step(rows)
        count = len(side.work["steps"]) - 1
        parts = {part: seconds / count for part, seconds in spent.items()}
        parts["transformers, norms, activations"] = (
            parts.pop("steps") - parts["attention"] - parts.get("linear layers", 0)
        )
        parts["everything else"] = (time.process_time() - began) / count - sum(parts.values())
        found.setdefault(wanted.size, {})[stage] = parts
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
