"""One of two processes gets SIGTERM, is killed, or hangs: do both end, how soon, and is the resumed run the
same?
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faultlab import SHRUNK, different, outcome, write_data, write_result

import preftune
from preftune.rundir import RunDir
from preftune.training.checkpoint import newest_step

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
STAGE = "grpo"
PATIENCE = 10  # seconds that the processes wait for each other


def start(
    place: Path, out: Path, fault: str = "", *, stage: str = STAGE, settings: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Two processes on CPUs train a shrunk stage."""
    source = Path(preftune.__file__).resolve().parent.parent
    paths = os.pathsep.join(map(str, (source, Path(__file__).resolve().parent)))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths, "PREFTUNE_FAULT": fault}
    settings = [*SHRUNK, f"process_timeout={PATIENCE}", f"data.name={place / 'data'}", *settings]
    command = [*LAUNCHER, "-m", "preftune", "train", "tiny", stage, *settings, "--out", str(out)]
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def second_process(out: Path) -> int:
    """The number of the process that torchrun calls rank 1."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            its = (folder / "environ").read_bytes().split(b"\0")
            if b"RANK=1" in its and str(out).encode() in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    raise SystemExit("there is no second process")


def hit(place: Path, whole: RunDir, number: int) -> dict[str, Any]:
    """Signal the second process in step 3, wait for both, resume, compare."""
    run = RunDir(place / f"hit-{number}")
    shutil.copytree(whole.path, run.path)
    shutil.rmtree(run.stage_dir(STAGE))
    shutil.rmtree(run.model_dir(STAGE))
    both = start(place, run.path, "step@step=3:sleep=3")
    while not (run.metrics(STAGE).is_file() and run.metrics(STAGE).read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    os.kill(second_process(run.path), number)
    sent = time.monotonic()
    said = both.communicate()[0]
    seconds, kept = time.monotonic() - sent, newest_step(run.checkpoints(STAGE))
    again = start(place, run.path)
    again.communicate()
    return {
        "seconds": seconds,
        "stopped_by_agreement": "stopped by SIGTERM after step 2 of 5" in said,
        "silent_one_named": f"process 1 of 2 (counted from 0) has not answered for {PATIENCE} s" in said,
        "checkpoint": kept,
        "code_of_the_repetition": again.returncode,
        "differs": different(outcome(whole, STAGE), outcome(run, STAGE)),
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="preftune-two-") as name:
        place, whole = Path(name), RunDir(Path(name) / "whole")
        write_data(place / "data")
        first = start(place, whole.path)
        said = first.communicate()[0]
        if first.returncode != 0:
            raise SystemExit(said[-2000:])
        signals = {"sigterm": signal.SIGTERM, "sigkill": signal.SIGKILL, "sigstop": signal.SIGSTOP}
        found: dict[str, Any] = {name: hit(place, whole, number) for name, number in signals.items()}
    found["patience"] = PATIENCE
    write_result("two_processes", found)


if __name__ == "__main__":
    main()
