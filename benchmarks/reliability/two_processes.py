"""One of two processes gets SIGTERM, is killed, or hangs: do both end, how soon, which error is shown first,
and is the resumed run the same? Fails where a hang is not named first, or torchrun waits its half minute.
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
BEYOND = 30  # seconds after these in which both have to be gone, on a busy machine
CASES = {
    "sigterm": (signal.SIGTERM, 1),
    "sigkill": (signal.SIGKILL, 1),
    "sigstop": (signal.SIGSTOP, 1),
    "sigstop_of_the_main_one": (signal.SIGSTOP, 0),
}


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


def process(out: Path, rank: int) -> int:
    """The number of the process that torchrun gave a rank."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            its = (folder / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in its and str(out).encode() in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:
            continue
    raise SystemExit(f"there is no process {rank}")


def hit(place: Path, whole: RunDir, number: int, rank: int) -> dict[str, Any]:
    """Signal one process in step 3, wait for both, resume, compare."""
    run = RunDir(place / f"hit-{number}-{rank}")
    shutil.copytree(whole.path, run.path)
    shutil.rmtree(run.stage_dir(STAGE))
    shutil.rmtree(run.model_dir(STAGE))
    both = start(place, run.path, "step@step=3:sleep=3")
    while not (run.metrics(STAGE).is_file() and run.metrics(STAGE).read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    os.kill(process(run.path, rank), number)
    sent = time.monotonic()
    said = both.communicate()[0]
    seconds, kept = time.monotonic() - sent, newest_step(run.checkpoints(STAGE))
    silent = f"process {rank} of 2 (counted from 0) has not answered for {PATIENCE} s"
    again = start(place, run.path)
    again.communicate()
    return {
        "seconds": seconds,
        "stopped_by_agreement": "stopped by SIGTERM after step 2 of 5" in said,
        "silent_one_named": silent in said.partition("Root Cause")[0],  # torchrun's own words come after it
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
        found: dict[str, Any] = {name: hit(place, whole, *case) for name, case in CASES.items()}
    hangs = [case for name, case in found.items() if name.startswith("sigstop")]
    found["patience"] = PATIENCE
    write_result("two_processes", found)
    if not all(case["silent_one_named"] and case["seconds"] <= PATIENCE + BEYOND for case in hangs):
        raise SystemExit(f"a hang was not named, or not over {BEYOND} s after the time-out")


if __name__ == "__main__":
    main()
