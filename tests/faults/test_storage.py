"""Damaged bytes, full disks, and a mirror from which a new machine goes on."""

import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from corruption import KINDS, damage
from faultlab import STAGES, Lab, seeded
from full_disk import fills_up, small_disk, too_small

from preftune.config import load_recipe
from preftune.faults import KILL
from preftune.rundir import RunDir, write_json, write_jsonl
from preftune.training.checkpoint import fault_of, newest_step
from preftune.verify import resume

pytestmark = pytest.mark.xdist_group("forked")


@pytest.fixture(scope="module")
def killed(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PPO stage that died in step 5, with checkpoints of steps 2 and 4. Copy it."""
    path = lab.fresh("ppo", tmp_path_factory.mktemp("killed") / "run")
    assert lab.run("ppo", path, "step@step=5:kill") == -signal.SIGKILL
    return path


def test_every_damage_is_noticed(killed: Path, tmp_path: Path) -> None:
    """Truncation, one bit, a missing file: 90 cases here, 400 in `make reliability`."""
    good, rng, found = RunDir(killed).checkpoints("ppo") / "step-000004", seeded("ci"), Counter()
    assert fault_of(good) is None
    for i in range(90):
        bad = tmp_path / "step-000004"
        shutil.copytree(good, bad)
        name = damage(bad, KINDS[i % 3], rng)
        fault = fault_of(bad)
        assert fault is not None, name
        assert name in fault or name == "manifest.json" or "manifest" in fault
        found[name] += 1
        shutil.rmtree(bad)
    assert len(found) == 6  # two roles with weights and moments, the state, the manifest


def test_the_older_checkpoint_is_used_and_the_damaged_one_named(lab: Lab, killed: Path, out: Path) -> None:
    run, before = RunDir(shutil.copytree(killed, out)), lab.log.stat().st_size
    damage(run.checkpoints("ppo") / "step-000004", "one bit flipped", seeded("ci/fall back"))
    assert lab.run("ppo", out) == 0
    said = lab.log.read_bytes()[before:].decode()
    assert "step-000004 is damaged" in said
    assert lab.differs("ppo", out) == []


def test_without_a_valid_checkpoint_the_command_says_what_to_do(lab: Lab, killed: Path, out: Path) -> None:
    run, before = RunDir(shutil.copytree(killed, out)), lab.log.stat().st_size
    for step in (2, 4):
        damage(run.checkpoints("ppo") / f"step-{step:06d}", "file missing", seeded(f"ci/all {step}"))
    assert lab.run("ppo", out) == 65
    said = lab.log.read_bytes()[before:].decode()
    assert "none of 2 checkpoints" in said
    assert "--restart" in said
    assert len(list(run.checkpoints("ppo").glob("step-*"))) == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_fills_up_loses_nothing(lab: Lab, tmp_path: Path) -> None:
    try:
        with small_disk(tmp_path / "disk") as disk:
            assert too_small(lab, disk) == {"code": 74, "trained": False, "said": True}
            result = fills_up(lab, disk, frees=False)
    except subprocess.CalledProcessError:
        pytest.skip("mounting is not allowed here")
    assert result["code"] == 74
    assert result["older_checkpoint"] == 2
    assert result["left_behind"] == []
    assert result["code_of_the_repetition"] == 0
    assert result["differs"] == []


def test_a_new_machine_goes_on_from_the_mirror(lab: Lab, out: Path, tmp_path: Path) -> None:
    """Parents and checkpoint come from there; the run directory of before is gone."""
    mirror = tmp_path / "drive"
    words = [*lab.words("ppo", out), "--mirror", str(mirror)]
    assert lab.lives.run(words, lab.log, "step@step=5:kill") != 0  # in the first stage of five steps: base
    assert newest_step(RunDir(out).checkpoints("base")) == 4
    assert lab.lives.run(words, lab.log) == 0
    shutil.rmtree(mirror / "ppo")
    shutil.rmtree(out)
    assert lab.lives.run(words, lab.log, "rewards@step=5:kill") == -signal.SIGKILL
    assert sorted(path.name for path in (mirror / "ppo").iterdir()) == ["step-000002", "step-000004"]
    shutil.rmtree(out)
    # A unit that is not whole does not exist: here the newest lacks its manifest, as after a torn upload.
    (mirror / "ppo" / "step-000004" / "mirror.json").unlink()
    before = lab.log.stat().st_size
    assert lab.lives.run(words, lab.log) == 0
    said = lab.log.read_bytes()[before:].decode()
    assert "checkpoint of step 2 fetched" in said
    assert lab.differs("ppo", out) == []
    assert [path.name for path in (mirror / "ppo").iterdir()] == ["finished"]
    # On a third machine everything is there already.
    before = lab.log.stat().st_size
    third = tmp_path / "third"
    assert lab.lives.run([*lab.words("ppo", third), "--mirror", str(mirror)], lab.log) == 0
    assert lab.differs("ppo", third) == []
    assert lab.log.read_bytes()[before:].count(b"already finished") == 4
    # Other settings are refused before anything is fetched.
    fourth = [*lab.words("ppo", tmp_path / "fourth"), "seed=1", "--mirror", str(mirror)]
    assert lab.lives.run(fourth, lab.log) == 78
    assert not (tmp_path / "fourth" / "models").exists()


def test_verify_resume_repeats_the_claim(lab: Lab, capfd: pytest.CaptureFixture[str]) -> None:
    from preftune.cli import main

    words = lab.words("sft", Path("unused"))[3:-2]
    assert main(["verify-resume", "tiny", "sft", *words, "--kills", "1"]) == 0
    shown = capfd.readouterr().out.strip().split("\n")
    assert shown[-1].split()[:3] == ["sft", "6", "1"]
    assert shown[-1].count("identical") == 5
    assert set(STAGES) >= {"sft"}


@dataclass
class _Played:
    """Lives that write what a stage would leave, and die of every fault; `died` is where that was."""

    died: list[tuple[bool, bool]] = field(default_factory=list)

    def run(self, words: list[str], log: Path, fault: str = "") -> int:
        run, name = RunDir(Path(words[-1])), words[2]
        if fault:
            self.died.append((run.stage_json("base").is_file(), run.stage_json(name).is_file()))
            return -KILL
        write_json(run.stage_json("base"), {"stage": "base"})
        kind, target = (
            ("sft", run.models / f"policy_{name}") if name == "sft" else ("collect", run.collected(name))
        )
        record = {"stage": name, "algorithm": kind, "steps": 4}
        states = {"policy.safetensors": "a", "policy-optimizer.safetensors": "b"} if name == "sft" else {}
        write_json(run.stage_json(name), record | {"state_sha256": states})
        write_json(target / "made.json", {})
        for log_file in (run.metrics(name), run.ledger(name)):
            write_jsonl(log_file, [{"step": 1}])
        return 0


@pytest.mark.parametrize(("name", "parts"), [("sft", 5), ("pairs", 3)])
def test_verify_resume_kills_the_stage_itself_and_compares_what_it_makes(
    name: str, parts: int, tmp_path: Path
) -> None:
    """The first stage of a recipe from scratch dies with its base there; one that collects has no weights."""
    words = ["stage.pairs.algorithm=collect", "stage.pairs.judge=rm"]
    lives: Any = _Played()
    trial = resume._Trial("tiny", [], load_recipe("tiny", words).config, tmp_path, lives, random.Random(0))
    verdict = trial.stage(name, 2)
    assert lives.died == [(True, False)] * len(verdict.kills)
    assert verdict.kills
    assert (len(verdict.parts), verdict.differs) == (parts, [])
    assert resume.table([verdict]).split("\n")[1].split()[3:].count("identical") == parts
