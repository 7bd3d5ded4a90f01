"""`--from` takes over what another run has finished alike; `--redo` makes stages anew, and can be undone."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import preftune
import prose
from preftune import api
from preftune.api import run_recipe
from preftune.cli import main
from preftune.config import load_recipe
from preftune.errors import ConfigError, DataError, UsageError
from preftune.rundir import RunDir, read_json, write_text
from preftune.runs import takeover
from preftune.runs.aside import close, half_moved, put_aside, settle, with_children
from preftune.runs.stages import Stage, begin, is_finished, made_of_what_is_here, was_raised, why_not_longer
from preftune.sums import write_sealed
from preftune.verify.attempts import different, outcome

SLOW = ("stage.dpo.learning_rate=3e-4",)


def model(run: RunDir, name: str) -> bytes:
    return (run.models / name / "model.safetensors").read_bytes()


def train(run: RunDir, until: str, *overrides: str, **options: object) -> str:
    run_recipe("tiny", overrides, out=str(run.path), until=until, **options)  # type: ignore[arg-type]
    return "\n".join(path.read_text() for path in sorted((run.path / "logs").iterdir()))


def test_stages_of_the_same_key_are_copied_and_the_rest_is_trained(tiny_run: RunDir, tmp_path: Path) -> None:
    new = RunDir(tmp_path / "new")
    said = train(new, "dpo", *SLOW, from_run=str(tiny_run.path))
    assert f"taken over from {tiny_run.path}: base, sft\n" in said
    assert "(settings.learning_rate: 0.0001 -> 0.0003)" in said
    assert f"sft          taken from {tiny_run.path}" in said
    lines = said.replace(str(tiny_run.path), "RUN").splitlines()
    found = [line.partition(" ")[2] for line in lines if "taken " in line or "trained here" in line]
    prose.compare("runs/from_and_redo: taken from another run", *found)
    for name in ("base", "policy_sft"):
        files = {file.name: file.read_bytes() for file in (tiny_run.models / name).iterdir()}
        assert {file.name: file.read_bytes() for file in (new.models / name).iterdir()} == files
    record = read_json(new.stage_json("sft"))
    assert record["taken_from"] == str(tiny_run.path.resolve())
    same = {k: v for k, v in read_json(tiny_run.stage_json("sft")).items() if k != "record_sha256"}
    assert {k: record[k] for k in same} == same
    for file in ("metrics.jsonl", "ledger.jsonl"):
        assert (new.stage_dir("sft") / file).read_bytes() == (tiny_run.stage_dir("sft") / file).read_bytes()
    assert model(new, "policy_dpo") != model(tiny_run, "policy_dpo")
    again = train(new, "dpo", *SLOW)
    assert again.count("taken from") == 2  # and a call without --from finds everything finished
    assert "dpo          already finished" in again


def test_damaged_or_linked_files_are_not_taken(copy: RunDir, tmp_path: Path) -> None:
    file = copy.models / "policy_sft" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"abcd")
    new = RunDir(tmp_path / "new")
    with pytest.raises(DataError, match=r"policy_sft/model\.safetensors is not what was written"):
        train(new, "sft", from_run=str(copy.path))
    assert not (new.models / "policy_sft").exists()
    (tmp_path / "elsewhere").write_bytes(whole)
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="is a link"):
        train(new, "sft", from_run=str(copy.path))


def test_nothing_of_somebody_else_makes_room_for_a_copy(tiny_run: RunDir, tmp_path: Path) -> None:
    mine = RunDir(tmp_path / "new").models / "policy_sft" / "model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="was not made by preftune and is in the way"):
        train(RunDir(tmp_path / "new"), "sft", from_run=str(tiny_run.path))
    assert mine.read_bytes() == b"mine"


def test_a_child_of_another_parent_is_not_taken(copy: RunDir, tmp_path: Path) -> None:
    """Same settings, yet the parent here has other bits: as on another machine."""
    new = RunDir(tmp_path / "new")
    train(new, "sft", from_run=str(copy.path))
    record = read_json(new.stage_json("sft"))
    for entry in record["files"].values():
        entry["sha256"] = entry["sha256"][::-1]
    write_sealed(new.stage_json("sft"), record)
    assert not made_of_what_is_here(new, read_json(copy.stage_json("dpo")))
    assert made_of_what_is_here(copy, read_json(copy.stage_json("dpo")))


def test_the_message_about_a_changed_setting_says_how_to_go_on(copy: RunDir) -> None:
    with pytest.raises(ConfigError, match="was made with other settings") as caught:
        train(copy, "dpo", *SLOW)
    command = "preftune train tiny dpo stage.dpo.learning_rate=3e-4 --out"
    assert f"{command} {copy.path} --redo dpo" in caught.value.hint
    assert f"{command} {copy.path}-2 --from {copy.path}" in caught.value.hint


def test_of_several_changed_stages_the_message_leads_to_all(copy: RunDir) -> None:
    changed, redo = [*SLOW, "stage.rm.learning_rate=2e-3"], list[str]()
    for other in ("rm", "dpo"):
        asked = " ".join(f"--redo {name}" for name in [*redo, other])
        with pytest.raises(ConfigError, match=f"stage {other} in .* was made with other settings") as caught:
            run_recipe("tiny", changed, out=str(copy.path), redo=redo)
        assert f"--out {copy.path} {asked}\n" in caught.value.hint
        redo.append(other)


def test_a_dry_run_says_what_is_taken_over_and_writes_nothing(
    tiny_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SLOW, "--out", str(tmp_path / "new"), "--from", str(tiny_run.path), "--redo", "rm", "--dry-run"]
    assert main(["run", "tiny", *words]) == 0
    said = capsys.readouterr().out
    assert f"taken over from {tiny_run.path}: base, sft\n" in said
    assert "trained here: dpo" in said
    assert "(settings.learning_rate: " in said
    assert "training again: rm, ppo, grpo" in said
    assert not (tmp_path / "new").exists()


def test_a_stage_of_which_no_step_is_kept_is_never_in_the_way(copy: RunDir) -> None:
    record = {**read_json(copy.stage_json("dpo")), "status": "running"}
    write_sealed(copy.stage_json("dpo"), record)
    assert is_finished(copy, Stage(name="dpo", algorithm="dpo", parents=("sft",), inputs={})) is False


@pytest.mark.parametrize(
    ("file", "is_there"),
    [
        ("checkpoints/step-000000/state.json", False),  # which kl_budget writes before the first step
        ("checkpoints/step-000002/state.json", True),
        ("member-0/stage.json", False),
        ("member-0/checkpoints/step-000002/state.json", True),
    ],
)
def test_what_a_stage_begins_with_is_no_step(file: str, is_there: bool, tmp_path: Path) -> None:
    run, new = RunDir(tmp_path), Stage(name="rm", algorithm="reward", parents=(), inputs={"seed": 1})
    write_sealed(run.stage_json("rm"), {"status": "running", "key": "other", "inputs": {"seed": 0}})
    write_sealed(run.stage_json("rm/member-0"), {"status": "running", "key": "other"})
    if not (run.stage_dir("rm") / file).exists():
        write_text(run.stage_dir("rm") / file, "")
    if is_there:
        with pytest.raises(ConfigError, match="seed: 0 -> 1"):
            is_finished(run, new)
    else:
        assert is_finished(run, new) is False


def test_replies_are_begun_with_the_first_and_finished_members_are_kept(tmp_path: Path) -> None:
    run, new = RunDir(tmp_path), Stage(name="x", algorithm="collect", parents=(), inputs={"seed": 1})
    write_sealed(run.stage_json("x"), {"status": "running", "key": "other", "inputs": {"seed": 0}})
    write_text(run.replies("x"), "")
    assert is_finished(run, new) is False
    write_text(run.replies("x"), "{}\n")
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        is_finished(run, new)
    run.replies("x").unlink()
    write_sealed(run.stage_json("x/member-0"), {"status": "finished", "key": "other"})
    with pytest.raises(ConfigError, match="seed: 0 -> 1"):
        is_finished(run, new)


def test_a_stage_that_begins_with_other_settings_drops_the_state_of_before_its_first_step(
    tmp_path: Path,
) -> None:
    run, old = RunDir(tmp_path), Stage(name="ppo", algorithm="ppo", parents=(), inputs={"seed": 0})
    begin(run, old)
    (run.checkpoints("ppo") / "step-000000").mkdir(parents=True)
    begin(run, old)
    assert (run.checkpoints("ppo") / "step-000000").is_dir()
    begin(run, replace(old, inputs={"seed": 1}))
    assert not (run.checkpoints("ppo") / "step-000000").exists()


@pytest.mark.parametrize("moves", [0, 1])
def test_a_kill_while_directories_move_loses_nothing(
    moves: int, copy: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for anew are two stages; the command dies before or after the first rename, the next goes on."""
    stages = [Stage(name=n, algorithm="x", parents=(), inputs={"new": n}) for n in ("sft", "dpo")]
    before = {n: model(copy, f"policy_{n}") for n in ("sft", "dpo")}
    rename, done = os.rename, list[object]()

    def dies(a: object, b: object) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(a)
        rename(a, b)  # type: ignore[call-overload]

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            put_aside(copy, stages, ["sft"])
    assert half_moved(copy, {stage.name: stage for stage in stages}) == ["sft"]
    assert put_aside(copy, stages, ["sft"]) == ["sft", "dpo"]
    for name, content in before.items():
        assert (copy.aside / name / "model" / "model.safetensors").read_bytes() == content
        assert (copy.aside / name / "stage" / "stage.json").is_file()
    assert put_aside(copy, stages, ["sft"]) == []


def test_what_was_asked_for_is_made_anew_once_until_its_command_has_ended(copy: RunDir) -> None:
    """As after a kill behind the last of the stages: in the evaluation, or in a stage after them."""
    stages, told = [Stage(name="dpo", algorithm="x", parents=(), inputs={})], list[list[str]]()
    assert put_aside(copy, stages, ["dpo"], lambda names: told.append(list(names))) == ["dpo"]
    settle(copy, stages[0])  # its new one is finished
    assert put_aside(copy, stages, ["dpo"], lambda names: told.append(list(names))) == []
    close(copy)
    assert not copy.aside.exists()
    put_aside(copy, stages, ["dpo"], lambda names: told.append(list(names)))
    assert told == [["dpo"], ["dpo"]]  # though nothing of it is there now: a mirror may hold it
    close(copy)


def test_an_evaluation_ends_what_was_asked_for(copy: RunDir) -> None:
    stage = Stage(name="dpo", algorithm="x", parents=(), inputs={})
    put_aside(copy, [stage], ["dpo"])
    shutil.rmtree(copy.stage_dir("dpo"), ignore_errors=True)
    for name, target in (("stage", copy.stage_dir("dpo")), ("model", stage.model_dir(copy))):
        os.rename(copy.aside / "dpo" / name, target)
    settle(copy, stage)
    assert copy.aside.is_dir()
    api.evaluate(copy.path)
    assert not copy.aside.exists()


def test_a_member_is_made_anew_with_its_stage(copy: RunDir, tmp_path: Path) -> None:
    session: Any = SimpleNamespace(run=RunDir(tmp_path), anew=["rm"])
    stage = Stage(name="rm/member-0", algorithm="reward", parents=(), inputs={})
    record = {"status": "finished", "key": stage.key, "files": {}, "made_from": {}}
    write_sealed(copy.stage_json(stage.name), record)
    stage.model_dir(copy).mkdir(parents=True)
    assert not takeover.take(session, copy, stage)


def test_a_stage_is_made_anew_with_what_hangs_on_it_alone(copy: RunDir) -> None:
    before = {name: model(copy, name) for name in ("policy_sft", "policy_dpo", "policy_ppo")}
    said = train(copy, "dpo", *SLOW, redo=["dpo"])
    (line,) = (line for line in said.splitlines() if "training again: dpo" in line)
    line = line.partition(" ")[2].replace(str(copy.path), "RUN")
    prose.compare("runs/from_and_redo: a stage that is made anew", line)
    assert "sft          already finished" in said
    assert model(copy, "policy_dpo") != before["policy_dpo"]
    assert {n: model(copy, n) for n in ("policy_sft", "policy_ppo")} == {
        n: before[n] for n in ("policy_sft", "policy_ppo")
    }
    assert not copy.aside.exists()


@pytest.mark.parametrize("where", ["run", "mirror"])
def test_nothing_is_moved_where_another_stage_is_refused(where: str, copy: RunDir, tmp_path: Path) -> None:
    """sft is not among those to be made anew, and was made with other settings."""
    mirror = tmp_path / "mirror"
    run_recipe("tiny", out=str(copy.path), until="dpo", mirror=str(mirror))
    if where == "mirror":
        shutil.rmtree(copy.stage_dir("sft"))
    changed = [*SLOW, "stage.sft.learning_rate=2e-3"]
    with pytest.raises(ConfigError, match=r"stage sft in .* was made with other settings"):
        train(copy, "dpo", *changed, redo=["dpo"], mirror=str(mirror))
    assert not copy.aside.exists()
    assert copy.stage_json("dpo").is_file()
    assert (mirror / "dpo" / "finished" / "mirror.json").is_file()


def test_children_are_those_that_read_the_model() -> None:
    stages = load_recipe("tiny").config.stage
    assert with_children(stages, ["dpo"]) == ["dpo"]
    assert with_children(stages, ["rm"]) == ["rm", "ppo", "grpo"]
    assert with_children(stages, ["sft"]) == list(stages)
    with pytest.raises(UsageError, match="--redo dqo: there is no such stage"):
        with_children(stages, ["dqo"])


def test_after_a_kill_the_next_call_goes_on_or_puts_the_old_one_back(
    copy: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = model(copy, "policy_dpo")
    settings = ("checkpoint.every=1", *SLOW)
    monkeypatch.setenv("PREFTUNE_FAULTS", "")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("preftune.runs.train.finished_model", stop)  # as if killed before the model is written
        with pytest.raises(KeyboardInterrupt):
            train(copy, "dpo", *settings, redo=["dpo"])
    assert (copy.aside / "dpo" / "model" / "model.safetensors").read_bytes() == old
    checkpoints = list(copy.checkpoints("dpo").glob("step-*"))
    assert checkpoints
    unfinished = RunDir(shutil.copytree(copy.path, copy.path.parent / "other"))
    said = train(copy, "dpo", *settings)  # with --redo or without: on from the last checkpoint
    assert said.count("training again") == 1
    assert model(copy, "policy_dpo") != old
    assert not copy.aside.exists()
    train(unfinished, "dpo", "checkpoint.every=1")  # the settings of before, without --redo
    assert model(unfinished, "policy_dpo") == old
    assert not unfinished.aside.exists()


def test_an_unfinished_stage_that_comes_back_leaves_no_other_in_the_mirror(
    copy: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with one learning rate, made anew with another, and gone on with the first."""
    a, b = (["checkpoint.every=1", f"stage.dpo.learning_rate={rate}"] for rate in ("3e-4", "2e-4"))
    mirror = str(copy.path.parent / "mirror")
    shutil.rmtree(copy.stage_dir("dpo"))
    shutil.rmtree(copy.models / "policy_dpo")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("preftune.runs.train.finished_model", stop)
        for words, redo in ((a, []), (b, ["dpo"])):
            with pytest.raises(KeyboardInterrupt):
                train(copy, "dpo", *words, redo=redo, mirror=mirror)
    said = train(copy, "dpo", *a, mirror=mirror)
    (line,) = (line for line in said.splitlines() if "the old one is back" in line)
    words = line.partition(" ")[2]
    prose.compare("runs/from_and_redo: an old stage that is what was asked for again", words)
    assert read_json(copy.stage_json("dpo"))["inputs"]["settings"]["learning_rate"] == 3e-4
    train(copy, "dpo", *a, mirror=mirror)


def test_nonsense_is_refused(copy: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "tiny", "--from", str(copy.path), f"out={copy.path}"]) == 64
    assert "is the run directory itself" in capsys.readouterr().err
    assert main(["run", "tiny", "--from", str(tmp_path / "none")]) == 66
    assert main(["run", "tiny", "--redo", "dpo", "--restart", f"out={copy.path}"]) == 64
    os.symlink(tmp_path, copy.path / ".aside")
    assert main(["run", "tiny", "--redo", "dpo", f"out={copy.path}"]) == 78
    assert preftune.run.__doc__ is not None


FLAT = ("stage.sft.optimizer.schedule=constant", "stage.sft.optimizer.warmup=0", "model.scratch.steps=4")
LONGER = (*FLAT, "checkpoint.keep_last=true")


@pytest.mark.usefixtures("small_data")
def test_a_stage_that_becomes_longer_goes_on_and_makes_the_same_bits(tmp_path: Path) -> None:
    run, fresh = RunDir(tmp_path / "run"), RunDir(tmp_path / "fresh")
    train(run, "sft", *LONGER)
    assert [path.name for path in run.checkpoints("sft").iterdir()] == ["step-000004"]
    said = train(run, "sft", *LONGER, "stage.sft.epochs=2")
    (line,) = (line for line in said.splitlines() if "continues after step 4" in line)
    assert "settings.epochs: 1 -> 2" in line
    prose.compare("runs/from_and_redo: a stage that becomes longer", line.partition(" ")[2])
    train(fresh, "sft", *FLAT, "stage.sft.epochs=2")
    assert different(outcome(fresh, "sft"), outcome(run, "sft")) == []
    assert not fresh.checkpoints("sft").exists()
    assert "sft          already finished" in train(run, "sft", *FLAT, "stage.sft.epochs=2")
    assert not run.checkpoints("sft").exists()  # nobody wants it any longer


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["stage.sft.epochs=2"], "its learning rate depends on the number of steps (schedule linear"),
        ([*FLAT[:2], "stage.sft.epochs=2"], None),
    ],
)
def test_what_cannot_go_on_says_why(copy: RunDir, words: list[str], why: str | None) -> None:
    """Another schedule is another stage: nothing is said about going on."""
    with pytest.raises(ConfigError) as caught:
        train(copy, "sft", *words)
    assert ("cannot continue from where it ended" in caught.value.message) == (why is not None)
    assert why is None or why in caught.value.message


def test_a_state_that_was_not_kept_is_missed() -> None:
    settings = {"optimizer": {"schedule": "constant", "warmup": 0}, "epochs": 2}
    stage = Stage(name="sft", algorithm="sft", parents=(), inputs={"settings": settings})
    before = {"status": "finished", "steps": 4, "inputs": {"settings": {**settings, "epochs": 1}}}
    changed = ["settings.epochs: 1 -> 2"]
    assert was_raised(stage, before, changed)
    assert "keep_last=true" in why_not_longer(RunDir("nowhere"), stage, before)
    assert not was_raised(stage, before, [*changed, "seed: 0 -> 1"])
    shorter = {**before, "inputs": {"settings": {**settings, "epochs": 3}}}
    assert not was_raised(stage, shorter, ["settings.epochs: 3 -> 2"])


@pytest.mark.parametrize(
    ("settings", "inputs", "why"),
    [
        ({"kl_budget": 9.0}, {}, "kl_budget may go back to"),
        ({}, {"best": {"every": 3}}, "no multiple of checkpoint.every = 3"),
        ({}, {"best": {"every": 2}}, ""),
        ({}, {}, ""),
    ],
)
def test_what_would_end_elsewhere_from_the_beginning_does_not_go_on(
    settings: dict[str, Any], inputs: dict[str, Any], why: str, tmp_path: Path
) -> None:
    run, shared = RunDir(tmp_path), {"optimizer": {"schedule": "constant", "warmup": 0}, **settings}
    stage = Stage(
        name="ppo", algorithm="ppo", parents=(), inputs={"settings": {**shared, "steps": 8}, **inputs}
    )
    before = {"status": "finished", "steps": 4, "inputs": {"settings": {**shared, "steps": 4}, **inputs}}
    (run.checkpoints("ppo") / "step-000004").mkdir(parents=True)
    assert was_raised(stage, before, ["settings.steps: 4 -> 8"])
    said = why_not_longer(run, stage, before)
    assert (said == "") if why == "" else (why in said)
