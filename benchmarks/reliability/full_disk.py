"""A disk that fills up while a stage trains (a real one: a small tmpfs), and one too small from the start."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from faultlab import Lab, write_result

from preftune.rundir import RunDir, read_jsonl
from preftune.training.checkpoint import newest_step

SIZE = 16 << 20


@contextmanager
def small_disk(place: Path) -> Iterator[Path]:
    """A file system of 16 MiB. CalledProcessError without the right to mount one."""
    place.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """A file that takes all space but `leave` bytes."""
    state = os.statvfs(disk)
    filler = disk / "filler"
    with filler.open("ab") as file, suppress(OSError):
        file.write(bytes(max(state.f_bavail * state.f_frsize - leave, 0)))
    return filler


def held(lab: Lab, life: BaseProcess, before: int, times: int) -> None:
    """Wait until the life is held for the `times`-th time, or is over."""
    while lab.log.read_bytes()[before:].count(b"fault step: hold") < times and life.is_alive():
        time.sleep(0.01)


def too_small(lab: Lab, disk: Path) -> dict[str, Any]:
    run = RunDir(lab.fresh("ppo", disk / "run"))
    filler = fill(disk, leave=100_000)
    before = lab.log.stat().st_size
    code = lab.run("ppo", run.path)
    said = lab.log.read_text(errors="replace")[before:]
    filler.unlink()
    return {"code": code, "trained": run.checkpoints("ppo").exists(), "said": "are free" in said}


def fills_up(lab: Lab, disk: Path, *, frees: bool) -> dict[str, Any]:
    """Full from step 3 on, or for steps 3 and 4. Then there is room again, and the command is repeated."""
    run = RunDir(lab.fresh("ppo", disk / "run"))
    before = lab.log.stat().st_size
    life = lab.start("ppo", run.path, "step@step=3:hold=600" + (";step@step=5:hold=600" if frees else ""))
    held(lab, life, before, times=1)
    filler = fill(disk)
    os.kill(life.pid or 0, signal.SIGUSR2)
    if frees:
        held(lab, life, before, times=2)  # step 4 is over, and its checkpoint failed
        filler.unlink()
        os.kill(life.pid or 0, signal.SIGUSR2)
    life.join()
    intact = newest_step(run.checkpoints("ppo")) if not frees else None
    filler.unlink(missing_ok=True)
    left = [path.name for path in run.path.rglob("*tmp-*")]
    code = life.exitcode
    again = lab.run("ppo", run.path) if not frees else 0
    said = lab.log.read_text(errors="replace")[before:]
    return {
        "code": code,
        "older_checkpoint": intact,
        "left_behind": left,
        "warnings": said.count("warning:"),
        "code_of_the_repetition": again,
        "rows": [row["step"] for row in read_jsonl(run.metrics("ppo"))],
        "differs": lab.differs("ppo", run.path),
    }


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="preftune-disk-") as place:
        lab = Lab(Path(place))
        lab.prepare(("ppo",))
        with small_disk(lab.place / "disk") as disk:
            refused = too_small(lab, disk)
            stays = fills_up(lab, disk, frees=False)
            returns = fills_up(lab, disk, frees=True)
    write_result(
        "full_disk",
        {
            "file_system": f"tmpfs of {SIZE >> 20} MiB",
            "too_small_at_the_start": refused,
            "full_until_the_end": stays,
            "full_for_two_steps": returns,
        },
    )


if __name__ == "__main__":
    main()
