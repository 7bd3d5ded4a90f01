"""A study whose seeds and points run elsewhere: tasks that are lost, machines without common storage."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from study_helpers import SMALL, study_json, wanted, without_grpo

from preftune import cli
from preftune.errors import PreftuneError, UsageError
from preftune.rundir import BASE, RunDir, read_json
from preftune.runs.console import Console
from preftune.runs.runner import open_session
from preftune.runs.sources import dataset_of
from preftune.study import launch, tasks
from preftune.study import seed as one_seed
from preftune.study.command import resources
from preftune.study.design import load_design, save_design
from preftune.study.launch import Placement, run_study
from preftune.study.places import facts_file, numbers_in, point_dir, seed_dir
from preftune.study.seed import run_seed
from preftune.study.tasks import EndedTask, Task, carry_out

pytestmark = pytest.mark.xdist_group("study")  # one worker makes the study and goes on with it
POINT = "ppo-kl_coef-1_0"


def nothing_of_time(study: dict[str, Any]) -> dict[str, Any]:
    """All of study.json but where it was made, and how long that took."""
    seeds = [{key: value for key, value in seed.items() if key != "seconds"} for seed in study["seeds"]]
    return {**study, "seeds": seeds, "command": None}


# --- tasks, with a cluster that is told what becomes of them ------------------------------------------------


class Told:
    """A crew whose tasks end at once, with the codes given by name, one a try, then with 0."""

    def __init__(self, codes: dict[str, list[int | None]] | None = None) -> None:
        self.codes, self.started, self.stopped = codes or {}, list[str](), False
        self.running: list[Task] = []

    def start(self, task: Task) -> None:
        self.started.append(task.name)
        self.running.append(task)

    def ended_tasks(self) -> Sequence[EndedTask]:
        over, self.running = self.running, []
        codes = {task: self.codes.get(task.name) or [0] for task in over}
        return [EndedTask(task=task, code=left.pop(0), complaint="why") for task, left in codes.items()]

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Told]:
    """Carry out seed 1 with points a and b, and seed 2, with so many at once."""
    monkeypatch.setattr(tasks, "_POLL", 0.0)
    first = Task(out=tmp_path, seed=1, stages=("sft",))
    points = [Task(out=tmp_path, seed=1, stages=(p,), point=p, after=(first,)) for p in "ab"]
    rest = Task(out=tmp_path, seed=1, after=tuple(points))
    todo = [first, *points, rest, Task(out=tmp_path, seed=2)]

    def carry(crew: Told, at_once: int = 9) -> Told:
        try:
            carry_out(todo, crew, at_once=at_once, retries=2, console=Console(quiet=True))
        finally:
            assert crew.stopped
        return crew

    return carry


def test_a_task_waits_for_those_before_it(carried: Callable[..., Told]) -> None:
    assert carried(Told()).started == ["seed 1", "seed 2", "seed 1, a", "seed 1, b", "seed 1"]
    assert carried(Told(), 1).started == ["seed 1", "seed 1, a", "seed 1, b", "seed 1", "seed 2"]


@pytest.mark.parametrize("code", [None, -9, 137, 143, 73, 74, 75])
def test_a_task_that_was_lost_or_stopped_is_begun_again(
    carried: Callable[..., Told], code: int | None
) -> None:
    assert carried(Told({"seed 2": [code, code]})).started.count("seed 2") == 3


@pytest.mark.parametrize(("codes", "code"), [([None] * 3, 75), ([-9] * 3, 75), ([78], 78)])
def test_a_task_fails_that_is_lost_every_time_or_would_fail_again(
    carried: Callable[..., Told], codes: list[int | None], code: int
) -> None:
    crew = Told({"seed 1, a": codes.copy()})
    with pytest.raises(PreftuneError, match="1 of 2 seeds failed; seed 1, a: why") as caught:
        carried(crew)
    assert caught.value.code == code
    assert crew.started.count("seed 1, a") == len(codes)
    assert crew.started.count("seed 1") == 1  # what waits for it is not begun, the other seed is
    assert crew.started.count("seed 2") == 1


# --- what is a task -----------------------------------------------------------------------------------------


@pytest.fixture
def swept(two_seeds: Path, tmp_path: Path) -> Path:
    """The study, as it is before its points are trained."""
    out = tmp_path / "swept"
    shutil.copytree(two_seeds, out)
    launch._design(wanted(sweep="stage.ppo.kl_coef=0.05,1.0"), out)
    return out


def test_points_of_a_sweep_are_tasks_on_a_cluster_alone(swept: Path) -> None:
    design = load_design(swept)
    here = launch._tasks(swept, [3], design, False, Placement())
    assert [task.name for task in here] == ["seed 3"]
    asked = Placement(on="slurm", resources={"cpus_per_task": 2})
    first, point, rest, *others = launch._tasks(swept, [3, 4], design, False, asked)
    assert [first.name, point.name, rest.name] == ["seed 3", f"seed 3, {POINT}", "seed 3"]
    assert set(first.stages) == {"sft", "rm", "ppo", "grpo", "dpo", "ceiling"}
    assert point.stages == ("sft", "rm", POINT)
    assert rest.stages == ()
    assert (point.after, rest.after, rest.threads) == ((first,), (point,), 2)
    assert [task.seed for task in others] == [4, 4, 4]


def test_a_point_trained_apart_is_the_one_that_the_seed_trains(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_seed, "_measure", lambda *_: None)
    local, needs, file = tmp_path / "local", ("sft", "rm", POINT), "model.safetensors"
    shutil.copytree(swept, local)
    run_seed(Task(out=local, seed=3, reports=False, stages=needs))
    run_seed(Task(out=swept, seed=3, reports=False, stages=needs, point=POINT))
    apart, own = RunDir(point_dir(swept, 3, POINT)), RunDir(seed_dir(swept, 3))
    assert read_json(apart.stage_json("sft"))["taken_from"] == str(own.path.resolve())
    assert not own.stage_json(POINT).exists()
    run_seed(Task(out=swept, seed=3, reports=False))
    assert read_json(own.stage_json(POINT))["taken_from"] == str(apart.path.resolve())
    assert not apart.path.exists()
    theirs = RunDir(seed_dir(local, 3)).models / f"policy_{POINT}" / file
    assert (own.models / f"policy_{POINT}" / file).read_bytes() == theirs.read_bytes()


def test_a_machine_without_common_storage_goes_by_the_mirror(
    two_seeds: Path, tmp_path: Path, study_of: Callable[..., dict[str, Any]]
) -> None:
    """Stages come from there, a seed's numbers go there, and a third machine pools them."""
    mirror, design = tmp_path / "mirror", load_design(two_seeds)
    run, config = RunDir(seed_dir(two_seeds, 3)), design.for_seed(3)
    quiet, place = Console(quiet=True), str(seed_dir(mirror, 3))
    session = open_session(config, dataset_of(config.data, 3), run, quiet, place)
    assert session.mirror is not None
    for name in (BASE, *config.stage):
        session.mirror.put_stage(session.stage(name))
    save_design(design, mirror)
    run_seed(Task(out=tmp_path / "worker", seed=3, reports=False, mirror=mirror))
    shutil.rmtree(numbers_in(mirror))  # it was stopped before they went there
    run_seed(Task(out=tmp_path / "worker", seed=3, reports=False, mirror=mirror))
    assert not facts_file(tmp_path / "head", 3).exists()
    asked = Placement(on="slurm", mirror=mirror)  # all is there: no cluster is asked
    head = read_json(
        run_study(wanted(), tmp_path / "head", seeds=1, first_seed=3, reports=False, placement=asked)
    )
    assert not list((tmp_path / "head").glob("seed-*"))
    theirs = tmp_path / "theirs"
    shutil.copytree(two_seeds, theirs)
    assert nothing_of_time(head) == nothing_of_time(study_of(theirs, seeds=1, first_seed=3))


# --- real ones ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["submitit-local", "ray"])
def test_a_task_killed_in_the_middle_is_begun_again_and_the_numbers_are_the_same(
    two_seeds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    on: str,
) -> None:
    """SIGKILL once GRPO's second checkpoint is there, in every process that writes it: the second try must
    not, or it would be killed as well, and the next two.
    """
    pytest.importorskip(on.partition("-")[0], reason=f"{on}: pip install 'preftune[cluster]'")
    out = tmp_path / "out"
    shutil.copytree(two_seeds, out)
    without_grpo(out, 4)
    monkeypatch.setenv("PREFTUNE_FAULT", "checkpoint.renamed@step=2:kill")
    processors = "num_cpus" if on == "ray" else "cpus_per_task"
    placement = Placement(on=on, resources={processors: torch.get_num_threads()})  # bits hang on it
    run_study(wanted(), out, seeds=2, first_seed=3, reports=False, placement=placement)
    shown = capfd.readouterr().out
    assert "seed 4 ended with code -9 after" in shown
    assert "seed 4 finished in" in shown
    assert nothing_of_time(study_json(out)) == nothing_of_time(study_json(two_seeds))


@pytest.mark.parametrize(("on", "package"), [("slurm", "submitit"), ("ray", "ray")])
def test_without_its_package_a_cluster_is_69_and_says_what_to_install(
    two_seeds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    on: str,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    out = tmp_path / "out"
    shutil.copytree(two_seeds, out)
    words = ["study", "tiny", "--seeds", "1", "--pairs", "20", "--replies", "2", *SMALL, "--out", str(out)]
    assert cli.main([*words, "--on", on]) == 69
    assert "pip install 'preftune[cluster]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--on", "nowhere"],
        ["--resource", "num_cpus=2"],
        ["--on", "ray", "--resource", "num_cpus"],
        ["--on", "slurm", "--retries", "-1"],
        ["--mirror", "a", "--keep", "b"],
    ],
)
def test_what_contradicts_itself_is_64(tmp_path: Path, words: list[str]) -> None:
    assert cli.main(["study", "tiny", "--out", str(tmp_path / "x"), *words]) == 64


def test_resources_are_numbers_where_they_can_be() -> None:
    words = ["num_gpus=0.5", "timeout_min=240", "slurm_partition=gpu", "slurm_setup=a=b"]
    found = {"num_gpus": 0.5, "timeout_min": 240, "slurm_partition": "gpu", "slurm_setup": "a=b"}
    assert resources(words) == found


def test_a_task_has_as_many_threads_as_processors() -> None:
    assert Placement(resources={"slurm_cpus_per_task": 3}).threads == 3
    assert Placement(resources={"num_cpus": 0.5}).threads == 1
    with pytest.raises(UsageError, match="num_cpus=all: not a number"):
        _ = Placement(resources={"num_cpus": "all"}).threads
