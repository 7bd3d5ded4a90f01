"""examples/cluster: what can be said of the files without a cluster, whose programs are stand-ins here."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from patience import PATIENCE, wait_for

PLACE = Path(__file__).resolve().parent.parent / "examples" / "cluster"
SCRIPTS = sorted(path for path in PLACE.iterdir() if path.suffix in (".sh", ".sbatch"))
# It is there, says so, and ends as a stopped run does; or at once, with the code given.
RUN = """#!/bin/bash
echo "$0 $@" >> {told}/run
[ -n "${{CODE:-}}" ] && exit "$CODE"
trap 'echo stopped >> {told}/run; exit 143' TERM
touch {told}/ready
while true; do sleep 0.05; done
"""
CONTROL = '#!/bin/bash\nif [ "$1" = show ]; then echo node7; else echo "$@" >> {told}/control; fi\n'


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """An environment in which preftune, srun, torchrun and scontrol write down what they are asked."""
    for name, text in {"preftune": RUN, "srun": RUN, "torchrun": RUN, "scontrol": CONTROL}.items():
        (tmp_path / name).write_text(text.format(told=tmp_path))
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2"}
    return {**os.environ, **job, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=True).stderr == ""


@pytest.mark.parametrize("name", ["run.sbatch", "nodes.sbatch"])
@pytest.mark.parametrize(("number", "again"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_a_warned_job_stops_its_run_and_is_put_back_and_a_cancelled_one_is_not(
    stand_ins: dict[str, str], tmp_path: Path, name: str, number: int, again: bool
) -> None:
    job = subprocess.Popen(["bash", PLACE / name, "tiny", "--out", "x y"], env=stand_ins)
    wait_for((tmp_path / "ready").exists, lambda: job.poll() is None)
    job.send_signal(number)
    assert job.wait(PATIENCE) == (0 if again else 143)
    words, stopped = (tmp_path / "run").read_text().splitlines()
    assert words.endswith("run tiny --out x y")
    assert stopped == "stopped"
    assert (tmp_path / "control").exists() == again
    if again:
        assert (tmp_path / "control").read_text() == "requeue 12\n"
    if name == "nodes.sbatch":
        assert "torchrun --nnodes 2 " in words
        assert "--rdzv_endpoint node7:29500 " in words


@pytest.mark.parametrize("code", [0, 78])
@pytest.mark.parametrize("name", ["run.sbatch", "nodes.sbatch"])
def test_a_job_that_ends_by_itself_ends_with_its_code(
    stand_ins: dict[str, str], tmp_path: Path, name: str, code: int
) -> None:
    ended = subprocess.run(["bash", PLACE / name, "tiny"], env={**stand_ins, "CODE": str(code)}, check=False)
    assert ended.returncode == code
    assert not (tmp_path / "control").exists()


def test_several_machines_need_to_know_of_each_other(stand_ins: dict[str, str], tmp_path: Path) -> None:
    script, known = PLACE / "nodes.sh", {"NODES": "2", "FIRST": "10.0.0.1", "CODE": "0"}
    assert subprocess.run(["bash", script, "tiny"], env=stand_ins, check=False).returncode == 1
    subprocess.run(["bash", script, "tiny"], env={**stand_ins, **known}, check=True)
    words = (tmp_path / "run").read_text()
    assert "--nnodes 2 --nproc_per_node 8 " in words
    assert words.endswith("--rdzv_endpoint 10.0.0.1:29500 -m preftune run tiny\n")


def test_the_spot_task_goes_on_from_its_bucket(tmp_path: Path) -> None:
    """Where the bucket is mounted the run has its mirror; its shell lines can be read."""
    task = yaml.safe_load((PLACE / "spot.yaml").read_text(encoding="utf-8"))
    assert task["resources"]["use_spot"] is True
    (mount,) = task["file_mounts"]
    assert re.search(rf'preftune run "\$RECIPE" .*--mirror "{mount}/', task["run"])
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n"], input=task[part], text=True, check=True)
