"""SIGTERM at 30 random moments: exit code 143, how soon, and is the run the same in the end?"""

import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from faultlab import STAGES, Lab, percentile, seeded, write_result

from preftune.rundir import RunDir, read_jsonl
from preftune.training.checkpoint import newest_step

PER_STAGE = 6


def one_stop(lab: Lab, stage: str, seconds: float, rng: Any) -> dict[str, Any]:
    """Stop a life, look at what it left, finish it, compare."""
    run = RunDir(lab.fresh(stage, lab.place / f"stopped-{stage}"))
    code, taken = lab.signalled(stage, run.path, signal.SIGTERM, rng.uniform(0, seconds))
    while code == 0:  # the moment fell behind the end
        lab.fresh(stage, run.path)
        code, taken = lab.signalled(stage, run.path, signal.SIGTERM, rng.uniform(0, seconds))
    rows = read_jsonl(run.metrics(stage)) if run.metrics(stage).is_file() else []
    done = rows[-1]["step"] if rows else 0
    lost = (
        0
        if run.model_dir(stage, trains_policy=stage != "rm").is_dir()
        else done - newest_step(run.checkpoints(stage))
    )
    steps = [row["step_seconds"] for row in rows]
    lab.finish(stage, run.path)
    return {
        "stage": stage,
        "code": code,
        "seconds": taken,
        "steps_done": done,
        "steps_lost": lost,
        "step_seconds": sum(steps) / len(steps) if steps else None,
        "differs": lab.differs(stage, run.path),
    }


def main(per_stage: int = PER_STAGE) -> None:
    with tempfile.TemporaryDirectory(prefix="preftune-signals-") as place:
        lab = Lab(Path(place))
        lab.prepare()
        found = []
        for stage in STAGES:
            rng = seeded(f"signals/{stage}")
            seconds = lab.signalled(stage, lab.fresh(stage, lab.place / "timed"), 0, 0)[1]
            found += [one_stop(lab, stage, seconds, rng) for _ in range(per_stage)]
            print(
                stage, [(each["code"], round(each["seconds"], 3)) for each in found[-per_stage:]], flush=True
            )
    taken = [each["seconds"] for each in found]
    write_result(
        "signals",
        {
            "signals": len(found),
            "exit_143": sum(each["code"] == 143 for each in found),
            "identical": sum(not each["differs"] for each in found),
            "steps_lost": sum(each["steps_lost"] for each in found),
            "median_seconds": percentile(taken, 0.5),
            "p95_seconds": percentile(taken, 0.95),
            "most_seconds": max(taken),
            "each": found,
        },
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
