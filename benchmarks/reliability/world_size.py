"""A run goes on with another number of processes: with the same rows, and how far apart? And the error of one
process of two: is it the one that is shown, and do both end?
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from faultlab import Lab, write_result
from safetensors.torch import load_file
from two_processes import start

from preftune.rundir import RunDir, read_jsonl
from preftune.training.checkpoint import newest_step

STAGE = "ppo"
VARIED = f"stage.{STAGE}.missing_eos_score=none"  # otherwise all scores of these short replies are equal
POISONED = f"stage.{STAGE}.reward_functions=one_bad_row:zero"


def train(lab: Lab, path: Path, *settings: str, fault: str = "") -> int:
    """One process trains the stage, or goes on with it: its exit code."""
    return lab.lives.run([*lab.words(STAGE, path), VARIED, *settings], lab.log, fault)


def fail_in_one(lab: Lab, path: Path) -> dict[str, Any]:
    """Two processes train, one meets an error in step 3: what is said, and how soon both are gone."""
    both = start(lab.place, lab.fresh(STAGE, path), stage=STAGE, settings=[VARIED, POISONED])
    assert both.stdout is not None
    lines, began = [], None
    for line in both.stdout:
        lines.append(line)
        if began is None and line.startswith("error:"):
            began = time.monotonic()
    code = both.wait()
    return {
        "errors": [line.strip() for line in lines if line.startswith("error:")],
        "code": code,
        "code_of_the_process": 65 if any("exitcode  : 65" in line for line in lines) else None,
        "seconds": None if began is None else time.monotonic() - began,
        "checkpoint": newest_step(RunDir(path).checkpoints(STAGE)),
    }


def apart(whole: RunDir, other: RunDir, kept: int) -> dict[str, Any]:
    """How far two trainings are apart, the second resumed after step `kept` with other processes."""
    ours, theirs = (read_jsonl(run.metrics(STAGE)) for run in (whole, other))
    models = [load_file(run.model_dir(STAGE) / "model.safetensors") for run in (whole, other)]
    first, again = ours[kept]["grad_norm"], theirs[kept]["grad_norm"]
    return {
        "same_rows": read_jsonl(whole.ledger(STAGE)) == read_jsonl(other.ledger(STAGE)),
        "steps": [row["step"] for row in theirs],
        "first_gradient": abs(again - first) / first,
        "last_loss": abs(theirs[-1]["loss/policy_avg"] - ours[-1]["loss/policy_avg"]),
        "weights": max((models[0][key] - models[1][key]).abs().max().item() for key in models[0]),
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="preftune-world-") as place:
        lab = Lab(Path(place))
        lab.prepare(())
        whole, path = RunDir(lab.fresh(STAGE, lab.place / "whole")), lab.place / "other"
        train(lab, whole.path)
        error = fail_in_one(lab, path)
        code = train(lab, path, POISONED)
        to_one = {"code": code, **apart(whole, RunDir(path), error["checkpoint"])}
        train(lab, lab.fresh(STAGE, path), fault="step@step=4:kill")
        kept = newest_step(RunDir(path).checkpoints(STAGE))
        both = start(lab.place, path, stage=STAGE, settings=[VARIED])
        both.communicate()
        to_two = {"code": both.returncode, **apart(whole, RunDir(path), kept)}
    write_result("world_size", {"stage": STAGE, "error_in_one": error, "to_one": to_one, "to_two": to_two})


if __name__ == "__main__":
    main()
