"""Two commands on one run directory: the second leaves at once; after a kill the directory is free again."""

import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faultlab import Lab, write_result

from preftune.rundir import RunDir

ROUNDS = 50
RACES = 25
COMMANDS = 10


def main(rounds: int = ROUNDS) -> None:
    with tempfile.TemporaryDirectory(prefix="preftune-locks-") as place:
        lab = Lab(Path(place))
        lab.prepare(())
        run = RunDir(lab.fresh("ppo", lab.place / "held"))
        holder = lab.start("ppo", run.path, "step@step=2:sleep=600")
        while not run.metrics("ppo").is_file():
            time.sleep(0.01)
        codes = [lab.run("ppo", run.path) for _ in range(rounds)]
        seconds, processor, shown = [], resource.getrusage(resource.RUSAGE_CHILDREN), ""
        for _ in range(COMMANDS):  # as typed by a person: a fresh interpreter
            began = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "preftune", *lab.words("ppo", run.path)],
                capture_output=True,
                text=True,
            )
            seconds.append(time.monotonic() - began)
            codes.append(done.returncode)
            shown = done.stderr.strip()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - processor.ru_utime - processor.ru_stime
        assert holder.pid is not None
        unharmed = holder.is_alive()
        os.kill(holder.pid, signal.SIGKILL)
        holder.join()
        free = lab.run("ppo", run.path)
        # Two at the same moment: one works, the other leaves.
        races = []
        for _ in range(RACES):
            lab.fresh("sft", run.path)
            both = [lab.start("sft", run.path, "step:kill") for _ in range(2)]
            for life in both:
                life.join()
            races.append(sorted(life.exitcode or 0 for life in both))
    write_result(
        "locks",
        {
            "second_commands": len(codes),
            "exit_73": sum(code == 73 for code in codes),
            "first_unharmed": unharmed,
            "free_after_kill": free == 0,
            "message": shown.replace(place, "PLACE").split("\n"),
            "median_seconds": statistics.median(seconds),
            "most_seconds": max(seconds),
            "processor_seconds": used / COMMANDS,
            "races": len(races),
            "races_with_two_writers": sum(pair == [-9, -9] for pair in races),
            "race_codes": sorted({tuple(pair) for pair in races}),
        },
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
