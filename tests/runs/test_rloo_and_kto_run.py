"""A run with an RLOO and a KTO stage added by overrides: trained, evaluated, reported; KTO's as a judge."""

from pathlib import Path

import pytest

import preftune
from damages import shown_by
from preftune.config import judges_of, load_recipe
from preftune.report import load_run
from preftune.report.plots.figures import draw
from preftune.rundir import RunDir, read_json, read_jsonl

ADDED = (
    "stage.rloo.algorithm=rloo",
    "stage.rloo.steps=3",
    "stage.rloo.batch_size=16",
    "stage.rloo.learning_rate=5e-4",
    "stage.rloo.max_new_tokens=16",
    "stage.kto.algorithm=kto",
    "stage.kto.rows=64",
    "stage.kto.batch_size=32",
    "stage.kto.learning_rate=1e-4",
)
FEWER = ("stage.ppo=none", "stage.dpo=none", "stage.grpo=none")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, few_pairs: None) -> RunDir:
    return preftune.run("tiny", *ADDED, *FEWER, out=str(tmp_path_factory.mktemp("added") / "run"))


def test_both_are_trained_with_the_batches_of_their_settings(run: RunDir) -> None:
    rloo, kto = read_jsonl(run.metrics("rloo")), read_jsonl(run.metrics("kto"))
    assert (len(rloo), len(kto)) == (3, 4)  # 64 pairs are 128 responses in batches of 32
    assert [len(row["rows"]) for row in read_jsonl(run.ledger("rloo"))] == [4] * 3  # prompts of 4 responses
    assert [len(row["rows"]) for row in read_jsonl(run.ledger("kto"))] == [16] * 4  # pairs of 2
    assert rloo[0]["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert rloo[0]["kl_per_sequence"] == 0.0
    assert kto[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert kto[0]["kl"] == pytest.approx(0.0, abs=1e-4)
    assert kto[-1]["rewards/margins"] != 0.0


def test_both_are_evaluated_reported_and_described(run: RunDir) -> None:
    analysis = run.analysis_text.read_text(encoding="utf-8")
    for name, words in (("rloo", "RLOO against a reward model"), ("kto", "KTO on desirable")):
        assert read_json(run.evaluation(f"policy_{name}"))["label"] == name.upper()
        assert f"| {name.upper()} " in analysis
        assert f"training_{name}.svg" in draw(shown_by(load_run(run), run.metrics(name)))
        assert words in (run.model_dir(name) / "README.md").read_text(encoding="utf-8")


def test_a_finished_stage_is_skipped(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    preftune.run("tiny", *ADDED, *FEWER, out=str(run.path))
    said = capsys.readouterr().out
    assert "rloo         already finished" in said
    assert "kto          already finished" in said


def test_a_kto_stage_can_be_the_judge(run: RunDir, tmp_path: Path) -> None:
    """By its implicit reward, like a DPO stage."""
    words = [*ADDED, *FEWER, "stage.rm=none", "stage.rloo.reward_model=kto", "evaluation.prompts=6"]
    assert judges_of(load_recipe("tiny", words).config.stage) == ["kto"]
    judged = preftune.run("tiny", *words, out=str(tmp_path / "run"), from_run=str(run.path))
    assert read_json(judged.reward_evaluation)["stage"] == "kto"
    assert read_json(judged.stage_json("rloo"))["parents"] == ["sft", "kto"]
