"""The same stage under other hash seeds, locales, time zones and directories, and with two threads."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from faultlab import Lab, write_result
from safetensors.torch import load_file

import preftune
from preftune.rundir import RunDir

CHANGES = {
    "hash seed, locale, time zone, directory": {
        "PYTHONHASHSEED": "1",
        "LC_ALL": "C",
        "TZ": "Asia/Kathmandu",
    },
    "another hash seed": {"PYTHONHASHSEED": "2"},
    "two threads": {"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"},
}


def main(stage: str = "ppo") -> None:
    source = str(Path(preftune.__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory(prefix="preftune-environment-") as place:
        lab = Lab(Path(place))
        lab.prepare((stage,))
        differs, largest = {}, {}
        for name, change in CHANGES.items():
            path = lab.fresh(stage, lab.place / "other")
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": source}
            command = [sys.executable, "-m", "preftune", *lab.words(stage, path)]
            there = "/" if "LC_ALL" in change else place
            subprocess.run(command, env={**environment, **change}, cwd=there, check=True, capture_output=True)
            differs[name] = lab.differs(stage, path)
            models = [RunDir(p).model_dir(stage) for p in (lab.whole(stage).path, path)]
            ours, theirs = (load_file(model / "model.safetensors") for model in models)
            largest[name] = max((ours[key] - theirs[key]).abs().max().item() for key in ours)
    write_result("environment", {"stage": stage, "differs": differs, "largest": largest})


if __name__ == "__main__":
    main(*sys.argv[1:2])
