"""A reward model whose score is the mean over the response, and whose head is fitted before it is trained."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import preftune
import prose
from preftune.api import audit, run_recipe
from preftune.config import load_recipe
from preftune.errors import ConfigError, DataError
from preftune.measure.same_judges import _same_weights
from preftune.rundir import RunDir, read_json, read_jsonl, write_json
from tiny import without_sums

SMALL = ["model.scratch.steps=20", "stage.sft.rows=32", "stage.rm.rows=64", "stage.rm.batch_size=16"]
SMALL += ["stage.ppo.steps=1", "stage.grpo=none", "stage.dpo=none", "evaluation.prompts=4"]
FIT, MEAN = "stage.rm.fit_head=true", "stage.rm.pooling=mean"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return preftune.run("tiny", *SMALL, FIT, MEAN, out=str(tmp_path_factory.mktemp("mean") / "run"))


def judge_of(run: RunDir) -> Path:
    return run.models / "reward_model"


@torch.no_grad()
def test_the_saved_model_scores_the_mean_over_the_response(run: RunDir) -> None:
    """Also in the list of mistakes, whose last number of a token is the score. Others read another one."""
    assert read_json(judge_of(run) / "preftune.json")["pooling"] == "mean"
    handle = preftune.load_reward_model(judge_of(run))
    plain = AutoModelForSequenceClassification.from_pretrained(judge_of(run))
    prompt, response = "\n\nHuman: What is red?\n\nAssistant:", " A rose is red."
    begin = handle.encoder.text(prompt)
    ids = torch.tensor([begin + handle.encoder.response(response, True)])
    by_token = plain.score(plain.base_model(ids).last_hidden_state)[0, :, 0]
    raw = handle.raw_score([prompt], [response], ended=True)
    assert raw.item() == pytest.approx(by_token[len(begin) :].mean().item(), abs=1e-5)
    assert abs(raw.item() - plain(input_ids=ids).logits.item()) > 1e-3
    mistakes = read_jsonl(run.path / "analysis" / "reward_model_mistakes.jsonl")
    for row in mistakes[:5]:
        for side in ("chosen", "rejected"):
            score = handle.raw_score([row["prompt"]], [row[side]]).item()
            assert row[f"reward_{side}"] == pytest.approx(score, abs=1e-4)
            assert row[f"tokens_{side}"][-1][1] == pytest.approx(score, abs=1e-4)


def test_the_first_step_begins_with_the_fitted_head(run: RunDir, tmp_path: Path) -> None:
    """On its own training pairs it is right more often than a coin, which a new head is."""
    first = read_jsonl(run.metrics("rm"))[0]
    new = run_recipe("tiny", [*SMALL, MEAN, "stage.rm.head_scale=0"], out=str(tmp_path / "new"), until="rm")
    assert first["loss"] < 0.67 < read_jsonl(new.metrics("rm"))[0]["loss"]
    assert first["accuracy"] > 0.55


def test_policies_are_trained_and_measured_by_it(run: RunDir) -> None:
    handle = preftune.load_reward_model(judge_of(run))
    for row in read_jsonl(run.path / "samples" / "policy_ppo_samples.jsonl"):
        score = handle.score([row["prompt"]], [row["response"]], ended=row["ended"]).item()
        assert row["score"] == pytest.approx(score, abs=1e-3)


def test_the_members_of_an_ensemble_score_so_too(tmp_path: Path) -> None:
    words = [*SMALL, FIT, MEAN, "stage.rm.members=2", "model.trainable=top:1"]
    run = run_recipe("tiny", words, out=str(tmp_path / "run"), until="rm")
    side = read_json(judge_of(run) / "preftune.json")
    assert side["pooling"] == "mean"
    handle = preftune.load_reward_model(judge_of(run))
    one = preftune.load_reward_model(judge_of(run) / "member-1")
    args = ["\n\nHuman: What is red?\n\nAssistant:"], [" A rose is red."]
    torch.testing.assert_close(handle.member_scores(*args)[1], one.score(*args))


def test_what_the_model_says_of_itself(run: RunDir, tmp_path: Path) -> None:
    """Its card names the one library that reads it so; the audit warns; a wrong word is refused."""
    card = (judge_of(run) / "README.md").read_text()
    assert "from preftune import load_reward_model" in card
    assert "AutoModelForSequenceClassification" not in card
    found = {check["name"]: check for check in audit(judge_of(run))["checks"]}
    assert found["where the score is read"]["status"] == "warning"
    prose.compare("runs/fitted_head: the audit", found["where the score is read"]["found"])
    shutil.copytree(judge_of(run), tmp_path / "copied")
    side = read_json(tmp_path / "copied" / "preftune.json")
    write_json(tmp_path / "copied" / "preftune.json", side | {"pooling": "max"})
    with pytest.raises(DataError, match="is not as preftune writes it") as error:
        preftune.load_reward_model(tmp_path / "copied")
    assert "pooling is last or mean" in error.value.hint


def test_two_readings_of_the_same_weights_are_two_judges(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "run")
    shutil.copytree(run.path, other.path)
    without_sums(other)
    assert _same_weights((run, "rm"), (other, "rm"))
    side = read_json(judge_of(other) / "preftune.json")
    del side["pooling"]
    write_json(judge_of(other) / "preftune.json", side)
    assert not _same_weights((run, "rm"), (other, "rm"))


def test_the_size_of_a_new_head_has_no_use_beside_it() -> None:
    with pytest.raises(ConfigError, match="head_scale has no use"):
        load_recipe("tiny", [FIT, "stage.rm.head_scale=0"])
