"""Runs that stop in the middle, start in another order, or start from what is already there."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

import preftune
from preftune import api
from preftune.errors import ConfigError, InputMissing
from preftune.rundir import RunDir, read_json, read_jsonl, write_jsonl
from preftune.runs.console import Console
from preftune.training import precision
from tiny import same_weights


class Killed(Exception):
    """Stands in for a kill."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Make the run die as a stage reports a step, before that step's checkpoint."""

    def at(stage: str, step: int) -> None:
        @contextmanager
        def progress(
            self: Console, name: str, algorithm: str, steps: int
        ) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
            def on_step(now: int, metrics: Mapping[str, float]) -> None:
                if (name, now) == (stage, step):
                    raise Killed

            yield on_step

        monkeypatch.setattr(Console, "progress", progress)

    return at


def weights(run: RunDir, model: str) -> dict:
    return load_file(run.models / model / "model.safetensors")


def test_killed_in_every_kind_of_stage_and_resumed_gives_the_same_weights(
    tiny_run: RunDir, tmp_path: Path, kill: Callable[[str, int], None]
) -> None:
    """Bit for bit those of the run that nobody stopped. Checkpoints are taken every second step."""
    out = RunDir(tmp_path)
    for stage, step in (("base", 31), ("sft", 1), ("rm", 4), ("ppo", 3)):
        kill(stage, step)
        with pytest.raises(Killed):
            preftune.ppo_train("tiny", out=str(tmp_path))
        assert read_json(out.stage_json(stage))["status"] == "running"
        saved = sorted(p.name for p in out.checkpoints(stage).glob("*")) if step > 2 else []
        assert saved == {"base": ["step-000028", "step-000030"], "sft": []}.get(stage, ["step-000002"])
        assert not out.model_dir(stage, trains_policy=stage != "rm").exists()
    kill("none", 0)
    preftune.ppo_train("tiny", out=str(tmp_path))
    for model in ("base", "policy_sft", "reward_model", "policy_ppo"):
        assert same_weights(weights(out, model), weights(tiny_run, model)), model
    side = [read_json(run.models / "reward_model" / "preftune.json") for run in (out, tiny_run)]
    assert side[0] == side[1]
    assert [row["step"] for row in read_jsonl(out.metrics("ppo"))] == [1, 2, 3]
    assert not list(out.path.rglob("checkpoints"))
    assert not (out.models / "policy_dpo").exists()


@pytest.mark.usefixtures("small_data")
def test_the_seconds_of_a_stage_are_those_of_all_its_attempts(
    tmp_path: Path, kill: Callable[[str, int], None]
) -> None:
    """Killed in step 3, of which nothing is kept, it has 2 of 4 steps behind it."""
    words, run = ("model.scratch.steps=2", "checkpoint.every=2"), RunDir(tmp_path)
    kill("sft", 3)
    with pytest.raises(Killed):
        preftune.supervised_finetune("tiny", *words, out=str(tmp_path))
    rows = [{**row, "time": 1000.0 * row["step"]} for row in read_jsonl(run.metrics("sft"))]
    write_jsonl(run.metrics("sft"), rows)
    kill("none", 0)
    preftune.supervised_finetune("tiny", *words, out=str(tmp_path))
    assert 2000 < read_json(run.stage_json("sft"))["seconds"] < 3000


@pytest.mark.usefixtures("small_data")
def test_the_reward_model_can_come_first(tmp_path: Path) -> None:
    """As in the replaced pipeline: from the base model, without an SFT stage having run."""
    words = ("stage.rm.init=base", "model.scratch.steps=4")
    path = preftune.train_reward_model("tiny", *words, out=str(tmp_path))
    run = RunDir(tmp_path)
    assert path == run.models / "reward_model"
    assert sorted(p.name for p in run.models.iterdir()) == ["base", "reward_model"]
    assert read_json(run.stage_json("rm"))["parents"] == ["base"]
    scores = preftune.load_reward_model(path).score(["\n\nHuman: Hi\n\nAssistant:"], [" It is red ."])
    assert scores.isfinite().all()
    policy = preftune.supervised_finetune("tiny", *words, out=str(tmp_path))
    assert policy.is_dir()


@pytest.mark.usefixtures("small_data")
def test_a_run_can_be_made_again_from_nothing(tmp_path: Path) -> None:
    """resume=False removes what preftune wrote there, and nothing else."""
    preftune.supervised_finetune("tiny", "model.scratch.steps=2", out=str(tmp_path))
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError):
        preftune.supervised_finetune("tiny", "model.scratch.steps=3", out=str(tmp_path))
    preftune.supervised_finetune("tiny", "model.scratch.steps=3", out=str(tmp_path), resume=False)
    assert len(read_jsonl(RunDir(tmp_path).metrics("base"))) == 3
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_replies_of_a_finished_run(tiny_run: RunDir) -> None:
    given = list(api.sample(tiny_run.path, "ppo", ["Hello"], seed=3))
    assert [row["prompt"] for row in given] == ["\n\nHuman: Hello\n\nAssistant:"]
    assert list(api.sample(tiny_run.path, "policy_ppo", ["Hello"], seed=3)) == given
    assert len(list(api.sample(tiny_run.path, "base", n=3))) == 3
    with pytest.raises(preftune.errors.UsageError, match="no policy"):
        list(api.sample(tiny_run.path, "rl"))


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    for call in (lambda: api.evaluate(tmp_path), lambda: list(api.sample(tmp_path))):
        with pytest.raises(InputMissing, match=r"config\.toml"):
            call()


@pytest.mark.usefixtures("small_data")
def test_a_stage_of_one_call_runs_its_parents_only(tmp_path: Path) -> None:
    preftune.dpo_train("tiny", "model.scratch.steps=2", out=str(tmp_path))
    assert sorted(p.name for p in RunDir(tmp_path).models.iterdir()) == ["base", "policy_dpo", "policy_sft"]


@pytest.mark.usefixtures("small_data")
def test_bf16_runs_every_kind_of_stage(tmp_path: Path) -> None:
    """On a CPU too, and after float32 runs in the same process."""
    rows = (f"stage.{name}.rows=32" for name in ("sft", "rm", "dpo"))
    steps = (f"stage.{name}.steps=1" for name in ("ppo", "grpo"))
    few = ("model.scratch.steps=4", "evaluation.prompts=4", *rows, *steps)
    run = preftune.run("tiny", "precision=bf16", *few, out=str(tmp_path))
    assert run.analysis_text.is_file()
    assert read_json(run.evaluation("policy_sft"))["kl"]["k1_per_sequence"]["mean"] == 0.0


@pytest.mark.usefixtures("small_data")
def test_a_run_keeps_the_precision_that_auto_was_when_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun where bf16 pays and gone on with where it is emulated: one precision, and no stage anew."""
    few = ("precision=auto", "model.scratch.steps=2", "stage.sft.rows=32", "stage.rm.rows=32")
    mirror = str(tmp_path / "mirror")
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: True)
    run = api.run_recipe("tiny", few, out=str(tmp_path / "first"), until="sft", mirror=mirror)
    assert read_json(run.run)["precision"] == "bf16"
    assert "precision auto: bf16\n" in capsys.readouterr().out
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: False)
    for place in (
        "first",
        "new",
    ):  # the same directory elsewhere, and a new machine that has the mirror alone
        went_on = api.run_recipe("tiny", few, out=str(tmp_path / place), until="rm", mirror=mirror)
        said = capsys.readouterr().out
        assert "precision auto: bf16, " in said
        assert "with which the run began" in said
        for stage in ("sft", "rm"):
            assert read_json(went_on.stage_json(stage))["inputs"]["precision"] == "bf16"
    assert "precision bf16" in (run.models / "reward_model" / "README.md").read_text(encoding="utf-8")
    other = api.run_recipe("tiny", few, out=str(tmp_path / "other"), until="sft")
    assert read_json(other.run)["precision"] == "float32"
    assert read_json(other.stage_json("sft"))["inputs"]["precision"] == "float32"
