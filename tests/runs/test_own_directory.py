"""What preftune did not make stays as it is: nothing through links, nothing of strangers, nothing unasked."""

import fcntl
import json
import os
import shutil
import stat
from pathlib import Path

import pytest

import preftune
from preftune.cli import main
from preftune.rundir import RunDir, read_json
from preftune.runs.lock import held, refuse_if_held
from preftune.runs.restart import remove_run

SMALL = ("model.scratch.steps=2", "data.pairs=60", "stage.sft.rows=16")
SFT = ("train", "tiny", "sft", *SMALL)


def contents(path: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(file.relative_to(path)): (file.read_bytes(), file.stat().st_mtime_ns)
        for file in path.rglob("*")
        if file.is_file()
    }


PLACES = (".lock", "evaluation", "figures", "models", "stages/ppo", "samples", ".preftune", "config.toml")


@pytest.mark.parametrize(
    ("place", "command"),
    [
        *((place, command) for place in PLACES for command in ("run", "restart")),
        *(("figures", "report"), ("config.toml", "report")),
    ],
)
def test_nothing_is_written_or_deleted_through_a_link(
    copy: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, command: str
) -> None:
    (tmp_path / "theirs").mkdir()
    shutil.move(copy.path / place, tmp_path / "theirs" / "it")
    before = contents(tmp_path / "theirs")
    (copy.path / place).symlink_to(tmp_path / "theirs" / "it")
    words = {
        "run": ["run", "tiny"],
        "restart": ["run", "tiny", "--restart"],
        "report": ["report", str(copy.path)],
    }
    code = main([*words[command], *([f"out={copy.path}"] if command != "report" else [])])
    assert code == 78
    assert f"{place} is a link" in capsys.readouterr().err
    assert contents(tmp_path / "theirs") == before


def test_a_lock_with_a_second_name_is_not_emptied(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("a long text of somebody")
    (tmp_path / "run").mkdir()
    os.link(theirs, tmp_path / "run" / ".lock")
    assert main([*SFT, f"out={tmp_path / 'run'}"]) == 78
    assert theirs.read_text() == "a long text of somebody"


@pytest.mark.parametrize("name", ["config.toml", "data.json", "evaluation/mine.json", "figures/a.svg"])
@pytest.mark.parametrize("restart", [[], ["--restart"]])
def test_a_directory_of_somebody_else_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, restart: list[str]
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    assert main([*SFT, *restart, f"out={tmp_path}"]) == 78
    said = capsys.readouterr().err
    assert "was not made by preftune" in said
    assert name in said
    assert file.read_text() == "mine"
    assert not (tmp_path / "models").exists()


@pytest.mark.usefixtures("small_data")
def test_a_project_without_such_files_may_be_used_and_restart_removes_only_what_a_run_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = [tmp_path / name for name in ("notes.txt", "models/other/x.bin", "figures/own.png")]
    for file in mine:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    monkeypatch.chdir(tmp_path)
    assert main([*SFT, "out=."]) == 0
    later = [tmp_path / "stages/sft/own.txt", tmp_path / "logs/own.log", tmp_path / "evaluation/own.txt"]
    for file in later:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    capsys.readouterr()
    assert main([*SFT, "out=.", "--restart", "stage.sft.learning_rate=0.01"]) == 0
    assert all(file.read_text() == "mine" for file in (*mine, *later))
    said = capsys.readouterr().out
    assert "removed of an earlier run: " in said
    assert "models/policy_sft" in said
    assert "own.txt" not in said


def test_a_run_from_before_there_was_a_marker_is_known_by_its_run_json(copy: RunDir) -> None:
    copy.marker.unlink()
    with held(copy):
        assert read_json(copy.marker)["made_by"].startswith("preftune")


def test_sampling_writes_nothing(copy: RunDir) -> None:
    before = contents(copy.path)
    assert main(["sample", str(copy.path), "--prompt", "Hello"]) == 0
    assert contents(copy.path) == before


@pytest.mark.usefixtures("small_data")
def test_sample_and_evaluate_do_not_import_what_stages_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "taught.py"
    mine.write_text("def f(prompt, response):\n    return len(response)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    out, few = (
        str(tmp_path / "run"),
        ("evaluation.prompts=4", "evaluation.pool=4", "evaluation.max_new_tokens=4"),
    )
    words = ("stage.grpo.reward_model=none", "stage.grpo.steps=1", "stage.grpo.reward_functions=taught:f")
    none = (f"stage.{name}=none" for name in ("rm", "ppo", "dpo"))
    preftune.run("tiny", *SMALL, *few, *words, *none, out=out)
    mine.unlink()
    monkeypatch.delitem(__import__("sys").modules, "taught")
    assert main(["sample", out, "--policy", "grpo", "--prompt", "Hello"]) == 0
    assert main(["evaluate", out]) == 0


def test_what_a_late_kill_left_is_swept(copy: RunDir) -> None:
    left = [
        copy.stage_dir("evaluation") / "parts" / "pool.json",
        copy.models / "policy_sft" / ".README.md.tmp-999999999",
        copy.checkpoints("ppo") / "step-000002" / "state.json",
        copy.path / "stages" / "evaluation" / "parts" / ".x.json.tmp-999999999",
    ]
    for file in left:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    before = {str(path.relative_to(copy.path)) for path in copy.path.rglob("*")}
    log = copy.log(copy.next_attempt())  # other tests may have run the original again
    preftune.run("tiny", out=str(copy.path))
    after = {str(path.relative_to(copy.path)) for path in copy.path.rglob("*")}
    assert not any(file.exists() for file in left)
    assert all(str(file.relative_to(copy.path)) in before for file in left)
    assert not copy.checkpoints("ppo").exists()
    assert after <= before | {str(log.relative_to(copy.path))}


@pytest.mark.usefixtures("small_data")
def test_files_of_a_model_are_as_open_as_each_other(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = preftune.supervised_finetune("tiny", *SMALL, out=str(tmp_path / "run"))
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()}
    assert set(modes.values()) == {0o640}, modes


def test_a_result_goes_to_a_directory_that_is_there(
    tiny_run: RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compare", str(tiny_run.path), str(tiny_run.path), "--json"]
    assert main([*words, str(tmp_path / "no" / "x.json")]) == 66
    assert "there is no such directory" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert main([*words, str(tmp_path / "x.json")]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["same_reward_model"]


def test_half_copies_of_members_and_of_collected_data_are_swept(copy: RunDir) -> None:
    left = [copy.models / "reward_model" / ".tmp-member-0-1", copy.collections / ".tmp-pairs-1"]
    left += [copy.checkpoints("rm/member-0") / ".tmp-000002-1"]
    for folder in left:
        folder.mkdir(parents=True)
    files = [copy.stage_dir("rm/member-0") / f".{name}.tmp-999999999" for name in ("stage.json", "live.json")]
    for file in files:
        file.touch()
    with held(copy):
        assert not any(path.exists() for path in (*left, *files))


def test_who_looks_is_in_nobodys_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two may look at once, and a drive that knows no locks is said by who writes there."""
    run = RunDir(tmp_path)
    with run.lock.open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        refuse_if_held(run)

    def fails(*_: object) -> None:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", fails)
    refuse_if_held(run)
    assert capsys.readouterr().out == ""
    with held(run):
        assert "cannot be locked" in capsys.readouterr().out


def test_a_restart_removes_parts_and_the_trackers_files(copy: RunDir) -> None:
    ours = ["tensorboard/sft/events.out.tfevents.1", "stages/evaluation/parts-theirs/base.json"]
    theirs = ["tensorboard/other/events.out.tfevents.1", "tensorboard/sft/notes.txt"]
    for name in (*ours, *theirs):
        (copy.path / name).parent.mkdir(parents=True, exist_ok=True)
        (copy.path / name).write_text("{}")
    remove_run(copy)
    assert not any((copy.path / name).exists() for name in ours)
    assert all((copy.path / name).exists() for name in theirs)
