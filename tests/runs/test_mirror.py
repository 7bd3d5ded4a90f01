"""What a mirror takes, gives back and refuses, and that trouble with it costs a warning."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from preftune.api import run_recipe
from preftune.errors import ConfigError
from preftune.rundir import RunDir, read_json, write_json
from preftune.runs import mirror as mirrors
from preftune.runs.aside import put_aside
from preftune.runs.mirror import Mirror
from preftune.runs.stages import Stage, refuse_foreign


@pytest.fixture
def run(tiny_run: RunDir, tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(tiny_run.path, tmp_path / "run"))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def mirror(run: RunDir, tmp_path: Path, said: list[str]) -> Mirror:
    return Mirror(directory=tmp_path / "drive", run=run, say=said.append)


def stage_of(run: RunDir, name: str) -> Stage:
    record = read_json(run.stage_json(name))
    kind, inputs = record["algorithm"], record["inputs"]
    return Stage(name=name, algorithm=kind, parents=tuple(record["parents"]), inputs=inputs)


def lost(run: RunDir, stage: Stage) -> Stage:
    shutil.rmtree(run.stage_dir(stage.name))
    return stage


def test_what_was_finished_before_there_was_a_mirror_gets_there_once(run: RunDir, mirror: Mirror) -> None:
    checkpoint = mirror.directory / "sft" / "step-000002"
    checkpoint.mkdir(parents=True)
    times = []
    for _ in range(2):
        run_recipe("tiny", out=str(run.path), until="sft", mirror=str(mirror.directory))
        units = [mirror.directory / name / "finished" / "mirror.json" for name in ("base", "sft")]
        times.append([unit.stat().st_mtime_ns for unit in units])
    assert times[0] == times[1]
    assert not checkpoint.exists()


def test_a_stage_that_is_there_is_not_read_again_and_one_that_lacks_a_file_is_put_again(
    run: RunDir, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = stage_of(run, "sft")
    mirror.put_stage(stage)
    unit, read, whole = mirror.directory / "sft" / "finished", list[Path](), mirrors.sha256_file
    monkeypatch.setattr(mirrors, "sha256_file", lambda file: read.append(file) or whole(file))
    mirror.put_stage(stage)
    assert read == [run.stage_json("sft")]
    weights = unit / "model" / "model.safetensors"
    weights.unlink()
    mirror.put_stage(stage)
    assert weights.is_file()


def test_trouble_with_the_drive_is_a_warning(
    run: RunDir, mirror: Mirror, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, calls = stage_of(run, "sft"), list[str]()

    def fails(*_: object) -> None:
        calls.append("")
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(mirrors, "_discard", fails)
    for step in (1, 2):
        shutil.rmtree(run.checkpoints("sft"), ignore_errors=True)
        checkpoint = run.checkpoints("sft") / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        mirror.put_checkpoint(stage, checkpoint)
    mirror.put_stage(stage)
    mirror.forget(["sft"])
    assert len(calls) == 3
    assert [line for line in said if line.startswith("warning: ") and "Input/output error" in line] == said
    monkeypatch.setattr(Path, "glob", fails)
    mirror.check(stage_of(run, "dpo"))
    assert "Input/output error" in said[-1]


def test_what_is_fetched_takes_the_place_of_an_older_model_and_of_nobody_elses(
    run: RunDir, mirror: Mirror
) -> None:
    mirror.put_stage(stage_of(run, "sft"))
    model = run.models / "policy_sft"
    weights = (model / "model.safetensors").read_bytes()
    stage = lost(run, stage_of(run, "sft"))
    (model / "model.safetensors").write_bytes(b"of an earlier attempt")
    mirror.fetch(stage)
    assert (model / "model.safetensors").read_bytes() == weights
    (lost(run, stage), (model / "preftune.json").unlink())
    with pytest.raises(ConfigError, match="was not made by preftune and is in the way"):
        mirror.fetch(stage)
    assert (model / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", ["sft", "rm/member-0"])
def test_a_stage_of_other_settings_is_not_fetched(run: RunDir, mirror: Mirror, name: str) -> None:
    made = Stage(name=name, algorithm="sft", parents=(), inputs={"settings": {"seed": 1}})
    write_json(made.model_dir(run) / "preftune.json", {})
    write_json(run.stage_json(name), {"stage": name, "status": "finished", "key": made.key})
    mirror.put_stage(made)
    lost(run, made)
    with pytest.raises(ConfigError, match=rf"stage {name} in the mirror .* made with other settings"):
        mirror.fetch(Stage(name=name, algorithm="sft", parents=(), inputs={"settings": {"seed": 2}}))
    assert not run.stage_json(name).exists()
    mirror.fetch(made)
    assert run.stage_json(name).is_file()


def test_a_stage_that_is_made_anew_leaves_the_mirror_before_it_goes_aside(
    run: RunDir, mirror: Mirror
) -> None:
    stages = [stage_of(run, "dpo")]
    mirror.put_stage(stages[0])

    def killed(moving: object) -> None:
        assert moving == ["dpo"]
        assert run.stage_json("dpo").is_file()
        assert not run.aside.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        put_aside(run, stages, ["dpo"], killed)
    assert put_aside(run, stages, ["dpo"], mirror.forget) == ["dpo"]
    assert not (mirror.directory / "dpo" / "finished").exists()


def test_only_a_restart_forgets_the_commits(mirror: Mirror) -> None:
    mirror.put_commits({"base gpt2": "abc"})
    mirror.forget(["sft"])
    assert (mirror.directory / "commits.json").is_file()
    mirror.forget(["sft"], commits=True)
    assert not (mirror.directory / "commits.json").exists()


def test_a_new_machine_gets_every_checkpoint_that_a_stage_may_go_back_to(
    run: RunDir, mirror: Mirror, tmp_path: Path
) -> None:
    """The best one is older than those that are newest."""
    stage = stage_of(run, "sft")
    for step in (10, 20, 30):
        checkpoint = run.checkpoints("sft") / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(str(step))
        if step == 30:
            shutil.rmtree(run.checkpoints("sft") / "step-000020")  # as the loop does: 10 is the best
        mirror.put_checkpoint(stage, checkpoint)
    units = mirror.directory / "sft"
    assert sorted(unit.name for unit in units.iterdir()) == ["step-000010", "step-000030"]
    new = RunDir(tmp_path / "new")
    Mirror(directory=mirror.directory, run=new, say=print).fetch(stage)
    states = {path.parent.name: path.read_text() for path in new.checkpoints("sft").glob("*/state.json")}
    assert states == {"step-000010": "10", "step-000030": "30"}
    assert new.metrics("sft").read_bytes() == run.metrics("sft").read_bytes()


def test_the_state_of_before_the_first_step_is_fetched_where_it_is_that_of_the_stage(
    run: RunDir, mirror: Mirror, tmp_path: Path
) -> None:
    """With kl_budget a stage may end there. Of other settings, it is in nobody's way."""
    stage = stage_of(run, "sft")
    for step in (0, 10):
        checkpoint = run.checkpoints("sft") / f"step-{step:06d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(str(step))
        mirror.put_checkpoint(stage, checkpoint)
        new = RunDir(tmp_path / f"new-{step}")
        there = Mirror(directory=mirror.directory, run=new, say=print)
        other = replace(stage, inputs={"seed": 1})
        if step == 0:
            there.check(other)
            there.fetch(other)
            assert not new.checkpoints("sft").exists()
        else:
            with pytest.raises(ConfigError, match="made with other settings"):
                there.check(other)
        there.fetch(stage)
        states = {path.parent.name for path in new.checkpoints("sft").glob("*/state.json")}
        assert states == {f"step-{each:06d}" for each in (0, 10) if each <= step}


def test_a_directory_with_nothing_in_it_is_nobodys(tmp_path: Path) -> None:
    """A kill, or a full disk, may have come before what says whose it is."""
    refuse_foreign(tmp_path)
    (tmp_path / ".preftune.json.tmp-1").touch()
    refuse_foreign(tmp_path)
    (tmp_path / "weights").touch()
    with pytest.raises(ConfigError, match="was not made by preftune"):
        refuse_foreign(tmp_path)
